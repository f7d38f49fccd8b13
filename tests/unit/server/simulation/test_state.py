"""All state of a model takes part in the rounds, as in a plain loop that averages state dicts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fedcore
from fedcore.config.owner import OPEN_POLICY
from fedcore.config.run import RunConfig
from fedcore.errors import TaskError, UnsupportedLayer
from fedcore.task.model import build_model, checkpoint_bytes
from fedcore.updates.pack import layout_of, unpack
from server.preflight import prepare
from server.simulation.workers.sharing import with_shared_frozen
from tests.unit.server.simulation.plain import (
    BATCH,
    CLASSES,
    FEATURES,
    assert_equal,
    federated,
    plain_rounds,
    plain_training,
    run_of,
    task_of,
)

SIZES = {"a": 64, "b": 32, "c": 90, "d": 48}


class FirstBatch(nn.Module):
    """Scale and shift set from the first batch ever, then trained; a flag says whether they are."""

    def __init__(self, flag: torch.dtype) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.ones(FEATURES)), nn.Parameter(torch.zeros(6))
        self.register_buffer("initialised", torch.zeros((), dtype=flag))

    def forward(self, x: Tensor) -> Tensor:
        if self.training and not self.initialised:
            with torch.no_grad():
                self.scale.copy_(1 / x.std(0))
                self.shift.copy_(-x.mean(0) / x.std(0))
                self.initialised.fill_(1)  # type: ignore[operator]
        return x * self.scale + self.shift


class Warm(nn.Module):
    """A temperature that falls with the number of steps, over all rounds and clients."""

    steps: Tensor

    def __init__(self, counter: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros(2, dtype=counter))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.steps += torch.tensor([1, 2], dtype=self.steps.dtype)
        return x / (2 - (self.steps[0] / 100).clamp(max=1))


class OwnCounter(nn.BatchNorm1d):
    """Batch normalisation that reads the counter although it has a momentum."""

    def forward(self, x: Tensor) -> Tensor:
        found = super().forward(x)
        assert self.num_batches_tracked is not None
        return found * (1 + self.num_batches_tracked / 100)


def cumulative() -> nn.Module:
    return nn.Sequential(nn.Linear(FEATURES, 8), nn.BatchNorm1d(8, momentum=None), nn.Linear(8, 3))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "momentum=None": cumulative,
    "flag as uint8": lambda: nn.Sequential(FirstBatch(torch.uint8), nn.Linear(FEATURES, CLASSES)),
    "flag as bool": lambda: nn.Sequential(FirstBatch(torch.bool), nn.Linear(FEATURES, CLASSES)),
    "int64 counter": lambda: nn.Sequential(nn.Linear(FEATURES, CLASSES), Warm(torch.int64)),
    "int16 counter": lambda: nn.Sequential(nn.Linear(FEATURES, CLASSES), Warm(torch.int16)),
    "counter of a subclass": lambda: nn.Sequential(nn.Linear(6, 3), OwnCounter(CLASSES)),
}


@pytest.mark.parametrize("kind", MODELS)
def test_rounds_average_all_state_with_the_bits_of_a_plain_loop(kind: str) -> None:
    task, run = task_of(MODELS[kind], SIZES), run_of()
    found = federated(task, run)
    assert layout_of(found.model.model).integers == 1
    assert_equal(found.model.model, plain_rounds(task, run))


class Adapter(nn.Module):
    """A frozen base that two layers share, and a head that is trained with one of two weights."""

    def __init__(self) -> None:
        super().__init__()
        self.base, self.tied = nn.Linear(FEATURES, FEATURES), nn.Linear(FEATURES, FEATURES)
        self.tied.weight = self.base.weight
        self.base.weight.requires_grad_(False)
        self.head, self.unused = nn.Linear(FEATURES, CLASSES), nn.Linear(FEATURES, CLASSES)
        self.copy = nn.Linear(FEATURES, CLASSES)
        self.copy.weight = self.head.weight

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.tied(torch.tanh(self.base(x))))
        return self.head(hidden) + self.copy(hidden)  # type: ignore[no-any-return]


@pytest.mark.parametrize("initial", [False, True], ids=["built", "federation.initial"])
def test_frozen_tied_and_unused_parameters_have_the_bits_of_a_plain_loop(
    initial: bool, tmp_path: Path
) -> None:
    task, run = task_of(Adapter, SIZES), run_of()
    start = build_model(task, run.model_copy(update={"seed": 5 if initial else run.seed}))
    if initial:
        (tmp_path / "start").write_bytes(checkpoint_bytes(start))
        federation = run.federation.model_copy(update={"initial": "start"})
        run = run.model_copy(update={"federation": federation, "base": tmp_path})
    found = federated(task, run)
    names = ("base.bias", "tied.bias", "head.weight", "head.bias", "unused.weight", "unused.bias")
    assert layout_of(found.model.model).names == (*names, "copy.bias")
    assert_equal(found.model.model, plain_rounds(task, run, start=start.model))
    assert found.model.model.tied.weight is found.model.model.base.weight  # type: ignore[union-attr]
    assert all(record.bytes_up < 4 * 500 for record in found.federated.rounds)
    if not initial:
        settings: dict[str, Any] = {"finetune": {"epochs": 0}, "simulation": {"workers": 2}}
        compression = {"candidates": ["fp32"], "timing_runs": 100}
        alone = replace(task, cloud_data=None)  # with it, the best round would count
        many = fedcore.simulate(alone, run, compression=compression, **settings)
        assert_equal(many.federated.model, plain_rounds(task, run, start=start.model))


def test_models_of_a_machine_share_the_memory_of_frozen_parameters() -> None:
    task = with_shared_frozen(task_of(Adapter, SIZES), run_of())
    one, other = (build_model(task, run_of()).model for _ in range(2))
    assert one.base.weight.data_ptr() == other.tied.weight.data_ptr()  # type: ignore[union-attr,operator]
    assert one.head.weight.data_ptr() != other.head.weight.data_ptr()  # type: ignore[union-attr,operator]
    assert_equal(one, build_model(task_of(Adapter, SIZES), run_of()).model.state_dict())
    plain = task_of(cumulative, SIZES)
    assert with_shared_frozen(plain, run_of()) is plain


def test_a_run_freezes_by_pattern_for_all_who_train() -> None:
    task = task_of(lambda: nn.Sequential(nn.Linear(FEATURES, 4), nn.Linear(4, CLASSES)), SIZES)
    settings: dict[str, Any] = {
        "client": {"batch_size": 16, "frozen": ["0.*"]},
        "compression": {"candidates": ["fp32"], "timing_runs": 100},
        "simulation": {"workers": 2},
    }
    result = fedcore.simulate(task, federation={"rounds": 1}, finetune={"epochs": 1}, **settings)
    start = build_model(task, result.run).model
    for model in (result.federated.model, result.model.model):
        assert torch.equal(model[0].weight, start[0].weight)  # type: ignore[index]
        assert not torch.equal(model[1].weight, start[1].weight)  # type: ignore[index]
    assert result.record.rounds[0].bytes_up < 4 * 500


class Target(nn.Module):
    """A frozen copy that follows the trained weights, as in momentum contrast."""

    def __init__(self) -> None:
        super().__init__()
        self.online, self.target = nn.Linear(FEATURES, CLASSES), nn.Linear(FEATURES, CLASSES)
        self.target.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                self.target.weight.lerp_(self.online.weight, 0.1)
        return self.online(x) + 0 * self.target(x)  # type: ignore[no-any-return]


def test_a_frozen_parameter_that_training_changes_is_named() -> None:
    task = task_of(Target, SIZES)
    with pytest.raises(TaskError, match=r"training has changed target\.weight, although"):
        federated(task, run_of(rounds=1))


def test_an_optimiser_at_the_server_takes_no_step_with_counters_and_flags() -> None:
    def model() -> nn.Module:
        return nn.Sequential(FirstBatch(torch.bool), nn.Linear(FEATURES, 3), Warm(torch.int64))

    task, run = task_of(model, SIZES), run_of(rounds=2, strategy="FedAdam")
    found = federated(task, run).model.model.state_dict()
    expected = plain_rounds(task, run)
    for name in ("0.initialised", "2.steps"):
        assert torch.equal(found[name], expected[name])
    assert not torch.equal(found["1.weight"], expected["1.weight"])


def of_clients(model: Callable[[], nn.Module]) -> tuple[object, RunConfig]:
    client = {"target_delta": 1e-2, "noise_multiplier": 4.0, "max_epsilon": 100.0}
    privacy = {"unit": "client", "client": client}
    run = run_of(cohort=2).model_dump() | {"privacy": privacy}
    return task_of(model, SIZES), RunConfig.model_validate(run)


@pytest.mark.parametrize("kind", ["momentum=None", "flag as bool", "int64 counter"])
def test_client_level_privacy_refuses_integers_that_training_changes(
    kind: str, tmp_path: object
) -> None:
    task, run = of_clients(MODELS[kind])
    with pytest.raises(UnsupportedLayer, match=r"client-level privacy does not support \S+"):
        prepare(run, task, OPEN_POLICY, tmp_path)  # type: ignore[arg-type]


class Positions(nn.Module):
    """Integers that never change, as part of the state."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("order", torch.arange(FEATURES - 1, -1, -1))
        self.linear = nn.Linear(FEATURES, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x[:, self.order])  # type: ignore[index]


def test_client_level_noise_leaves_constant_integers_alone() -> None:
    task, run = of_clients(Positions)
    found = federated(task, run).model.model  # type: ignore[arg-type]
    assert found.order.tolist() == [5, 4, 3, 2, 1, 0]  # type: ignore[union-attr,operator]
    before = build_model(task, run).model.linear  # type: ignore[arg-type]
    assert not torch.equal(found.linear.weight, before.weight)  # type: ignore[union-attr]


ODD = {"even": 4 * BATCH, "one over": 2 * BATCH + 1, "again": BATCH + 1, "single": 1}


def normalised() -> nn.Module:
    return nn.Sequential(nn.Linear(FEATURES, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


def test_clients_with_a_last_batch_of_one_train_where_layers_need_two() -> None:
    """A last row joins the batch before; a client of one row uses running statistics."""

    def train(
        model: nn.Module, inputs: Tensor, targets: Tensor, rng: torch.Generator, run: RunConfig
    ) -> None:
        if len(inputs) > 1:
            plain_training(model, inputs, targets, rng, run)
            return
        optimizer = torch.optim.SGD(model.parameters(), lr=run.client.learning_rate)
        for _ in range(run.client.epochs):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model.eval()(inputs), targets).backward()
            optimizer.step()

    task, run = task_of(normalised, ODD), run_of()
    found = federated(task, run)
    assert [record.failed for record in found.federated.rounds] == [0, 0, 0]
    state = plain_rounds(task, run, train)
    model = build_model(task, run).model
    layout = layout_of(model)
    assert layout.integers == 0  # the counter of batches is not read
    unpack(found.federated.weights, model)
    counter = {"1.num_batches_tracked": torch.tensor(0)}
    assert_equal(model, {**state, **counter})
    assert found.federated.weights.dtype == np.float32


def test_a_client_of_one_row_is_named_where_there_are_no_running_statistics() -> None:
    def model() -> nn.Module:
        return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8, track_running_stats=False))

    task, run = task_of(model, {"single": 1, **SIZES}), run_of(rounds=1)
    with pytest.raises(Exception, match="quorum") as raised:
        federated(task, RunConfig.model_validate(run.model_dump() | {"federation": {"quorum": 1}}))
    assert "client 'single'" in str(raised.value)
    assert "1 (BatchNorm1d)" in str(raised.value)
