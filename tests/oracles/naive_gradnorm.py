"""GradNorm in float64, its weights' gradient by double backward, one step and one term at a time.

Written from Algorithm 1 of Chen et al. 2018, with the weights w = I softmax(z) in place of renormalised ones. It shares
nothing with the package: z is a parameter of torch's own Adam, and the batches of a step are averaged before anything.
"""

import torch


def gradient_norms(weights, losses, shared):
    """The norms of the gradients of w_i L_i at the shared layer, with their graphs."""
    norms = []
    for weight, loss in zip(weights, losses, strict=True):
        found = torch.autograd.grad(weight * loss, shared, create_graph=True, allow_unused=True)
        norms.append(torch.cat([g.flatten() for g in found if g is not None]).norm())
    return torch.stack(norms)


def gradient_loss(weights, losses, initial, shared, alpha):
    """L_grad, whose targets count as constant; of the terms that are given."""
    norms = gradient_norms(weights, losses, shared)
    ratios = torch.stack([loss.detach() / start for loss, start in zip(losses, initial, strict=True)])
    wanted = norms.mean().detach() * (ratios / ratios.mean()) ** alpha
    return (norms - wanted).abs().sum()


class NaiveGradNorm:
    """Args: names of the terms; shared parameters; initial losses "first", a number of steps, or a mapping."""

    def __init__(self, terms, shared, alpha, lr, initial="first"):
        self.terms, self.shared, self.alpha = list(terms), shared, alpha
        self.z = torch.zeros(len(self.terms), dtype=torch.float64, requires_grad=True)
        self.optimizer = torch.optim.Adam([self.z], lr=lr)
        self.initial = dict(initial) if isinstance(initial, dict) else {}
        self.needed = initial if isinstance(initial, int) else 1
        self.history = {term: [] for term in self.terms}

    def weights(self):
        return len(self.terms) * torch.softmax(self.z, 0)

    def step(self, batches, optimizer):
        """Train on a list of the losses of batches, each a dict of some of the terms; their mean is the loss."""
        losses = {}
        for term in self.terms:
            found = [batch[term] for batch in batches if term in batch]
            if found:
                losses[term] = sum(found) / len(batches)
        for term, loss in losses.items():
            self.history[term].append(float(loss.detach()))
            if term not in self.initial and len(self.history[term]) == self.needed:
                self.initial[term] = sum(self.history[term]) / self.needed
        weights = self.weights()
        by_term = dict(zip(self.terms, weights, strict=True))
        ready = [term for term in losses if term in self.initial]
        slope = None
        if ready:
            chosen = [[found[term] for term in ready] for found in (by_term, losses, self.initial)]
            (slope,) = torch.autograd.grad(gradient_loss(*chosen, self.shared, self.alpha), self.z, retain_graph=True)
        optimizer.zero_grad()
        sum(by_term[term].detach() * loss for term, loss in losses.items()).backward()
        optimizer.step()
        if slope is not None:
            self.z.grad = slope
            self.optimizer.step()
