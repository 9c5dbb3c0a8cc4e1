"""GradNorm in float64, its weights' move by double backward, one step and one term at a time.

Written from Algorithm 1 of Chen et al. 2018, with two changes: the weights are w = I softmax(z) in place of
renormalised ones; and what is descended on is half the sum of the squared logarithms of G_i over its target, in place
of the sum of their absolute differences, by plain steps that are clipped. It shares nothing with the package: the
batches of a step are averaged before anything.
"""

import math

import torch


def gradient_norms(weights, losses, shared):
    """The norms of the gradients of w_i L_i at the shared layer, with their graphs."""
    norms = []
    for weight, loss in zip(weights, losses, strict=True):
        found = torch.autograd.grad(weight * loss, shared, create_graph=True, allow_unused=True)
        norms.append(torch.cat([g.flatten() for g in found if g is not None]).norm())
    return torch.stack(norms)


def training_rates(terms):
    """r_i, of terms given as loss to differentiate, mean, and initial loss."""
    ratios = torch.tensor([mean / start for _, mean, start in terms], dtype=torch.float64)
    return ratios / ratios.mean()


def gradient_loss(weights, terms, shared, alpha):
    """The paper's L_grad, whose targets count as constant."""
    norms = gradient_norms(weights, [loss for loss, _, _ in terms], shared)
    return (norms - norms.mean().detach() * training_rates(terms) ** alpha).abs().sum()


def ratio_loss(weights, terms, shared, alpha):
    """The same of logarithms: half the squares of log(G_i / target_i), with the level of the targets that fits best."""
    norms = gradient_norms(weights, [loss for loss, _, _ in terms], shared)
    wanted = training_rates(terms) ** alpha
    level = math.exp(
        sum(math.log(float(norm / w)) for norm, w in zip(norms.detach(), wanted, strict=True)) / len(terms)
    )
    return (norms / (level * wanted)).log().square().sum() / 2


class NaiveGradNorm:
    """Args: names of the terms; shared parameters; initial losses "first", a number of steps, or a mapping.

    A term that is not there keeps its weight; those that are there share what is left of I.
    """

    def __init__(self, terms, shared, alpha, lr, initial="first"):
        self.terms, self.shared, self.alpha = list(terms), shared, alpha
        self.z, self.lr = {term: torch.zeros((), dtype=torch.float64) for term in self.terms}, lr
        self.initial = dict(initial) if isinstance(initial, dict) else {}
        self.needed = initial if isinstance(initial, int) else 1
        self.history = {term: [] for term in self.terms}

    def weights(self):
        return len(self.terms) * torch.softmax(torch.stack(list(self.z.values())), 0)

    def step(self, batches, optimizer):
        """Train on a list of the losses of batches, each a dict of some of the terms; their mean is the loss."""
        losses = {}
        for term in self.terms:
            found = [batch[term] for batch in batches if term in batch]
            if found:
                losses[term] = sum(found) / len(batches)
                self.history[term].append(sum(float(loss.detach()) for loss in found) / len(found))
                if term not in self.initial and len(self.history[term]) == self.needed:
                    self.initial[term] = sum(self.history[term]) / self.needed
        by_term = dict(zip(self.terms, self.weights().detach(), strict=True))
        ready = [term for term in losses if term in self.initial]
        slopes = self.slopes(ready, losses, by_term) if ready else ()
        optimizer.zero_grad()
        sum(by_term[term] * loss for term, loss in losses.items()).backward()
        optimizer.step()
        for term, slope in zip(ready, slopes, strict=True):
            self.z[term] -= self.lr * min(max(float(slope), -1.0), 1.0)
        if ready:
            moved = dict(zip(self.terms, self.weights().detach(), strict=True))
            others = [term for term in self.terms if term not in ready]
            for term in ready:  # a constant on their logits: the weights of the others are as before
                if others:
                    kept = sum(by_term[other] for other in ready) / sum(by_term[other] for other in others)
                    now = sum(moved[other] for other in ready) / sum(moved[other] for other in others)
                    self.z[term] += (kept / now).log()

    def slopes(self, ready, losses, by_term):
        logs = torch.tensor([math.log(float(by_term[term])) for term in ready], dtype=torch.float64)
        logs.requires_grad_()
        means = [self.history[term][-1] for term in ready]
        wanted = [(losses[term], mean, self.initial[term]) for term, mean in zip(ready, means, strict=True)]
        loss = ratio_loss(logs.exp(), wanted, self.shared, self.alpha)
        return torch.autograd.grad(loss, logs, retain_graph=True)[0]
