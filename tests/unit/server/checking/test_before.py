"""Rows that training could not use are named before a simulation's first round."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset, TensorDataset

import fedcore
from fedcore.config.owner import OPEN_POLICY
from fedcore.config.run import RunConfig
from fedcore.errors import DataError, DataFolderMissing
from fedcore.task.definition import Task
from server.checking.before import refuse_bad_rows
from server.preflight import prepare

NAMES = tuple(f"site-{number}" for number in range(6))
RUN = RunConfig(name="x", task="task.py")
NAN = float("nan")


def good() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(12, 4), torch.zeros(12, dtype=torch.long)


def with_row(row: int, *, input: Any = None, target: int | None = None) -> TensorDataset:
    inputs, targets = good()
    if input is not None:
        inputs[row, 1] = input
    if target is not None:
        targets[row] = target
    return TensorDataset(inputs, targets)


class Rows(Dataset[Any]):
    """Rows that are read one by one."""

    def __init__(self, make: Callable[[int], Any]) -> None:
        self._make = make

    def __len__(self) -> int:
        return 12

    def __getitem__(self, row: int) -> Any:
        return self._make(row)


def task_of(changed: Mapping[str, Any] | None = None, **fields: Any) -> Task:
    other = changed or {}
    task = Task(
        name="sites",
        kind="classification",
        model=lambda: nn.Linear(4, 3),
        clients=lambda folder: NAMES,
        client_data=lambda name, folder: other.get(name, TensorDataset(*good())),
        example_input=torch.zeros(4),
    )
    return replace(task, **fields)


def look(task: Task) -> None:
    refuse_bad_rows(RUN, task, prepare(RUN, task, OPEN_POLICY, Path("none")), print)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (with_row(7, input=NAN), r"client 'site-4', row 7: column 1 is nan, expected a finite"),
        (with_row(7, target=9), r"client 'site-4', row 7: the target is 9, expected"),
        (TensorDataset(torch.zeros(3, 5), torch.zeros(3).long()), r"row 0.*inputs are \(5,\)"),
        (Rows(lambda row: (torch.zeros(4 + row // 11), 0)), r"'site-4', row 11: inputs are \(5,\)"),
        (Rows(lambda row: (torch.zeros(4), "cat")), r"'site-4', row 0.*put the names in the task"),
        (Rows(lambda row: (torch.zeros(4), [0, 1][row // 11 * 2])), r"row 11: .*IndexE"),
    ],
    ids=["nan", "label", "width", "width of one row", "text", "unreadable row"],
)
def test_a_row_that_training_cannot_use_is_named(data: Any, said: str) -> None:
    with pytest.raises(DataError, match=said):
        look(task_of({"site-4": data}))


@pytest.mark.parametrize("field", ["cloud_data", "cloud_heldout", "test_data"])
def test_rows_of_the_servers_data_are_looked_at(field: str) -> None:
    fields = {"cloud_data": lambda folder: TensorDataset(*good())}
    fields[field] = lambda folder: with_row(9, input=NAN)
    said = {"cloud_data": "cloud data", "test_data": "test data"}.get(field, "held-out cloud data")
    with pytest.raises(DataError, match=rf"'sites': {said}, row 9: column 1 is nan"):
        look(task_of(**fields))


def test_rows_of_clients_test_data_are_looked_at() -> None:
    def own(name: str, folder: Path | None) -> TensorDataset:
        return with_row(3, target=-4) if name == "site-2" else TensorDataset(*good())

    with pytest.raises(DataError, match="test data of client 'site-2': row 3: the target is -4"):
        look(task_of(client_test=own))


class Filled(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nan_to_num(x)


def test_nan_that_the_task_fills_is_data() -> None:
    look(task_of({"site-4": with_row(7, input=NAN)}, preprocess=Filled))
    with pytest.raises(DataError, match="column 1 is inf"):
        look(task_of({"site-4": with_row(7, input=torch.inf)}, preprocess=Filled))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool, torch.int64, torch.float16])
def test_inputs_that_training_converts_are_data(dtype: torch.dtype) -> None:
    inputs, targets = good()
    data = TensorDataset(inputs.to(dtype), targets)
    look(task_of({"site-4": data}))
    targets[7] = 9
    with pytest.raises(DataError) as refused:
        look(task_of({"site-4": data}))
    assert "client 'site-4', row 7: the target is 9" in str(refused.value)  # these rows were read
    assert "input" not in str(refused.value)


def test_a_client_that_is_out_of_reach_is_left_to_the_rounds() -> None:
    away = {"site-4": TensorDataset(torch.zeros(0, 4), torch.zeros(0).long())}
    look(task_of(away))
    with pytest.raises(DataError, match="client 'site-5', row 7: the target is 9") as refused:
        look(task_of(away | {"site-5": with_row(7, target=9)}))
    assert "site-4" not in str(refused.value)


@pytest.mark.parametrize(
    "fields",
    [
        {"test_data": lambda folder: Rows(lambda row: (torch.zeros(4), "cat"))},
        {"cloud_data": lambda folder: Rows(lambda row: (torch.zeros(4), "cat"))},
        {"test_data": lambda folder: Rows(lambda row: {"x": torch.zeros(4)})},
        {"client_data": lambda name, folder: None},
        {"client_data": lambda name, folder: Path("gone.csv").read_text()},
    ],
    ids=["text", "text in the cloud", "dict", "none", "no file"],
)
def test_a_message_is_neither_nested_nor_ends_twice(fields: dict[str, Any]) -> None:
    with pytest.raises(DataError) as caught:
        fedcore.simulate(task_of(**fields), progress=False)
    said = str(caught.value)
    assert "DataError" not in said.removeprefix("DataError").partition("First:")[0]
    assert ".." not in said
    assert ".;" not in said


@pytest.mark.parametrize(
    "fields",
    [
        {"clients": lambda folder: [one.name for one in folder.iterdir()]},
        {"client_data": lambda name, folder: (folder / name).read_text()},
        {"client_data": lambda name, folder: Path(f"{folder}/{name}").read_text()},
        {"test_data": lambda folder: (Path(folder) / "test.csv").read_text()},
    ],
    ids=["clients", "path", "text", "test"],
)
def test_a_missing_data_folder_is_said_once(
    fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FEDCORE_DATA", raising=False)
    task = task_of(**fields)
    with pytest.raises(
        DataFolderMissing, match=r"none is set\. Nothing was run; set the env.* FEDC"
    ):
        fedcore.simulate(task, progress=False)
    wrong = [one for one in fedcore.check(task, progress=False).findings if not one.ok]
    assert [(one.fault, one.required) for one in wrong] == [("data folder", True)]


def test_many_faults_are_counted() -> None:
    bad = {name: with_row(1, input=NAN) for name in NAMES}
    with pytest.raises(
        DataError, match=r"'site-4'.* and 1 other fault\. Nothing was run"
    ) as caught:
        look(task_of(bad))
    assert "'site-5'" not in str(caught.value)


def test_simulate_refuses_before_it_replaces_a_run(tmp_path: Path) -> None:
    kept = tmp_path / "sites" / "kept.txt"
    kept.parent.mkdir()
    kept.write_text("an earlier run")
    with pytest.raises(DataError, match="client 'site-4', row 7"):
        fedcore.simulate(
            task_of({"site-4": with_row(7, input=NAN)}), runs=tmp_path, fresh=True, progress=False
        )
    assert [path.name for path in kept.parent.iterdir()] == ["kept.txt"]
