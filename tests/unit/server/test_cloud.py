from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.data import Subset, TensorDataset

from fedcore.config.run import RunConfig
from fedcore.errors import DataError
from fedcore.task.definition import Examples, Task, size_of
from fedcore.training.batches import gather
from server.cloud import CloudData, cloud_data_of, read_cloud_data

ROWS: Any = TensorDataset(torch.arange(50.0).reshape(50, 1), torch.arange(50))


def make_task(**changed: Any) -> Task:
    values: dict[str, Any] = {
        "name": "tiny",
        "kind": "classification",
        "model": lambda: torch.nn.Linear(1, 200),
        "clients": lambda folder: ["anna"],
        "client_data": lambda client, folder: ROWS,
        "test_data": lambda folder: ROWS,
        "example_input": torch.zeros(1),
        "cloud_data": lambda folder: ROWS,
    }
    return Task(**values | changed)


def read(task: Task, *, holdout: float = 0.3, seed: int = 0) -> CloudData:
    cloud = read_cloud_data(task, None, holdout=holdout, seed=seed)
    assert cloud is not None
    return cloud


def rows(examples: Examples) -> set[int]:
    return {int(target) for target in gather(examples, range(size_of(examples)))[1]}


def test_a_task_without_cloud_data_has_none() -> None:
    assert read_cloud_data(make_task(cloud_data=None), None, holdout=0.3, seed=0) is None


def test_the_parts_are_disjoint_and_together_everything() -> None:
    cloud = read(make_task())
    assert size_of(cloud.heldout) == 15
    assert not rows(cloud.train) & rows(cloud.heldout)
    assert rows(cloud.train) | rows(cloud.heldout) == set(range(50))


def test_the_seed_fixes_the_split() -> None:
    one, again, other = (rows(read(make_task(), seed=seed).heldout) for seed in (1, 1, 2))
    assert one == again != other


def test_what_the_task_holds_out_itself_is_taken_whole() -> None:
    judge = TensorDataset(torch.zeros(7, 1), torch.arange(100, 107))
    cloud = read(make_task(cloud_heldout=lambda folder: judge))
    assert rows(cloud.train) == set(range(50))
    assert rows(cloud.heldout) == set(range(100, 107))


@pytest.mark.parametrize("part", ["cloud_data", "cloud_heldout"])
def test_data_that_is_empty_or_cannot_be_read_is_named(part: str) -> None:
    def fails(folder: Any) -> Any:
        raise OSError("no such disk")

    what = "held-out cloud data" if part == "cloud_heldout" else "cloud data"
    with pytest.raises(DataError, match=f"task 'tiny': {what}: reading it failed: OSError: no su"):
        read(make_task(**{part: fails}))
    with pytest.raises(DataError, match=f"task 'tiny': {what}: got no examples"):
        read(make_task(**{part: lambda folder: Subset(ROWS, [])}))


def test_the_folder_reaches_the_loader(tmp_path: Any) -> None:
    seen: list[Any] = []

    def load(folder: Any) -> Any:
        seen.append(folder)
        return ROWS

    read_cloud_data(make_task(cloud_data=load), tmp_path, holdout=0.5, seed=0)
    assert seen == [tmp_path]


@pytest.mark.parametrize("heldout", [None, lambda folder: ROWS])
def test_rounds_that_start_from_fine_tuned_models_are_judged_by_data_of_their_own(
    heldout: Any,
) -> None:
    task = make_task(cloud_heldout=heldout)
    values = {"name": "run", "task": "task.py"}
    plain = RunConfig.model_validate(values)
    every = RunConfig.model_validate({**values, "finetune": {"every": 3}})
    usual, split = cloud_data_of(plain, task, None), cloud_data_of(every, task, None)
    assert usual is not None
    assert split is not None
    assert usual.of_rounds is usual.train
    parts = [rows(each) for each in (split.of_rounds, split.heldout)]
    assert not parts[0] & parts[1]
    assert parts[0] | parts[1] == rows(usual.heldout)
    assert min(map(len, parts)) >= 7
    if heldout is None:
        assert not parts[0] & rows(split.train)
    clients = {"evaluate_cohort": 1, "holdout": 0.3}
    judged = every.model_copy(update={"federation": every.federation.model_copy(update=clients)})
    whole = cloud_data_of(judged, task, None)
    assert whole is not None
    assert rows(whole.heldout) == rows(usual.heldout)
