"""Apple's pfl: federated averaging on its simulated backend, one process, all threads."""

from __future__ import annotations

import itertools
import logging
from typing import Any

import numpy as np
import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByDatapoints
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.pytorch import PyTorchTensorDataset
from pfl.hyperparam import NNTrainHyperParams
from pfl.metrics import Metrics, Weighted
from pfl.model.pytorch import PyTorchModel
from torch import Tensor, nn

from benchmarks.peers.bare import fastest
from benchmarks.peers.common import Result, answer, cohorts, now_s, read_request
from benchmarks.peers.torch_data import accuracy, load, make_model


class Trained(nn.Module):
    """A model with the two functions that pfl asks for."""

    def __init__(self, inner: nn.Module) -> None:
        """Wraps ``inner``."""
        super().__init__()
        self.inner = inner

    def forward(self, images: Tensor) -> Tensor:
        """The model's outputs."""
        return self.inner(images)

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """The mean loss over a batch."""
        return nn.functional.cross_entropy(self(images), labels)

    def metrics(self, images: Tensor, labels: Tensor) -> dict[str, Any]:
        """What pfl evaluates in the first round, which is not timed."""
        return {"loss": Weighted(self.loss(images, labels).item() * len(labels), len(labels))}


class Clock(TrainingProcessCallback):
    """Notes when each round ends."""

    def __init__(self) -> None:
        """Begins with none."""
        self.ends_s: list[float] = []

    def after_central_iteration(
        self, aggregate_metrics: Metrics, model: PyTorchModel, *, central_iteration: int
    ) -> tuple[bool, Metrics]:
        """A round is over."""
        self.ends_s.append(now_s())
        return False, Metrics()


def main() -> None:
    """Runs the workload with the thread count and memory format that are quickest here."""
    logging.disable(logging.INFO)
    request = read_request()
    workload, partition = request.workload, load(request.data)
    np.random.seed(request.seed)
    inner = make_model(workload, request.seed)
    threads, layout = fastest(inner, partition, request)
    torch.set_num_threads(threads)
    inner.to(memory_format=layout)
    module = Trained(inner)
    model = PyTorchModel(
        module,
        local_optimizer_create=torch.optim.SGD,
        central_optimizer=torch.optim.SGD(module.parameters(), lr=1.0),
    )
    order = itertools.chain.from_iterable(cohorts(request, partition.clients))
    users = [  # built once: pfl keeps each one's batches from one round to the next
        PyTorchTensorDataset(partition.of(client), user_id=str(client))
        for client in range(partition.clients)
    ]
    data = FederatedDataset(users.__getitem__, lambda: next(order))
    first = FederatedDataset(users.__getitem__, lambda: 0)
    clock = Clock()
    FederatedAveraging().run(
        algorithm_params=NNAlgorithmParams(
            central_num_iterations=request.rounds,
            evaluation_frequency=request.rounds,
            train_cohort_size=workload.cohort,
            val_cohort_size=1,
        ),
        backend=SimulatedBackend(data, first, postprocessors=[WeightByDatapoints()]),
        model=model,
        model_train_params=NNTrainHyperParams(
            local_num_epochs=workload.epochs,
            local_learning_rate=workload.learning_rate,
            local_batch_size=workload.batch_size,
        ),
        callbacks=[clock],
        send_metrics_to_platform=False,
    )
    answer(
        Result(
            ends_s=clock.ends_s,
            accuracy=accuracy(module, partition),
            chosen={"threads": threads, "memory_format": str(layout)},
        )
    )


if __name__ == "__main__":
    main()
