"""Federated averaging, the reference: the next model is the mean of what clients trained.

Source:
    McMahan et al. 2017, arXiv:1602.05629, Algorithm 1 (FederatedAveraging).
"""

from dataclasses import dataclass

from fedcore import Algorithm


@dataclass(frozen=True)
class FederatedAveraging(Algorithm):
    """Gives what ``strategy = "FedAvg"`` gives, written out.

    Weights ``w``, clients ``k`` with ``n_k`` examples::

        w_{t+1} = sum_k n_k / n * w_k

    The server hands `step` that sum as ``mean``, and adds it up while updates arrive: the algorithm
    folds, so that memory does not grow with the number of clients.
    """

    folds = True

    def step(self, round, weights, mean, state):
        return mean, state
