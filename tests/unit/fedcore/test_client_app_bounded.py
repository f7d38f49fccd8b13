"""What a client answers under client-level privacy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from torch import Tensor
from torch.utils.data import TensorDataset

from fedcore.config.run import RunConfig
from fedcore.flower.identity import assume_identity
from fedcore.task.definition import Task
from fedcore.task.model import build_model
from fedcore.updates.messages import CLIP_NORM, CONFIG, Update
from fedcore.updates.pack import pack
from tests.unit.fedcore.test_client_app import (
    app_of,
    ask,
    context,
    data,
    instruct,
    make_run,
    make_task,
    update_of,
)


def client_level(**settings: Any) -> RunConfig:
    return make_run(privacy={"unit": "client", "client": settings})


def bounded_ask(task: Task, run: RunConfig) -> Update:
    assume_identity(1)
    message = instruct(task, run)
    message.content.config_records[CONFIG][CLIP_NORM] = 0.01
    return update_of(app_of(task, run)(message, context()), task, run)


def test_under_client_level_privacy_a_bounded_update_leaves_and_nothing_else() -> None:
    task, run = make_task(), client_level()
    update = bounded_ask(task, run)
    start = pack(build_model(task, run).model)
    assert update.num_examples == 1
    assert update.metrics == {}
    assert 0.00999 < np.linalg.norm(update.weights.astype(np.float64) - start) <= 0.01


def diverges(outputs: Tensor, targets: Tensor) -> Tensor:
    return outputs.sum() * float("nan")


def raising(error: BaseException) -> Any:
    def load(client: str, folder: Any) -> Any:
        raise error

    return load


def unknown_label(client: str, folder: Any) -> Any:
    inputs, targets = data().tensors
    return TensorDataset(inputs, targets + 17)


@pytest.mark.parametrize(
    "broken",
    [
        {"loss": diverges},
        {"client_data": raising(OSError("its disk is gone"))},
        {"client_data": raising(SystemExit(3))},
        {"client_data": unknown_label},
    ],
    ids=["diverges", "unreadable", "exits", "unknown label"],
)
def test_whatever_its_data_are_a_client_answers_and_at_worst_that_nothing_changed(
    broken: dict[str, Any],
) -> None:
    """Were it an error, one client's data would decide whether a round has its quorum."""
    task, run = make_task(**broken), client_level()
    update = bounded_ask(task, run)
    assert update.weights.tolist() == pack(build_model(task, run).model).tolist()


def test_a_server_that_names_no_bound_gets_no_update() -> None:
    task, run = make_task(), client_level()
    assume_identity(1)
    reply = ask(task, run)
    assert reply.has_error()
    assert "contains no bound" in str(reply.error.reason)
