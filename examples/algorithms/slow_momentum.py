"""SlowMo with a cosine schedule: momentum over rounds whose learning rates differ.

Source:
    Wang et al. 2020, arXiv:1910.00643, Algorithm 1 (SlowMo); Loshchilov and Hutter 2017,
    arXiv:1608.03983, equation 5 (the schedule).
"""

import math
from dataclasses import dataclass

import numpy as np

from fedcore import Algorithm, ClientSettings


@dataclass(frozen=True)
class SlowMomentum(Algorithm):
    """Server-side momentum that does not mix up the scales of rounds.

    Clients take their steps with the rate ``g_t`` of round ``t``, which falls from the run's
    ``client.learning_rate`` to a share of it. What a round moved, over its rate, goes into the
    momentum; FedAvgM adds it up as it is, and early rounds would outweigh late ones::

        u_{t+1} = beta * u_t + (w_t - mean_t) / g_t
        w_{t+1} = w_t - alpha * g_t * u_{t+1}
    """

    beta: float = 0.5
    alpha: float = 1.0
    last_share: float = 0.1
    """The learning rate of the last round, over that of the first."""
    folds = True

    def rate(self, round):
        falling = 0.5 * (1.0 + math.cos(math.pi * round.progress))
        return round.client.learning_rate * (self.last_share + (1.0 - self.last_share) * falling)

    def initial(self, weights):
        return {"momentum": np.zeros_like(weights)}

    def configure(self, round, clients, state):
        return ClientSettings(learning_rate=self.rate(round))

    def step(self, round, weights, mean, state):
        rate = self.rate(round)
        momentum = self.beta * state["momentum"] + (weights - mean) / rate
        return weights - self.alpha * rate * momentum, {"momentum": momentum}
