"""Trial of whether two clients that run together each learn from their own examples."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch.utils.data import TensorDataset

from fedcore.config.run import ClientConfig
from fedcore.task.model import FullModel
from fedcore.training.batches import gather
from fedcore.training.per_example.gradient_methods import trainable_parameters
from server.simulation.batched.work import LocalWork, TrainedClients

_PART = 1e-2  # of a gradient; a smaller difference may be rounding
_ROUNDING = 1e-6  # of the weights

Train = Callable[[FullModel, Sequence[LocalWork], ClientConfig, float], TrainedClients]


def confuses_clients(
    train: Train, model: FullModel, sample: LocalWork, settings: ClientConfig
) -> str:
    """Returns why clients that run together do not learn what each does; empty if they do.

    Two clients take one step together, and each by itself. A comparison of whole trainings may not
    show what is wrong: clients of different numbers of steps never run together.

    Args:
        train: Trains clients together.
        model: The global model; not changed.
        sample: A client's data. The first client has its first rows, and the second the same in
            another order, one fewer where there are several.
        settings: The client's settings.
    """
    count = min(sample.size, settings.batch_size)
    first = gather(sample.examples, range(count))
    second = [torch.roll(one, 1, 0)[: max(1, count - 1)] for one in first]
    works = [
        LocalWork(TensorDataset(*data), sample.order, None, sample.layers)  # type: ignore[arg-type]
        for data in (first, second)
    ]
    one_step = ClientConfig(batch_size=settings.batch_size).model_copy(
        update={"learning_rate": 1.0, "device": settings.device}  # so an update is a gradient
    )
    together = train(model, works, one_step, 0.0).weights
    alone = torch.cat([train(model, [one], one_step, 0.0).weights for one in works])
    start = torch.cat([p.detach().flatten() for p in trainable_parameters(model.model).values()])
    gaps, moved = (together - alone).norm(dim=1), (alone - start).norm(dim=1)
    if bool((gaps > _PART * moved + _ROUNDING * start.norm()).any()):
        share = float((gaps / moved).max())
        return (
            "the model confuses the examples of clients that run together (a step differs by "
            f"{share:.2g} of its length)"
        )
    return ""
