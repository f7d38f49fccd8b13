"""What can be known before a run begins ends it before anything is replaced."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from fedcore import Task
from fedcore.config.owner import OPEN_POLICY, OwnerPolicy
from fedcore.config.run import RunConfig
from fedcore.errors import (
    ConfigError,
    DataError,
    FedcoreError,
    PrivacyError,
    ReleaseError,
    TaskError,
    UnsupportedLayer,
)
from fedcore.task.definition import Examples
from server.preflight import prepare, training_clients
from server.release.publish import initialise


def examples(width: int = 4) -> Examples:
    return TensorDataset(torch.zeros(6, width), torch.zeros(6).long())  # type: ignore[return-value]


TASK = Task(
    name="tiny",
    kind="classification",
    model=lambda: nn.Linear(4, 2),
    clients=lambda folder: ["a", "b"],
    client_data=lambda client, folder: examples(),
    cloud_data=lambda folder: examples(),
    test_data=lambda folder: examples(),
    example_input=torch.zeros(4),
)


def run_of(**sections: Any) -> RunConfig:
    return RunConfig.model_validate({"name": "tiny", "task": "task.py", **sections})


def test_a_run_that_can_begin_is_prepared(tmp_path: Path) -> None:
    prepared = prepare(run_of(), TASK, OPEN_POLICY, tmp_path)
    assert list(prepared.clients) == ["a", "b"]
    assert prepared.cloud is not None


def leave() -> None:
    raise SystemExit(0)


@pytest.mark.parametrize(
    ("sections", "change", "error", "said"),
    [
        ({"federation": {"strategy": "Foo"}}, {}, ConfigError, "no such strategy"),
        ({"federation": {"strategy": "FedXgbBagging"}}, {}, ConfigError, "XGBoost"),
        ({"federation": {"cohort": 3}}, {}, ConfigError, "2 clients"),
        ({"federation": {"initial": "gone.safetensors"}}, {}, DataError, "gone"),
        ({"client": {"device": "mps"}}, {}, ConfigError, "no such device"),
        ({}, {"example_input": torch.zeros(5)}, TaskError, "example_input"),
        ({}, {"example_input": torch.zeros(4).double()}, TaskError, "float64"),
        ({}, {"cloud_data": lambda folder: examples(3)}, TaskError, "cloud data"),
        ({}, {"clients": lambda folder: leave()}, DataError, "SystemExit"),
        (
            {},
            {"clients": lambda folder: ["a", 7]},
            DataError,
            "clients\\(\\) returned 7 of type int",
        ),
        ({}, {"test_data": lambda folder: leave()}, DataError, "SystemExit"),
        (
            {"privacy": {"unit": "example"}},
            {"model": lambda: nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2))},
            UnsupportedLayer,
            "BatchNorm1d",
        ),
    ],
)
def test_what_would_fail_later_is_refused(
    sections: dict[str, Any],
    change: dict[str, Any],
    error: type[FedcoreError],
    said: str,
    tmp_path: Path,
) -> None:
    with pytest.raises(error, match=said):
        prepare(run_of(**sections), replace(TASK, **change), OPEN_POLICY, tmp_path)


def test_an_owner_with_a_budget_takes_no_part_without_privacy(tmp_path: Path) -> None:
    owner = OwnerPolicy(max_epsilon=0.5)
    with pytest.raises(PrivacyError, match="does not take part"):
        prepare(run_of(), TASK, owner, tmp_path)
    private = run_of(privacy={"unit": "example"})
    assert prepare(private, TASK, owner, tmp_path).clients


def test_a_checkpoint_among_the_results_that_would_be_replaced_is_refused(tmp_path: Path) -> None:
    inside = tmp_path / "global.safetensors"
    inside.write_bytes(b"")
    with pytest.raises(ConfigError, match="would replace"):
        prepare(run_of(federation={"initial": str(inside)}), TASK, OPEN_POLICY, tmp_path)


Spoil = Callable[[Path], dict[str, Any]]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda folder: {"repository": str(folder / "gone")},
        lambda folder: {"keys": str(folder / "gone")},
        lambda folder: {"model": "another"},
    ],
    ids=["repository", "keys", "name"],
)
def test_a_release_that_could_not_be_published_is_refused(spoil: Spoil, tmp_path: Path) -> None:
    keys, repository = tmp_path / "keys", tmp_path / "repository"
    initialise(repository, keys, models=["tiny"], now=datetime.now(UTC))
    release = {"keys": str(keys), "repository": str(repository)}
    assert prepare(run_of(release=release), TASK, OPEN_POLICY, tmp_path / "run").clients
    with pytest.raises(ReleaseError):
        prepare(run_of(release=release | spoil(tmp_path)), TASK, OPEN_POLICY, tmp_path / "run")


def test_a_run_with_too_few_judges_is_refused_before_it_begins(tmp_path: Path) -> None:
    apart = {"evaluate_cohort": 2, "holdout": 0.3, "holdout_by": "clients"}
    with pytest.raises(ConfigError, match="0 of 2 clients hold back all of their data"):
        prepare(run_of(federation=apart), TASK, OPEN_POLICY, tmp_path)
    names = [f"client-{number}" for number in range(8)]  # three of them judge
    task = replace(TASK, clients=lambda folder: names)
    more = apart | {"holdout": 0.45}
    assert prepare(run_of(federation=more), task, OPEN_POLICY, tmp_path).clients == names
    with pytest.raises(ConfigError, match=r"the 5 others are fewer than federation\.cohort = 6"):
        prepare(run_of(federation=more | {"cohort": 6}), task, OPEN_POLICY, tmp_path)


def test_an_algorithm_is_tried_on_clients_that_train() -> None:
    names = [f"client-{number}" for number in range(8)]
    apart = {"evaluate_cohort": 2, "holdout": 0.45, "holdout_by": "clients"}
    run = run_of(federation=apart)
    assert training_clients(run, names, most=4) == ["client-0", "client-1", "client-2", "client-4"]
    assert training_clients(run_of(), names, most=2) == ["client-0", "client-1"]
