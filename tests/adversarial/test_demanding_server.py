"""A server that asks a device for more than its owner allows."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, Context, Message
from torch import Tensor, nn

from fedcore.client_app import client_app
from fedcore.config.owner import OPEN_POLICY, OwnerPolicy
from fedcore.config.run import RunConfig
from fedcore.errors import DeviceError, InvalidUpdate, OwnerLimit
from fedcore.flower.identity import assume_identity
from fedcore.privacy.ledger import read_ledger
from fedcore.seeds import SystemEntropy
from fedcore.task.definition import Task
from fedcore.training.bounds import bounds_of
from fedcore.updates.messages import CONFIG, REFUSED, array_of, read_instruction
from tests.unit.fedcore.clients import (
    COUNT,
    PRIVATE,
    context,
    device_app,
    instruct,
    make_run,
    make_task,
    refused,
)

HARD = {"client": {"epochs": 10_000, "batch_size": 1}}


@pytest.fixture(autouse=True)
def _identity() -> None:
    assume_identity(1)


def ask(
    task: Task, run: RunConfig, owner: OwnerPolicy, *, node: Context | None = None, **more: Any
) -> Message:
    app = device_app(task, run, owner=owner, **more)
    return app(instruct(task, run), node or context())


HIDDEN = "client 'anna': OwnerLimit; the client's log has the details"
"""All that a server hears of an owner's limits."""


@pytest.mark.parametrize("privacy", [None, PRIVATE])
def test_too_many_steps_are_refused_before_they_begin_and_cost_nothing(
    privacy: Any, caplog: pytest.LogCaptureFixture
) -> None:
    run = make_run(**HARD, **({"privacy": privacy} if privacy else {}))
    node, began = context(), time.monotonic()
    reply = ask(make_task(), run, OwnerPolicy(max_round_steps=10_000), node=node)
    assert refused(reply) == HIDDEN
    assert f"asks for {10_000 * COUNT:,} steps" in caplog.text
    assert reply.error.code == REFUSED + DeviceError.exit_code
    assert time.monotonic() - began < 10
    if privacy:
        assert not read_ledger(node).charges


def test_training_ends_when_its_time_is_over(caplog: pytest.LogCaptureFixture) -> None:
    began = time.process_time()  # a busy machine takes longer, but does not compute more
    reply = ask(make_task(), make_run(**HARD), OwnerPolicy(max_round_s=1.0))
    assert refused(reply) == HIDDEN
    assert "the owner's max_round_s (1 s) has passed" in caplog.text
    assert time.process_time() - began < 5


@pytest.mark.parametrize("kind", ["evaluate", "query.statistics"])
def test_whatever_else_is_asked_ends_with_its_time(
    kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    clock = [0.0]

    def stopped() -> str:
        clock[0] += 1
        return "the server is gone"

    run = make_run(federation={"rounds": 1, "holdout": 0.5, "evaluate_cohort": 1})
    app = client_app(
        make_task(),
        run,
        owner=OPEN_POLICY,
        randomness=SystemEntropy(),
        bounds=lambda: bounds_of(OPEN_POLICY, stopped=stopped),
    )
    assert refused(app(instruct(make_task(), run, kind=kind), context())) == HIDDEN
    assert "the server is gone" in caplog.text
    assert clock[0] == 1


def slow(outputs: Tensor, targets: Tensor) -> Tensor:
    time.sleep(0.01)
    return nn.functional.cross_entropy(outputs, targets)


def test_private_training_that_would_take_too_long_is_refused_before_it_is_charged() -> None:
    run = make_run(client={"epochs": 1000, "batch_size": COUNT}, privacy=PRIVATE)
    node, began = context(), time.monotonic()
    reply = ask(make_task(loss=slow), run, OwnerPolicy(max_round_s=10.0), node=node)
    assert refused(reply) == HIDDEN
    assert not read_ledger(node).charges
    assert time.monotonic() - began < 8


def test_what_a_private_client_answers_is_the_same_whenever_it_was_stopped() -> None:
    """Beside the moment of the answer, a server learns nothing of where training was stopped."""
    run = make_run(client={"epochs": 3, "batch_size": COUNT // 4}, privacy=PRIVATE)
    told = set()
    for after in (1, 2, 7):
        steps = [0]

        def stopped(steps: list[int] = steps, after: int = after) -> str | None:
            steps[0] += 1
            return f"stopped after {after}" if steps[0] > after + 2 else None

        node = context()
        bounds = lambda stopped=stopped: bounds_of(OPEN_POLICY, stopped=stopped)  # noqa: E731
        reply = ask(make_task(), run, OPEN_POLICY, node=node, bounds=bounds)
        told.add((reply.error.code, refused(reply)))
        assert len(read_ledger(node).charges) == 1, "what was begun is charged"
    assert told == {(REFUSED + DeviceError.exit_code, HIDDEN)}


def test_the_next_message_begins_with_a_model_of_its_own() -> None:
    stops: list[str | None] = [None, None, "stop"]
    task, run = make_task(), make_run()
    app = client_app(
        task,
        run,
        owner=OPEN_POLICY,
        randomness=SystemEntropy(),
        bounds=lambda: bounds_of(OPEN_POLICY, stopped=lambda: stops.pop(0) if stops else None),
    )
    assert refused(app(instruct(task, run), context())) == HIDDEN
    assert not app(instruct(task, run), context()).has_error()


class Growing(torch.utils.data.Dataset[tuple[Tensor, Tensor]]):
    """Keeps more with every example that is read."""

    def __init__(self) -> None:
        self.kept: list[Tensor] = []

    def __len__(self) -> int:
        return 5000

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        self.kept.append(torch.ones(1 << 18))
        time.sleep(0.002)
        return torch.zeros(6), torch.tensor(row % 3)


def test_training_that_grows_past_the_owners_memory_ends(
    caplog: pytest.LogCaptureFixture,
) -> None:
    task = make_task(client_data=lambda client, folder: Growing())
    owner = OwnerPolicy(max_memory_bytes=100_000_000)
    assert refused(ask(task, make_run(), owner)) == HIDDEN
    assert "max_memory_bytes = 100,000,000" in caplog.text


@pytest.mark.parametrize("number", ["-1", "10000001", "9" * 5000, "nan", "1e3", ""])
def test_a_round_of_no_number_that_there_is_is_refused(number: str) -> None:
    message = instruct(make_task(), make_run())
    message.content.config_records[CONFIG]["server-round"] = number
    with pytest.raises(InvalidUpdate, match="not a valid message of a fedcore server"):
        read_instruction(message.content)


@pytest.mark.parametrize("shape", [(10**12,), (2**40, 2**40), (3,), (0,)])
def test_an_array_whose_header_declares_another_size_is_refused(shape: tuple[int, ...]) -> None:
    array = Array(np.zeros((2, 2), np.float32))
    places = f"{shape}".ljust(6)
    data = array.data.replace(b"(2, 2)", places.encode(), 1)
    grown = len(data) - len(array.data)
    data = data.replace(b" " * (grown + 1), b" ", 1) if grown > 0 else data
    with pytest.raises(InvalidUpdate, match="cannot read"):
        array_of(Array("float32", shape, "numpy.ndarray", data), where="instruction")


def test_the_error_is_one_of_the_devices() -> None:
    assert issubclass(OwnerLimit, DeviceError)
