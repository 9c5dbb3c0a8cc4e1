"""MTAdam element by element in numpy float64, one parameter, one term, one layer at a time.

Written from Algorithm 1 of the paper and the definitions in docs/how_it_works.md. It shares nothing with the package.
"""

import math

import numpy as np

EPSILON = 2.0**-52


class NaiveMTAdam:
    def __init__(
        self, parameters, layers, terms, *, lr=1e-3, betas=(0.9, 0.999, 0.9), eps=1e-8, weight_decay=0.0,
        anchor="first", importance=None, norm_init="first", denominator="max", update="sum",
        max_scale=math.inf, amsgrad=False, maximize=False,
    ):  # fmt: skip
        self.parameters = [np.array(p, dtype=np.float64) for p in parameters]
        self.layers, self.terms = list(layers), list(terms)
        count = len(self.parameters)
        self.lr = lr if isinstance(lr, list) else [lr] * count
        self.betas = betas if isinstance(betas, list) else [betas] * count
        self.weight_decay = weight_decay if isinstance(weight_decay, list) else [weight_decay] * count
        self.eps, self.anchor, self.importance = eps, anchor, importance or {}
        self.norm_init, self.denominator, self.update = norm_init, denominator, update
        self.max_scale, self.amsgrad, self.maximize = max_scale, amsgrad, maximize
        zeros = [[np.zeros_like(p) for p in self.parameters] for _ in self.terms]
        self.v_sum, self.v_sum_max = ([np.zeros_like(p) for p in self.parameters] for _ in range(2))
        self.m, self.v, self.v_max = ([[x.copy() for x in row] for row in zeros] for _ in range(3))
        self.shared_clock = [0] * count
        self.own_clock = [[0] * count for _ in self.terms]
        self.n = {(i, layer): None for i in range(len(self.terms)) for layer in self.layers}
        self.n_count = dict.fromkeys(self.n, 0)
        self.scale = {}

    def corrected(self, i, layer):
        n = self.n[i, layer]
        if n is None:
            return None
        if self.norm_init == "unbiased":
            beta3 = max(b[2] for b, other in zip(self.betas, self.layers, strict=True) if other == layer)
            return n / (1 - beta3 ** self.n_count[i, layer])
        return n

    def share(self, i, layer):
        """Of the term's norm over all layers; of what was observed, where the average began at one."""

        def seen(where):
            n, count = self.corrected(i, where), self.n_count[i, where]
            if n is None or self.norm_init != "one":
                return n or 0.0
            beta3 = max(b[2] for b, other in zip(self.betas, self.layers, strict=True) if other == where)
            return max(0.0, (n - beta3**count * (1 - count * EPSILON)) / (1 - beta3**count))

        total = math.hypot(*map(seen, dict.fromkeys(self.layers)))
        return seen(layer) / total if total > 0 else 0.0

    def is_noise(self, i, layer):
        counted = [j for j, term in enumerate(self.terms) if self.importance.get(term, 1.0) > 0]
        clear = any(self.share(j, layer) > 100 * 128 * EPSILON for j in counted)
        return self.anchor is not None and clear and self.share(i, layer) < 128 * EPSILON

    def heard(self, i, layer):
        return None if self.is_noise(i, layer) else self.corrected(i, layer)

    def reference(self, layer, anchor):
        known = {i: self.heard(i, layer) for i in range(len(self.terms))}
        known = {i: n for i, n in known.items() if n is not None and n > 0}
        if not known:
            return None
        geometric = math.exp(sum(math.log(n) for n in known.values()) / len(known))
        if anchor == "mean":
            return geometric
        if anchor == "max":
            return max(known.values())
        index = 0 if anchor == "first" else self.terms.index(anchor)
        return known.get(index, geometric)

    def balance_weight(self, i, layer):
        n, anchor = self.heard(i, layer), "first" if self.anchor in ("unit", None) else self.anchor
        return math.nan if n is None or n == 0 else n / self.reference(layer, anchor)

    def step(self, gradients, clip=None):
        """``gradients``: term name -> list with an array or None per parameter."""
        touched = [any(gradients[t][p] is not None for t in gradients) for p in range(len(self.parameters))]
        full = [
            [
                np.zeros_like(self.parameters[p])
                if t not in gradients or gradients[t][p] is None
                else np.asarray(gradients[t][p], dtype=np.float64)
                for p in range(len(self.parameters))
            ]
            for t in self.terms
        ]
        for layer in dict.fromkeys(self.layers):
            mine = [p for p, other in enumerate(self.layers) if other == layer]
            beta3 = max(self.betas[p][2] for p in mine)
            if any(touched[p] for p in mine):
                self.average_norms(layer, mine, beta3, full, gradients)
        for layer in dict.fromkeys(self.layers):
            for i, term in enumerate(self.terms):
                self.scale[i, layer] = self.new_scale(i, term, layer)
        balanced = [
            [self.scale[i, self.layers[p]] * full[i][p] for p in range(len(self.parameters))]
            for i in range(len(self.terms))
        ]
        if clip is not None:
            balanced = self.clipped(balanced, touched, *clip)
        for p in range(len(self.parameters)):
            if touched[p]:
                self.update_parameter(p, [row[p] for row in full], [row[p] for row in balanced])

    def average_norms(self, layer, mine, beta3, full, gradients):
        for i, term in enumerate(self.terms):
            if term not in gradients:
                continue
            norm = math.sqrt(sum(float((full[i][p] ** 2).sum()) for p in mine))
            if self.n[i, layer] is None:
                if norm == 0:
                    continue
                start = {"first": norm, "unbiased": 0.0, "one": 1.0}[self.norm_init]
                self.n[i, layer] = start
            self.n[i, layer] = beta3 * self.n[i, layer] + (1 - beta3) * norm
            self.n_count[i, layer] += 1

    def new_scale(self, i, term, layer):
        importance = self.importance.get(term, 1.0)
        if self.anchor is None:
            return importance
        n = self.heard(i, layer)
        if n is None or n == 0:
            return 0.0
        target = 1.0 if self.anchor == "unit" else self.reference(layer, self.anchor)
        return importance * min(target / n, self.max_scale)

    def clipped(self, balanced, touched, algorithm, limit):
        totals = [sum(row[p] for row in balanced) for p in range(len(self.parameters))]
        if algorithm == "norm":
            norm = math.sqrt(sum(float((t**2).sum()) for t, use in zip(totals, touched, strict=True) if use))
            factor = min(1.0, limit / (norm + 1e-6))
            return [[factor * g for g in row] for row in balanced]
        factors = [np.where(np.abs(t) > limit, limit / np.maximum(np.abs(t), limit), 1.0) for t in totals]
        return [[f * g for f, g in zip(factors, row, strict=True)] for row in balanced]

    def update_parameter(self, p, full, balanced):
        beta1, beta2, _ = self.betas[p]
        sign = -1.0 if self.maximize else 1.0
        first_here = not any(clock[p] > 0 for clock in self.own_clock)
        self.shared_clock[p] += 1
        for i in range(len(self.terms)):
            if self.own_clock[i][p] > 0:
                self.own_clock[i][p] += 1
            elif np.any(full[i] != 0) and not self.is_noise(i, self.layers[p]):
                self.own_clock[i][p] = self.shared_clock[p] if first_here else 1
            self.m[i][p] = beta1 * self.m[i][p] + (1 - beta1) * sign * balanced[i]
            self.v[i][p] = beta2 * self.v[i][p] + (1 - beta2) * balanced[i] ** 2
            self.v_max[i][p] = np.maximum(self.v_max[i][p], self.v[i][p])
        self.v_sum[p] = beta2 * self.v_sum[p] + (1 - beta2) * sum(balanced) ** 2
        self.v_sum_max[p] = np.maximum(self.v_sum_max[p], self.v_sum[p])
        reaching = [i for i in range(len(self.terms)) if self.own_clock[i][p] > 0]
        second = self.v_max if self.amsgrad else self.v
        hats = {i: second[i][p] / (1 - beta2 ** self.own_clock[i][p]) for i in reaching}
        step = np.zeros_like(self.parameters[p])
        if self.denominator == "own":
            for i in reaching:
                step = step + self.m[i][p] / (1 - beta1 ** self.own_clock[i][p]) / (np.sqrt(hats[i]) + self.eps)
        elif self.denominator == "sum":
            hat = (self.v_sum_max if self.amsgrad else self.v_sum)[p] / (1 - beta2 ** self.shared_clock[p])
            step = sum(row[p] for row in self.m) / (1 - beta1 ** self.shared_clock[p]) / (np.sqrt(hat) + self.eps)
        elif reaching:
            stack = np.stack(list(hats.values()))
            hat = stack.max(0) if self.denominator == "max" else stack.mean(0)
            total = sum(self.m[i][p] for i in reaching) / (1 - beta1 ** self.shared_clock[p])
            step = total / (np.sqrt(hat) + self.eps)
        if self.update == "mean" and reaching:
            step = step / len(reaching)
        self.parameters[p] = self.parameters[p] * (1 - self.lr[p] * self.weight_decay[p]) - self.lr[p] * step
