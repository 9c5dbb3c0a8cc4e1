"""AdaTask with Adam in numpy float64: every term has an Adam of its own, and their steps are added up.

Written from Yang et al. 2023 (AAAI). It shares nothing with the package.
"""

import numpy as np


class NaiveAdaTask:
    def __init__(self, parameters, terms, lr=1e-3, betas=(0.9, 0.999), eps=1e-8):
        self.parameters = [np.array(p, dtype=np.float64) for p in parameters]
        self.lr, self.betas, self.eps, self.t = lr, betas, eps, 0
        self.m, self.v = ({t: [np.zeros_like(p) for p in self.parameters] for t in terms} for _ in range(2))

    def step(self, gradients):
        """``gradients``: term name -> an array per parameter."""
        self.t += 1
        beta1, beta2 = self.betas
        for index in range(len(self.parameters)):
            step = np.zeros_like(self.parameters[index])
            for term, found in gradients.items():
                m, v = self.m[term], self.v[term]
                m[index] = beta1 * m[index] + (1 - beta1) * found[index]
                v[index] = beta2 * v[index] + (1 - beta2) * found[index] ** 2
                m_hat, v_hat = m[index] / (1 - beta1**self.t), v[index] / (1 - beta2**self.t)
                step = step + m_hat / (np.sqrt(v_hat) + self.eps)
            self.parameters[index] = self.parameters[index] - self.lr * step
