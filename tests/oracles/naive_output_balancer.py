"""EnCodec's balancer on given gradients, in numpy float64, one sample at a time.

Written from section 3.4 of the paper, with norms added up over the samples. It shares nothing with the package.
"""

import numpy as np


class NaiveOutputBalancer:
    def __init__(self, weights, beta):
        self.weights, self.beta = weights, beta
        self.total = dict.fromkeys(weights, 0.0)  # sum of beta^age (1 - beta) norm
        self.fix = dict.fromkeys(weights, 0.0)  # the same of ones

    def combine(self, gradients):
        """``gradients``: term name -> list of arrays [batch, ...], one for each call. The combined gradients."""
        for name, calls in gradients.items():
            norm = sum(np.sqrt((sample**2).sum()) for call in calls for sample in call)
            self.total[name] = self.beta * self.total[name] + (1 - self.beta) * norm
            self.fix[name] = self.beta * self.fix[name] + (1 - self.beta)
        whole = sum(self.weights[name] for name in gradients)
        scale = {n: self.weights[n] / whole / (self.total[n] / self.fix[n]) for n in gradients if self.total[n] > 0}
        calls = range(len(next(iter(gradients.values()))))
        return [sum(scale[name] * gradients[name][call] for name in scale) for call in calls]
