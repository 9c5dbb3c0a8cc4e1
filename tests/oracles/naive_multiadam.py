"""MultiAdam in numpy float64: every group of losses has an Adam of its own, and their steps are averaged.

Written from Yao et al. 2023 (arXiv 2306.02816), Algorithm 1. It shares nothing with the package.
"""

import numpy as np


class NaiveMultiAdam:
    def __init__(self, parameters, groups, lr=1e-3, betas=(0.99, 0.99), eps=1e-8):
        self.parameters = [np.array(p, dtype=np.float64) for p in parameters]
        self.lr, self.betas, self.eps, self.t, self.groups = lr, betas, eps, 0, list(groups)
        self.m, self.v = ({g: [np.zeros_like(p) for p in self.parameters] for g in groups} for _ in range(2))

    def step(self, gradients):
        """``gradients``: group -> an array per parameter."""
        self.t += 1
        beta1, beta2 = self.betas
        steps = {group: [] for group in self.groups}
        for group in self.groups:
            for index, g in enumerate(gradients[group]):
                m = beta1 * self.m[group][index] + (1 - beta1) * g
                v = beta2 * self.v[group][index] + (1 - beta2) * g * g
                self.m[group][index], self.v[group][index] = m, v
                steps[group].append((m / (1 - beta1**self.t)) / (np.sqrt(v / (1 - beta2**self.t)) + self.eps))
        for index in range(len(self.parameters)):
            mean = sum(steps[group][index] for group in self.groups) / len(self.groups)
            self.parameters[index] = self.parameters[index] - self.lr * mean
