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
        self.scale, self.history, self.memory = {}, {}, {}
        self.rounding = [np.zeros_like(p) for p in self.parameters]  # see ``note_rounding``

    def beta3(self, layer):
        return max(b[2] for b, other in zip(self.betas, self.layers, strict=True) if other == layer)

    def corrected(self, i, layer):
        n = self.n[i, layer]
        if n is None:
            return None
        return n / (1 - self.beta3(layer) ** self.n_count[i, layer]) if self.norm_init == "unbiased" else n

    def part(self, i, p):
        """Of the square of the layer's norm, in the parameter: each step counts as its norm does in the average."""
        mass, parts = self.history.get((i, self.layers[p]), (0.0, {}))
        return parts[p] / mass if mass > 0 else 0.0

    def seen(self, i, p):
        """The norm at a parameter; of what was observed, where the average began at one."""
        layer = self.layers[p]
        n, count, beta3 = self.corrected(i, layer), self.n_count[i, layer], self.beta3(layer)
        if n is None:
            return 0.0
        if self.norm_init == "one":
            n = max(0.0, (n - beta3**count * (1 - count * EPSILON)) / (1 - beta3**count))
        return n * math.sqrt(self.part(i, p))

    def remembered(self, key, compute):
        """Until norms move again."""
        if key not in self.memory:
            self.memory[key] = compute()
        return self.memory[key]

    def is_noise(self, i, p):
        def share(j):
            everywhere = range(len(self.parameters))
            total = self.remembered(("total", j), lambda: math.hypot(*(self.seen(j, q) for q in everywhere)))
            return self.seen(j, p) / total if total > 0 else 0.0

        counted = [j for j, term in enumerate(self.terms) if self.importance.get(term, 1.0) > 0]
        clear = any(share(j) > 100 * 128 * EPSILON for j in counted)
        return self.anchor is not None and clear and share(i) < 128 * EPSILON

    def hears(self, i, p):
        return self.remembered(("hears", i, p), lambda: self.part(i, p) > 0 and not self.is_noise(i, p))

    def heard(self, i, layer):
        mine = [p for p, other in enumerate(self.layers) if other == layer]
        return self.corrected(i, layer) if any(self.hears(i, p) for p in mine) else None

    def compared(self, i, j, layer):
        """n_j / n_i: on the parameters that both reach, or over the terms that both meet."""

        def met(one, other):
            mine = [p for p, where in enumerate(self.layers) if where == layer]
            common = [p for p in mine if self.hears(one, p) and self.hears(other, p)]
            return (self.corrected(one, layer) or 0.0) * math.sqrt(sum(self.part(one, p) for p in common))

        if met(i, j) > 0:
            return met(j, i) / met(i, j)
        others = [k for k in range(len(self.terms)) if met(i, k) > 0 and met(j, k) > 0]
        ways = [math.log(met(k, i) / met(i, k) * met(j, k) / met(k, j)) for k in others]
        return math.exp(sum(ways) / len(ways)) if ways else None

    def ratio(self, i, layer, anchor):
        """n_anchor / n_i."""
        every = range(len(self.terms))
        index = None if anchor in ("mean", "max") else 0 if anchor == "first" else self.terms.index(anchor)
        pairs = [(j, k) for j in every for k in every]
        joined = self.remembered(layer, lambda: {pair: self.compared(*pair, layer) for pair in pairs})
        if index is not None and joined[i, index] is not None:
            return joined[i, index]
        counted = [j for j, term in enumerate(self.terms) if self.importance.get(term, 1.0) > 0 and joined[i, j]]

        def mean(one):
            logs = [math.log(joined[one, j]) for j in counted]
            return sum(logs) / len(logs) if logs else -math.inf

        if anchor == "max":
            return math.exp(mean(i) - min(map(mean, counted))) if counted else 0.0
        return math.exp(mean(i))

    def balance_weight(self, i, layer):
        anchor = "first" if self.anchor in ("unit", None) else self.anchor
        ratio = self.ratio(i, layer, anchor) if self.heard(i, layer) else 0.0
        return 1 / ratio if ratio > 0 else math.nan

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
        self.memory.clear()
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
            squares = {p: float((full[i][p] ** 2).sum()) for p in mine}
            norm = math.sqrt(sum(squares.values()))
            parts = {p: square / norm**2 if norm > 0 else 0.0 for p, square in squares.items()}
            if self.n[i, layer] is None:
                if norm == 0:
                    continue
                start = {"first": norm, "unbiased": 0.0, "one": 1.0}[self.norm_init]
                self.n[i, layer] = start
                self.history[i, layer] = start, {p: start * part for p, part in parts.items()}
            self.n[i, layer] = beta3 * self.n[i, layer] + (1 - beta3) * norm
            self.n_count[i, layer] += 1
            mass, before = self.history[i, layer]
            joined = {p: beta3 * before[p] + (1 - beta3) * norm * part for p, part in parts.items()}
            self.history[i, layer] = beta3 * mass + (1 - beta3) * norm, joined

    def new_scale(self, i, term, layer):
        importance = self.importance.get(term, 1.0)
        if self.anchor is None:
            return importance
        if not self.heard(i, layer):
            return 0.0
        unit = self.anchor == "unit"
        ratio = 1 / self.heard(i, layer) if unit else self.ratio(i, layer, self.anchor)
        return importance * min(ratio, self.max_scale)

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
            elif np.any(full[i] != 0) and self.heard(i, self.layers[p]):
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
            self.note_rounding(p, balanced, np.sqrt(hat) + self.eps)
        elif reaching:
            stack = np.stack(list(hats.values()))
            hat = stack.max(0) if self.denominator == "max" else stack.mean(0)
            total = sum(self.m[i][p] for i in reaching) / (1 - beta1 ** self.shared_clock[p])
            step = total / (np.sqrt(hat) + self.eps)
        if self.update == "mean" and reaching:
            step = step / len(reaching)
        self.parameters[p] = self.parameters[p] * (1 - self.lr[p] * self.weight_decay[p]) - self.lr[p] * step

    def note_rounding(self, p, balanced, denominator):
        """How far another implementation may be from this one where balanced gradients cancel.

        Two opposed terms that reach a layer of one element for the first time have balanced gradients x and -x there:
        each has the norm of the anchor, one element. With ``denominator="sum"`` nothing of them but rounding is left,
        and divided by little more than eps. Each term is the result of some operations, and their sum is right to
        4 EPSILON sum_i |g~_i|. So the step is right to lr times this over the denominator: next to nothing elsewhere.
        """
        self.rounding[p] = self.rounding[p] + self.lr[p] * 4 * EPSILON * sum(map(np.abs, balanced)) / denominator
