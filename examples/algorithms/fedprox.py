"""FedProx: clients are held near the model that they were sent.

Source:
    Li et al. 2020, arXiv:1812.06127, Algorithm 2; the penalty is its equation 2.
"""

from dataclasses import dataclass

from fedcore import Algorithm, ClientSettings


@dataclass(frozen=True)
class Proximal(Algorithm):
    """Gives what ``strategy = "FedProx"`` gives, written out.

    Client ``k`` minimises its own loss ``F_k`` and a penalty on the distance to the weights ``w_t``
    of the round::

        h_k(w) = F_k(w) + mu / 2 * ||w - w_t||^2

    The term is part of local training in fedcore: ``proximal_mu`` is its weight, and 0 leaves it
    out. Clients whose data are far from everybody's drift less in many local steps.
    """

    mu: float = 0.1
    """Weight of the penalty, from 0 to 1e6."""
    folds = True

    def configure(self, round, clients, state):
        return ClientSettings(proximal_mu=self.mu)

    def step(self, round, weights, mean, state):
        return mean, state
