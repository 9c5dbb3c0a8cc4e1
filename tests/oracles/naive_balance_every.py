"""MTAdam(balance_every=k) in numpy float64, one parameter and one term at a time.

Written from docs/balance_every.md. It shares nothing with the package: norms are averaged anew from all that were
measured, and terms that do not meet are compared over those between them, of which there is at most one.
"""

import math

import numpy as np


def measured_steps(every, count):
    """All measured steps below ``count``: the gap after step T is ``1 + T // 4``, but at most ``every``."""
    steps = [0]
    while steps[-1] < count:
        steps.append(steps[-1] + min(every, 1 + steps[-1] // 4))
    return [step for step in steps if step < count]


class NaiveBalanceEvery:
    def __init__(
        self, parameters, terms, every, *, lr=1e-3, betas=(0.9, 0.999, 0.9), eps=1e-8, weight_decay=0.0,
        anchor="first", importance=None, update="sum", max_scale=math.inf, amsgrad=False, maximize=False,
    ):  # fmt: skip
        self.parameters = [np.array(p, dtype=np.float64) for p in parameters]
        self.terms, self.every, self.lr, self.betas, self.eps = list(terms), every, lr, betas, eps
        self.weight_decay, self.anchor, self.importance = weight_decay, anchor, importance or {}
        self.update, self.max_scale, self.amsgrad, self.maximize = update, max_scale, amsgrad, maximize
        self.decay = betas[2] ** min(1.0, every / 20)
        self.schedule = set(measured_steps(every, 100_000))
        self.measured = {term: [] for term in terms}  # the squares of the norms, by parameter
        self.last = {}  # the step in which a term was measured last
        self.steps = 0
        self.scale = {}
        count = len(self.parameters)
        self.first, self.second, self.largest = ([np.zeros_like(p) for p in self.parameters] for _ in range(3))
        self.clock = [0] * count
        self.reaching = [set() for _ in range(count)]

    def squares(self, term):
        """By parameter the mean of the squares, in which every measurement counts ``decay`` times its successor."""
        found = self.measured[term]
        if not found:
            return np.zeros(len(self.parameters))
        shares = [self.decay ** (len(found) - 1 - index) for index in range(len(found))]
        return sum(s * squares for s, squares in zip(shares, found, strict=True)) / sum(shares)

    def norm(self, term):
        return math.sqrt(self.squares(term).sum())

    def compared(self, one, other):
        """The norm of the other term over that of the one; None where nothing joins them."""

        def met(first, second):
            mine, theirs = self.squares(first), self.squares(second)
            return math.sqrt(mine[theirs > 0].sum())

        if met(one, other) > 0:
            return met(other, one) / met(one, other)
        between = [t for t in self.terms if met(one, t) > 0 and met(other, t) > 0]
        ways = [math.log(self.compared(one, t) * self.compared(t, other)) for t in between]
        return math.exp(sum(ways) / len(ways)) if ways else None

    def to_the_mean(self, term):
        counted = [t for t in self.terms if self.importance.get(t, 1.0) > 0]
        logs = [math.log(found) for found in (self.compared(term, t) for t in counted) if found is not None]
        return sum(logs) / len(logs) if logs else -math.inf

    def to_the_anchor(self, term, anchor):
        """n_anchor / n_i."""
        if anchor == "max":
            counted = [t for t in self.terms if self.importance.get(t, 1.0) > 0]
            joined = [t for t in counted if self.compared(term, t) is not None]
            return math.exp(self.to_the_mean(term) - min(map(self.to_the_mean, joined)))
        found = None if anchor == "mean" else self.compared(term, self.terms[0] if anchor == "first" else anchor)
        return math.exp(self.to_the_mean(term)) if found is None else found

    def measure(self, gradients):
        for term, found in gradients.items():
            self.last[term] = self.steps
            squares = np.array([0.0 if g is None else float((g**2).sum()) for g in found])
            if squares.any() or self.measured[term]:
                self.measured[term].append(squares)
            for reaching, gradient in zip(self.reaching, found, strict=True):
                if gradient is not None and np.any(gradient != 0):
                    reaching.add(term)
        for term in self.terms:
            self.scale[term] = self.importance.get(term, 1.0) * self.ratio(term)

    def ratio(self, term):
        if self.anchor is None:
            return 1.0
        if self.norm(term) == 0:
            return 0.0
        found = 1 / self.norm(term) if self.anchor == "unit" else self.to_the_anchor(term, self.anchor)
        return min(found, self.max_scale)

    def balance_weight(self, term):
        if self.norm(term) == 0:
            return math.nan
        return 1 / self.to_the_anchor(term, "first" if self.anchor in ("unit", None) else self.anchor)

    def step(self, gradients, clip=None):
        """``gradients``: term name -> list with an array or None per parameter. Returns whether it was measured."""
        waiting = [term for term in gradients if term not in self.last or self.steps - self.last[term] >= self.every]
        measured = self.steps in self.schedule or bool(waiting)
        if measured:
            self.measure(gradients)
        self.steps += 1
        total = [self.balanced(index, gradients) for index in range(len(self.parameters))]
        if clip is not None:
            total = clipped(total, *clip)
        for index, gradient in enumerate(total):
            if gradient is not None:
                self.adam(index, gradient)
        return measured

    def balanced(self, index, gradients):
        parts = [self.scale[t] * found[index] for t, found in gradients.items() if found[index] is not None]
        return sum(parts) if parts else None

    def adam(self, p, gradient):
        beta1, beta2, _ = self.betas
        self.clock[p] += 1
        sign = -1.0 if self.maximize else 1.0
        self.first[p] = beta1 * self.first[p] + (1 - beta1) * sign * gradient
        self.second[p] = beta2 * self.second[p] + (1 - beta2) * gradient**2
        self.largest[p] = np.maximum(self.largest[p], self.second[p])
        second = self.largest[p] if self.amsgrad else self.second[p]
        step = self.first[p] / (1 - beta1 ** self.clock[p])
        step = step / (np.sqrt(second / (1 - beta2 ** self.clock[p])) + self.eps)
        if self.update == "mean":
            step = step / max(1, len(self.reaching[p]))
        self.parameters[p] = self.parameters[p] * (1 - self.lr * self.weight_decay) - self.lr * step


def clipped(total, algorithm, limit):
    if algorithm == "value":
        return [None if g is None else np.clip(g, -limit, limit) for g in total]
    norm = math.sqrt(sum(float((g**2).sum()) for g in total if g is not None))
    return [None if g is None else g * min(1.0, limit / (norm + 1e-6)) for g in total]
