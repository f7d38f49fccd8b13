from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load
from torch import nn
from torch.utils.data import TensorDataset

from fedcore.config.run import RunConfig
from fedcore.errors import DataError, InvalidUpdate, TaskError
from fedcore.task.definition import Task
from fedcore.task.model import (
    FullModel,
    Standardise,
    build_model,
    checkpoint_bytes,
    load_checkpoint,
    load_preprocess,
    preprocess_bytes,
    standardise_of,
    warm_start,
)
from fedcore.updates.pack import pack

EMPTY: Any = TensorDataset(torch.zeros(1, 4), torch.zeros(1, dtype=torch.long))


class Halve(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x / 2


def make_task(**changed: Any) -> Task:
    values: dict[str, Any] = {
        "name": "tiny",
        "kind": "classification",
        "model": lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)),
        "clients": lambda folder: ["anna"],
        "client_data": lambda client, folder: EMPTY,
        "test_data": lambda folder: EMPTY,
        "example_input": torch.zeros(4),
    }
    return Task(**values | changed)


def make_run(**changed: Any) -> RunConfig:
    return RunConfig.model_validate({"name": "run", "task": "task.py"} | changed)


def normalised() -> RunConfig:
    return make_run(federation={"normalisation": "federated"})


def test_the_seed_fixes_the_first_weights_and_no_global_state_moves() -> None:
    states = random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state()  # type: ignore[union-attr]
    one, again, other = (pack(build_model(make_task(), make_run(seed=s)).model) for s in (1, 1, 2))
    assert one.tobytes() == again.tobytes()
    assert one.tobytes() != other.tobytes()
    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tobytes() == states[1]  # type: ignore[union-attr]
    assert torch.equal(torch.get_rng_state(), states[2])


def test_the_model_stands_behind_its_preprocessing() -> None:
    model = build_model(make_task(preprocess=Halve), make_run())
    x = torch.randn(5, 4)
    assert torch.equal(model(x), model.model(x / 2))


def test_normalisation_comes_behind_the_tasks_own_preprocessing() -> None:
    model = build_model(make_task(preprocess=Halve), normalised())
    part = standardise_of(model)
    assert part.mean.shape == part.deviation.shape == (4,)
    part.mean.fill_(1.0)
    part.deviation.fill_(0.5)
    x = torch.randn(5, 4)
    assert torch.equal(model.preprocess(x), (x / 2 - 1.0) / 0.5)
    assert list(model.preprocess.parameters()) == []


@pytest.mark.parametrize(
    ("task", "run", "said"),
    [
        (make_task(model=lambda: 1 / 0), make_run(), "building the model failed: ZeroDivisionErr"),
        (make_task(model=nn.ReLU), make_run(), "the model has no trainable parameters"),
        (
            make_task(model=lambda: nn.Linear(4, 3).requires_grad_(False)),
            make_run(),
            "the model has no trainable parameters",
        ),
        (
            make_task(preprocess=lambda: nn.Linear(4, 4)),
            make_run(),
            "preprocess has parameters, which would be trained",
        ),
        (
            make_task(example_input=torch.zeros(4, dtype=torch.long)),
            normalised(),
            r"inputs of dtype torch\.int64 cannot be normalised",
        ),
    ],
)
def test_a_task_that_makes_no_model_is_refused(task: Task, run: RunConfig, said: str) -> None:
    with pytest.raises(TaskError, match=rf"task 'tiny': .*{said}.* Nothing was run"):
        build_model(task, run)


def test_preprocessing_travels_as_bytes() -> None:
    one, other = (build_model(make_task(), normalised()) for _ in range(2))
    standardise_of(one).mean.copy_(torch.arange(4.0))
    load_preprocess(preprocess_bytes(one), other)
    assert torch.equal(standardise_of(other).mean, torch.arange(4.0))


def test_preprocessing_without_state_travels_as_nothing() -> None:
    model = build_model(make_task(), make_run())
    assert preprocess_bytes(model) == b""
    load_preprocess(b"", model)


def test_preprocessing_of_another_task_is_refused() -> None:
    stateful, plain = build_model(make_task(), normalised()), build_model(make_task(), make_run())
    wider = FullModel(nn.Sequential(nn.Identity(), Standardise(torch.Size([9]))), nn.Linear(9, 1))
    for raw, model in (
        (preprocess_bytes(stateful), plain),
        (b"", stateful),
        (b"no safetensors", stateful),
        (preprocess_bytes(wider), stateful),
    ):
        with pytest.raises(
            InvalidUpdate, match="the values that the server sent do not fit this task"
        ):
            load_preprocess(raw, model)


def test_a_checkpoint_holds_every_weight_and_buffer() -> None:
    model = build_model(make_task(), normalised())
    raw = checkpoint_bytes(model)
    assert set(load(raw)) == set(model.state_dict())
    other = build_model(make_task(), make_run(seed=9, federation={"normalisation": "federated"}))
    load_checkpoint(raw, other, where="here")
    assert checkpoint_bytes(other) == raw


def test_a_checkpoint_of_tied_weights_is_read_back() -> None:
    def tied() -> nn.Module:
        first, second = nn.Linear(3, 3), nn.Linear(3, 3)
        second.weight = first.weight
        return nn.Sequential(first, second)

    one, other = tied(), tied()
    load_checkpoint(checkpoint_bytes(one), other, where="here")
    assert pack(one).tobytes() == pack(other).tobytes()


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b"", "not a safetensors checkpoint"),
        (b"\x80\x04pickle", "not a safetensors checkpoint"),
        (checkpoint_bytes(nn.Linear(2, 1))[:-1], "not a safetensors checkpoint"),
        (checkpoint_bytes(nn.Linear(3, 1)), r"other shapes \['weight'\]"),
        (checkpoint_bytes(nn.Linear(2, 1, bias=False)), r"missing \['bias'\]"),
        (
            checkpoint_bytes(nn.Sequential(nn.Linear(2, 1))),
            r"missing \['bias', 'weight'\], extra \['0\.bias', '0\.weight'\]",
        ),
    ],
    ids=["empty", "pickle", "cut short", "other shape", "missing", "other names"],
)
def test_a_checkpoint_that_does_not_fit_is_refused_and_changes_nothing(
    raw: bytes, said: str
) -> None:
    model = nn.Linear(2, 1)
    before = checkpoint_bytes(model)
    with pytest.raises(DataError, match=f"start.safetensors: .*{said}.* Nothing was run"):
        load_checkpoint(raw, model, where="start.safetensors")
    assert checkpoint_bytes(model) == before


def test_a_run_starts_from_the_checkpoint_that_it_names(tmp_path: Path) -> None:
    source = build_model(make_task(), make_run(seed=5))
    (tmp_path / "start.safetensors").write_bytes(checkpoint_bytes(source))
    run = make_run(federation={"initial": "start.safetensors"}).model_copy(
        update={"base": tmp_path}
    )
    model = build_model(make_task(), run)
    warm_start(run, model)
    assert pack(model.model).tobytes() == pack(source.model).tobytes()


def test_a_run_that_names_none_starts_from_its_seed() -> None:
    model = build_model(make_task(), make_run())
    before = pack(model.model)
    warm_start(make_run(), model)
    assert pack(model.model).tobytes() == before.tobytes()


def test_a_missing_checkpoint_is_named(tmp_path: Path) -> None:
    run = make_run(federation={"initial": "gone.safetensors"}).model_copy(update={"base": tmp_path})
    with pytest.raises(
        DataError, match=r"gone\.safetensors: the initial checkpoint does not exist"
    ):
        warm_start(run, build_model(make_task(), run))
