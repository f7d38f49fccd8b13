"""A small task and a client that is asked to train it, for tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from fedcore.client_app import DurableLedger, client_app
from fedcore.config.owner import OPEN_POLICY, OwnerPolicy
from fedcore.config.run import RunConfig
from fedcore.privacy.ledger import NO_OTHER_RUNS
from fedcore.seeds import Simulated, SystemEntropy, torch_rng
from fedcore.task.definition import Task
from fedcore.task.model import build_model, preprocess_bytes
from fedcore.updates.messages import (
    ARRAYS,
    CONFIG,
    EPSILON,
    MODEL,
    REFUSED,
    TRAIN_LOSS,
    UNCLIPPED,
    Update,
    instruction_config,
    weights_record,
)
from fedcore.updates.pack import Vector, layout_of, pack
from fedcore.updates.replies import ArraySpec, Range, ReplySpec, read_reply

COUNT = 40


PRIVATE = {"unit": "example", "target_delta": 1e-3, "max_epsilon": 8.0}


def data(client: str = "anna") -> Any:
    rng = torch_rng(0, client)
    targets = torch.randint(3, (COUNT,), generator=rng)
    inputs = nn.functional.one_hot(targets, 6) + 0.1 * torch.randn(COUNT, 6, generator=rng)
    return TensorDataset(inputs, targets)


def make_task(**changed: Any) -> Task:
    values: dict[str, Any] = {
        "name": "tiny",
        "kind": "classification",
        "model": lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)),
        "clients": lambda folder: ["anna", "ben"],
        "client_data": lambda client, folder: data(client),
        "test_data": lambda folder: data("test"),
        "example_input": torch.zeros(6),
    }
    return Task(**values | changed)


def make_run(**changed: Any) -> RunConfig:
    values = {"name": "run", "task": "task.py", "federation": {"rounds": 3}}
    if "privacy" in changed:  # with every example in every step, noise is found at once
        values |= {"client": {"batch_size": COUNT}}
    return RunConfig.model_validate(values | changed)


def context(name: str = "anna") -> Context:
    return Context(
        run_id=1, node_id=2, node_config={"client": name}, state=RecordDict(), run_config={}
    )


def instruct(
    task: Task, run: RunConfig, *, number: int = 1, mu: float = 0.0, kind: str = "train"
) -> Message:
    model = build_model(task, run)
    config = instruction_config(layout_of(model.model), preprocess_bytes(model))
    config["server-round"] = number
    if mu:
        config["proximal-mu"] = mu
    return Message(RecordDict({ARRAYS: weights_record(pack(model.model)), CONFIG: config}), 2, kind)


def app_of(task: Task, run: RunConfig, owner: OwnerPolicy = OPEN_POLICY) -> ClientApp:
    return client_app(task, run, owner=owner, randomness=Simulated(run.seed))


def device_app(
    task: Task,
    run: RunConfig,
    *,
    owner: OwnerPolicy = OPEN_POLICY,
    keep: Callable[[], None] = lambda: None,
    **more: Any,
) -> ClientApp:
    """As on a device: random numbers of the system, and ``keep`` for what puts charges on disk."""
    durable = DurableLedger(NO_OTHER_RUNS, keep)
    return client_app(task, run, owner=owner, randomness=SystemEntropy(), durable=durable, **more)


def ask(
    task: Task,
    run: RunConfig,
    *,
    owner: OwnerPolicy = OPEN_POLICY,
    node: Context | None = None,
    **asked: Any,
) -> Message:
    return app_of(task, run, owner)(instruct(task, run, **asked), node or context())


def update_of(reply: Message, task: Task, run: RunConfig) -> Update:
    assert not reply.has_error(), reply.error
    layout = layout_of(build_model(task, run).model)
    metrics = dict.fromkeys((TRAIN_LOSS, EPSILON, UNCLIPPED), Range())
    asked = ReplySpec("train", metrics, {MODEL: ArraySpec("float32", (layout.size,))})
    return read_reply(reply, asked, where="update").update()


def refused(reply: Message, code: int = REFUSED) -> str:
    assert reply.has_error()
    assert reply.error.code == code or (code == REFUSED and code < reply.error.code < code + 20)
    return str(reply.error.reason)


def trained(task: Task, run: RunConfig, **asked: Any) -> Vector:
    return update_of(ask(task, run, **asked), task, run).weights


def failing_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    raise OSError("sensor unplugged")


def nan_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return outputs.sum() * float("nan")
