"""MetaBalance, one parameter and one term at a time, in float64.

Written from Algorithm 1 of the paper and docs/balancers/meta_balance.md. It shares nothing with the package.
"""

import math

import numpy as np


class NaiveMetaBalance:
    def __init__(self, terms, *, relax=0.7, beta=0.9, anchor="first"):
        self.terms, self.relax, self.beta, self.anchor = list(terms), relax, beta, anchor
        self.n = {}  # (term, parameter) -> moving average

    def combine(self, gradients):
        """``gradients``: term name -> list with an array or None per parameter. What goes to p.grad."""
        count = len(next(iter(gradients.values())))
        combined = [None] * count
        for p in range(count):
            reaching = {t: g[p] for t, g in gradients.items() if g[p] is not None}
            for t in gradients:
                if reaching:
                    self.observe(t, p, gradients[t][p])
        for p in range(count):
            reaching = {t: g[p] for t, g in gradients.items() if g[p] is not None}
            if reaching:
                combined[p] = sum(self.factor(t, p) * np.asarray(g, np.float64) for t, g in reaching.items())
        return combined

    def observe(self, term, p, gradient):
        norm = 0.0 if gradient is None else math.sqrt(float((np.asarray(gradient, np.float64) ** 2).sum()))
        if (term, p) in self.n:
            self.n[term, p] = self.beta * self.n[term, p] + (1 - self.beta) * norm
        elif norm > 0:
            self.n[term, p] = norm

    def factor(self, term, p):
        if (term, p) not in self.n:
            return 0.0  # times a gradient of zeros
        if self.is_noise(term, p):
            return 1 - self.relax
        return self.relax * self.magnitude(p) / self.n[term, p] + 1 - self.relax

    def share(self, term, p):
        total = math.hypot(*[norm for (other, _), norm in self.n.items() if other == term])
        return self.n.get((term, p), 0.0) / total if total > 0 else 0.0

    def is_noise(self, term, p):
        epsilon = 2.0**-52
        return self.share(term, p) < 128 * epsilon and any(self.share(t, p) > 12800 * epsilon for t in self.terms)

    def magnitude(self, p):
        known = {t: self.n[t, p] for t in self.terms if (t, p) in self.n and not self.is_noise(t, p)}
        geometric = math.exp(sum(map(math.log, known.values())) / len(known))
        if self.anchor == "mean":
            return geometric
        if self.anchor == "max":
            return max(known.values())
        return known.get(self.terms[0] if self.anchor == "first" else self.anchor, geometric)
