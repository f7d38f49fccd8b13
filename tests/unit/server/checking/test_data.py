"""What a check says about data: each fault with its client, row and column."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from fedcore.config.run import RunConfig
from fedcore.task.definition import Task
from server.checking.check import CheckStep, _run
from server.checking.clients import look_at_clients
from server.checking.data_steps import (
    look_at_client_data,
    look_at_cloud_data,
    look_at_test_data,
    make_model,
    name_clients,
)
from server.checking.findings import CheckFinding, Place
from server.checking.looking import Expected
from server.checking.progress import StepProgress
from server.checking.selection import Asked
from server.checking.state import CheckState

NAMES = tuple(f"site-{number}" for number in range(8))


def rows_of(name: str, count: int = 40) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(sum(map(ord, name)))
    return torch.randn(count, 4, generator=rng), torch.randint(3, (count,), generator=rng)


def data(name: str) -> TensorDataset:
    return TensorDataset(*rows_of(name))


class Rows(Dataset[Any]):
    """Examples that are made when they are read, and may fail then."""

    def __init__(self, count: int, make: Callable[[int], Any]) -> None:
        self._count, self._make = count, make

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, row: int) -> Any:
        return self._make(row)


def looked(
    changed: Mapping[str, Any] | None = None,
    *,
    clients: Asked = None,
    place: Place = "simulation",
    **fields: Any,
) -> list[CheckFinding]:
    """Findings of the steps that look at data; ``changed`` clients have other data."""
    other = changed or {}
    values: dict[str, Any] = dict(  # noqa: C408
        name="sites",
        kind="classification",
        model=lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)),
        clients=lambda folder: NAMES,
        client_data=lambda name, folder: other[name] if name in other else data(name),
        cloud_data=lambda folder: data("cloud"),
        test_data=lambda folder: data("test"),
        example_input=torch.zeros(4),
    )
    task = Task(**{**values, **fields})
    state = CheckState(RunConfig(name="x", task="task.py"), task, place, clients, None, print)
    steps = (name_clients, make_model, look_at_client_data, look_at_cloud_data, look_at_test_data)
    return [
        finding
        for step in steps
        for finding in _run(CheckStep(step.__name__, True, lambda step=step: step(state)))
    ]


def faults(found: list[CheckFinding]) -> list[CheckFinding]:
    return [finding for finding in found if finding.fault is not None]


def with_row(name: str, row: int, column: int, value: float) -> TensorDataset:
    inputs, targets = rows_of(name)
    inputs[row, column] = value
    return TensorDataset(inputs, targets)


def test_data_without_a_fault_give_none() -> None:
    found = looked()
    assert all(finding.ok for finding in found)
    assert "looked at every row of 8 clients" in found[2].detail


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_numbers_that_are_not_finite_are_found_in_any_row(value: float) -> None:
    (fault,) = faults(looked({"site-5": with_row("site-5", 39, 2, value)}))
    assert (fault.client, fault.row, fault.column) == ("site-5", 39, (2,))
    assert fault.required
    assert f"column 2 is {value}, expected a finite number" in fault.detail


def test_every_client_with_a_fault_is_named() -> None:
    odd = {name: with_row(name, 3, 0, float("nan")) for name in NAMES[2:]}
    assert [fault.client for fault in faults(looked(odd))] == list(NAMES[2:])


class FillMissing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        filled = x.clone()
        filled[:, 2] = torch.nan_to_num(x[:, 2])
        return filled


def test_missing_values_are_allowed_where_the_task_takes_them() -> None:
    """The preprocessing fills column 2 alone."""
    taken = looked({"site-1": with_row("site-1", 7, 2, float("nan"))}, preprocess=FillMissing)
    assert faults(taken) == []
    assert "takes NaN at 1 positions" in taken[1].detail
    odd = {"site-1": with_row("site-1", 7, 1, float("nan"))}
    (fault,) = faults(looked(odd, preprocess=FillMissing))
    assert fault.column == (1,)
    odd = {"site-1": with_row("site-1", 7, 2, float("inf"))}
    assert [one.row for one in faults(looked(odd, preprocess=FillMissing))] == [7]


@pytest.mark.parametrize(("value", "said"), [(1e20, "is 1e+20"), (-999.0, "a missing value")])
def test_values_far_from_all_others_are_noted(value: float, said: str) -> None:
    (fault,) = faults(looked({"site-6": with_row("site-6", 11, 3, value)}))
    assert (fault.client, fault.row, fault.column) == ("site-6", 11, (3,))
    assert not fault.required
    assert said in fault.detail


def test_heavy_tails_and_rare_ones_are_not_far() -> None:
    def heavy(name: str) -> TensorDataset:
        inputs, targets = rows_of(name, 400)
        inputs[:, 0] = (2 * inputs[:, 0]).exp()
        inputs[:, 1] = (inputs[:, 1] > 2.3).float()  # a flag that is rarely set
        inputs[:, 2] = 5.0
        return TensorDataset(inputs, targets)

    assert faults(looked({name: heavy(name) for name in NAMES})) == []


def test_a_client_of_another_scale_is_noted() -> None:
    def image(name: str, by: float) -> TensorDataset:
        rng = torch.Generator().manual_seed(sum(map(ord, name)))
        return TensorDataset(torch.rand(20, 4, generator=rng) * by, torch.zeros(20).long())

    odd = {name: image(name, 1.0 if name == "site-2" else 255.0) for name in NAMES}
    (fault,) = faults(looked(odd))
    assert (fault.client, fault.fault, fault.required) == ("site-2", "scale", False)


def test_a_column_in_another_unit_is_noted() -> None:
    inputs, targets = rows_of("site-4")
    inputs[:, 1] *= 1000
    (fault,) = faults(looked({"site-4": TensorDataset(inputs, targets)}))
    assert (fault.client, fault.column) == ("site-4", (1,))
    assert "column 1: numbers are about" in fault.detail


def test_a_client_of_another_dtype_is_refused() -> None:
    """The others give bytes 0 to 255, and one float 0 to 1."""

    def image(name: str) -> TensorDataset:
        pixels = torch.randint(256, (20, 4), dtype=torch.uint8)
        return TensorDataset(pixels / 255 if name == "site-2" else pixels, torch.zeros(20).long())

    class Scale(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.float() / 255

    found = looked(
        {name: image(name) for name in NAMES},
        preprocess=Scale,
        example_input=torch.zeros(4, dtype=torch.uint8),
        cloud_data=None,
        test_data=None,
    )
    (fault,) = faults(found)
    assert (fault.client, fault.required) == ("site-2", True)
    assert "inputs are torch.float32, but example_input" in fault.detail
    assert "they range from 0" in fault.detail


def test_rows_of_another_shape_are_named_within_a_client_and_between() -> None:
    def two_sizes(row: int) -> tuple[Tensor, int]:
        return torch.zeros(5 if row % 3 == 2 else 4), row % 3

    wide = TensorDataset(torch.zeros(6, 5), torch.zeros(6).long())
    found = faults(looked({"site-1": Rows(9, two_sizes), "site-2": wide}))
    assert [(fault.client, fault.row) for fault in found] == [("site-1", 2), ("site-2", 0)]
    assert "row 2, and 2 other rows: inputs are (5,), expected (4,)" in found[0].detail


def test_rows_that_raise_or_are_no_pair_are_named() -> None:
    def make(row: int) -> Any:
        if row == 4:
            raise FileNotFoundError("photo-4.png")
        return (torch.zeros(4), 0, "note") if row == 6 else (torch.zeros(4), 0)

    def named(row: int) -> Any:
        return torch.zeros(4), "low"

    found = faults(looked({"site-3": Rows(8, make), "site-4": Rows(5, named)}))
    assert {(fault.client, fault.row, fault.fault) for fault in found} == {
        ("site-3", 4, "unreadable"),
        ("site-3", 6, "form"),
        ("site-4", 0, "target type"),
    }
    assert "FileNotFoundError: photo-4.png" in found[0].detail


def test_an_empty_client_is_named_and_the_others_are_looked_at() -> None:
    empty = TensorDataset(torch.zeros(0, 4), torch.zeros(0).long())
    odd = {"site-0": empty, "site-7": with_row("site-7", 1, 1, float("nan"))}
    assert [fault.client for fault in faults(looked(odd))] == ["site-0", "site-7"]


def test_tokens_that_the_model_does_not_know_are_named() -> None:
    def tokens(name: str) -> TensorDataset:
        inputs = torch.arange(40).reshape(10, 4) % 12
        if name == "site-6":
            inputs[8, 1] = 12
        return TensorDataset(inputs, torch.zeros(10).long())

    def network() -> nn.Module:
        return nn.Sequential(nn.Embedding(12, 2), nn.Flatten(), nn.Linear(8, 3))

    found = looked(
        {name: tokens(name) for name in NAMES},
        model=network,
        example_input=torch.zeros(4, dtype=torch.long),
        cloud_data=None,
        test_data=None,
    )
    (fault,) = faults(found)
    assert (fault.client, fault.row, fault.required) == ("site-6", 8, True)
    assert "hold 12" in fault.detail


def test_last_batches_of_one_are_noted_under_batch_norm() -> None:
    sizes = {"site-1": 33, "site-2": 1, "site-3": 32}
    odd = {name: TensorDataset(*rows_of(name, count)) for name, count in sizes.items()}
    assert faults(looked(odd)) == []

    def network() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))

    found = faults(looked(odd, model=network))
    assert {fault.client: fault.required for fault in found} == {"site-1": False, "site-2": False}


@pytest.mark.parametrize("where", ["cloud_data", "test_data", "cloud_heldout"])
def test_the_servers_data_are_looked_at_in_full(where: str) -> None:
    found = faults(looked(**{where: lambda folder: with_row("x", 38, 1, float("nan"))}))
    assert [(fault.client, fault.row, fault.column) for fault in found] == [(None, 38, (1,))]


def test_test_data_of_clients_are_looked_at() -> None:
    def own(name: str, folder: object) -> TensorDataset:
        return with_row(name, 5, 0, float("inf")) if name == "site-3" else data(name)

    (fault,) = faults(looked(client_test=own, clients="all"))
    assert (fault.client, fault.row) == ("site-3", 5)


def test_progress_is_told_within_a_client_of_many_rows() -> None:
    """A client's rows may take an hour to read."""
    time_s, told = 0.0, list[str]()

    def slow(row: int) -> tuple[Tensor, int]:
        nonlocal time_s
        time_s += 60.0
        return torch.zeros(4), row % 3

    def clock() -> float:
        return time_s

    task = Task(
        name="slow",
        kind="classification",
        model=lambda: nn.Linear(4, 3),
        clients=lambda folder: ["one"],
        client_data=lambda name, folder: Rows(600, slow),
        test_data=lambda folder: data("test"),
        example_input=torch.zeros(4),
    )
    look_at_clients(
        task,
        None,
        ["one"],
        [0],
        Expected(task, torch.zeros(4, dtype=torch.bool)),
        accepts=lambda inputs: None,
        only=True,
        progress=StepProgress("client data", told.append, clock),
        clock=clock,
    )
    assert len(told) > 1
    assert told[0].startswith("client data: 0 of 1 looked at")


def test_clients_that_are_asked_for_are_the_only_ones_read() -> None:
    read = []

    def load(name: str, folder: object) -> TensorDataset:
        read.append(name)
        return data(name)

    looked(client_data=load, clients=["site-2", "site-5"])
    assert set(read) == {"site-2", "site-5"}
    read.clear()
    looked(client_data=load, clients=3)
    assert len(set(read)) == 3
    assert "site-0" in read


def test_a_server_reads_no_clients_data() -> None:
    def refuse(*arguments: object) -> Any:
        raise AssertionError("a server has no clients' data")

    found = looked(client_data=refuse, place="server")
    assert all(finding.ok for finding in found)
    assert "not checked" in found[0].detail


def test_a_device_reads_its_own_data_alone() -> None:
    def refuse(*arguments: object) -> Any:
        raise FileNotFoundError("elsewhere")

    own = {"site-2": with_row("site-2", 1, 1, float("nan"))}
    fields = dict.fromkeys(("cloud_data", "test_data"), refuse)
    found = looked(own, place="device", clients=["site-2"], **fields)
    assert [(fault.client, fault.row) for fault in faults(found)] == [("site-2", 1)]
    unnamed = looked(place="device")
    assert "give the one client whose data are here" in unnamed[0].detail


def test_a_loader_that_needs_the_data_folder_is_told_its_name() -> None:
    found = looked(client_data=lambda name, folder: data(folder / name))
    (fault,) = faults(found)
    assert fault.fault == "data folder"
    assert "none is set. Nothing was run; set the environment variable FEDCORE_DATA" in fault.detail
