from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from fedcore.config.run import RunConfig
from fedcore.errors import TrainingError
from fedcore.task.definition import Examples, Task
from fedcore.task.model import build_model
from server.finetune.rehearse import rehearse

RUN = RunConfig(name="x", task="task.py", finetune={"epochs": 2, "batch_size": 4})  # type: ignore[arg-type]


def data(count: int = 9) -> Examples:
    rng = torch.Generator().manual_seed(1)
    inputs = torch.randn(count, 4, generator=rng)
    return TensorDataset(inputs, torch.arange(count) % 3)  # type: ignore[return-value]


def make_task(loss: object = None) -> Task:
    return Task(
        name="tiny",
        kind="classification",
        model=lambda: nn.Linear(4, 3),
        clients=lambda folder: ["anna"],
        client_data=lambda client, folder: data(),
        example_input=torch.zeros(4),
        loss=loss,  # type: ignore[arg-type]
    )


def test_a_rehearsal_leaves_the_model_unchanged() -> None:
    task = make_task()
    model = build_model(task, RUN)
    before = [tensor.clone() for tensor in model.state_dict().values()]
    rehearse(task, RUN, model, data(), processes=2)
    assert all(map(torch.equal, before, model.state_dict().values()))


def test_the_error_of_any_process_is_told() -> None:
    def fails_in_the_second(outputs: Tensor, targets: Tensor) -> Tensor:
        if dist.is_initialized() and dist.get_rank() == 1:
            raise ZeroDivisionError("in the second process")
        return nn.functional.cross_entropy(outputs, targets)

    task = make_task(fails_in_the_second)
    with pytest.raises(TrainingError, match="ZeroDivisionError: in the second process"):
        rehearse(task, RUN, build_model(task, RUN), data(), processes=2)
