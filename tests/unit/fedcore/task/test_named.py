"""Several inputs by name: they train, are protected and judged as one tensor would be."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset, TensorDataset

import fedcore
from fedcore.config.run import RunConfig
from fedcore.errors import DataError, TaskError
from fedcore.task.definition import Task
from fedcore.task.model import build_model
from fedcore.task.named import NamedInputs
from fedcore.training.batches import gather_all
from fedcore.training.examples import task_examples

NAMES = ("anna", "ben", "cleo")
EXAMPLE = {
    "image": torch.zeros(2, 3),
    "age": torch.zeros(()),
    "words": torch.zeros(4, dtype=torch.long),
}
Named = Mapping[str, Tensor]


class Rows(Dataset[Any]):
    """Pairs of a dictionary and a target."""

    def __init__(self, name: str, change: Callable[[int, dict[str, Any]], None] | None = None):
        rng = torch.Generator().manual_seed(sum(map(ord, name)))
        self.image = torch.randn(12, 2, 3, generator=rng)
        self.age = torch.randn(12, generator=rng)
        self.words = torch.randint(9, (12, 4), generator=rng)
        self.change = change

    def __len__(self) -> int:
        return 12

    def __getitem__(self, row: int) -> Any:
        values: dict[str, Any] = {
            "words": self.words[row],
            "image": self.image[row],
            "age": self.age[row],
        }
        if self.change:
            self.change(row, values)
        return values, int(self.age[row] > 0)


class Network(nn.Module):
    """Takes the dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(9, 2)
        self.head = nn.Linear(6 + 1 + 2, 2)

    def forward(self, x: Named) -> Tensor:
        assert x["words"].dtype == torch.long
        parts = [x["image"].flatten(1), x["age"][:, None], self.words(x["words"]).mean(dim=1)]
        return self.head(torch.cat(parts, dim=1))


class Flat(nn.Module):
    """The same network, for a vector."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(9, 2)
        self.head = nn.Linear(6 + 1 + 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.cat([x[:, :7].float(), self.words(x[:, 7:].long()).mean(1)], dim=1))


class Flattened(Dataset[Any]):
    def __init__(self, rows: Rows) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> Any:
        x, target = self.rows[row]
        parts = [x["image"].flatten(), x["age"][None], x["words"]]
        return torch.cat([part.double() for part in parts]), target


def named(**fields: Any) -> Task:
    task = Task(
        name="named",
        kind="classification",
        model=Network,
        clients=lambda folder: NAMES,
        client_data=lambda name, folder: Rows(name),
        cloud_data=lambda folder: Rows("cloud"),
        test_data=lambda folder: Rows("test"),
        example_input=EXAMPLE,  # type: ignore[arg-type]
    )
    return replace(task, **fields)


def flat() -> Task:
    return Task(
        name="named",
        kind="classification",
        model=Flat,
        clients=lambda folder: NAMES,
        client_data=lambda name, folder: Flattened(Rows(name)),
        cloud_data=lambda folder: Flattened(Rows("cloud")),
        test_data=lambda folder: Flattened(Rows("test")),
        example_input=torch.zeros(11, dtype=torch.float64),
    )


def run(task: Task, how: str, **settings: Any) -> Any:
    return fedcore.simulate(
        task,
        progress=False,
        federation={"rounds": 2},
        client={"batch_size": 4},
        simulation={"training": how, "workers": 1},
        finetune={"epochs": 1},
        compression={"timing_runs": 100, "candidates": ("fp32",)},
        **settings,
    )


PRIVATE = {"unit": "example", "max_epsilon": 50.0, "target_delta": 0.008}


@pytest.mark.parametrize(("how", "privacy"), [("loop", {}), ("vectorised", {}), ("loop", PRIVATE)])
def test_named_inputs_give_the_bits_of_one_tensor(how: str, privacy: dict[str, Any]) -> None:
    one, other = (run(task, how, privacy=privacy) for task in (named(), flat()))
    weights = one.model.state_dict(), other.model.state_dict()
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert one.metrics == other.metrics


class Scaled(nn.Module):
    """Gives a dictionary again, of other dtypes."""

    def forward(self, x: Named) -> dict[str, Tensor]:
        return {"image": x["image"] / 2, "age": x["age"], "words": x["words"]}


class Joined(nn.Module):
    def forward(self, x: Named) -> Tensor:
        return torch.cat([x["image"].flatten(1), x["age"][:, None]], dim=1)


@pytest.mark.parametrize(
    ("before", "model"), [(Scaled, Network), (Joined, lambda: nn.Linear(7, 2))]
)
def test_preprocessing_takes_and_gives_names(before: Any, model: Any) -> None:
    task = named(preprocess=before, model=model)
    built = build_model(task, RunConfig(name="x", task="task.py")).eval()
    load = partial(task.client_data, "anna", None)
    inputs, _ = gather_all(task_examples(task, load, what="x", folder=None))
    by_hand = task.named_inputs.unpack(inputs)  # type: ignore[union-attr]
    network = model()
    network.load_state_dict(built.model.state_dict())
    assert torch.equal(built(inputs), network(before()(by_hand)))
    run(task, "vectorised")


def test_a_check_goes_through_every_step() -> None:
    checked = fedcore.check(named(), progress=False, finetune={"processes": 2})
    wrong = [one for one in checked.findings if not one.ok]
    assert checked.ok, checked
    assert {one.step for one in wrong} <= {"export"}  # nothing can be pruned


class Accented(Network):
    def forward(self, x: Named) -> Tensor:
        return super().forward({**x, "age": x["größe"]})


def accented(row: int, values: dict[str, Any]) -> None:
    values["größe"] = values["age"]


def test_names_that_no_manifest_takes_are_refused_before_anything_runs(tmp_path: Path) -> None:
    release = {"repository": str(tmp_path), "keys": str(tmp_path)}
    task = named(
        example_input={**EXAMPLE, "größe": torch.zeros(())},
        named_inputs=None,
        model=Accented,
        client_data=lambda name, folder: Rows(name, accented),
    )
    with pytest.raises(TaskError, match=r"'named': a release cannot describe its input 'größe'"):
        run(task, "auto", release=release)
    checked = fedcore.check(task, progress=False, release=release)
    assert "a release cannot describe its input 'größe'" in checked.findings[-1].detail


def without_age(row: int, values: dict[str, Any]) -> None:
    if row == 5:
        del values["age"]


def wide(row: int, values: dict[str, Any]) -> None:
    if row == 5:
        values["age"] = torch.zeros(2)


def fractions(row: int, values: dict[str, Any]) -> None:
    values["words"] = values["words"] / 2


def missing(row: int, values: dict[str, Any]) -> None:
    if row == 5:
        values["image"] = torch.tensor([[0.0, 1, 2], [3, 4, torch.nan]])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (without_age, r"client 'ben', row 5: its inputs are 'words', 'image', expected 'image', "),
        (wide, r"client 'ben', row 5: its input 'age' is \(2,\), expected \(\)"),
        (fractions, r"client 'ben', row 0, .*its input 'words' is torch.float32, and torch.int64"),
        (missing, r"client 'ben', row 5: input 'image' at \(1, 2\) is nan"),
    ],
)
def test_a_row_that_does_not_fit_is_named_with_its_input(change: Any, said: str) -> None:
    def data(name: str, folder: Path | None) -> Any:
        return Rows(name, change if name == "ben" else None)

    task = named(client_data=data)
    with pytest.raises(DataError, match=said):
        run(task, "auto")


def test_a_replaced_task_takes_dictionaries_still() -> None:
    task = named()
    again = replace(task, client_data=lambda name, folder: Subset(Rows(name), range(6)))
    (inputs, _), (first, _) = (gather_all(one.client_data("anna", None)) for one in (again, task))
    assert torch.equal(inputs, first[:6])
    vectors = TensorDataset(inputs, torch.zeros(6))
    assert replace(task, client_data=lambda name, folder: vectors).client_data("a", None) is vectors
    assert isinstance(replace(again).model()(inputs), Tensor)


def test_large_integers_stay_exact() -> None:
    inputs = NamedInputs.of({"id": torch.zeros((), dtype=torch.long)}, task="x")
    value = torch.tensor([2**40 + 1])
    assert torch.equal(inputs.unpack(inputs.pack({"id": value}))["id"], value)
    small = NamedInputs.of({"flag": torch.tensor(True), "x": torch.zeros(2)}, task="x")
    assert small.dtype == torch.float32


@pytest.mark.parametrize(
    ("example", "said"),
    [
        ({}, "names no inputs"),
        ({"x": 1.0}, "has 'x': float, expected tensors"),
        ({"x": torch.zeros(2, dtype=torch.complex64)}, "has 'x': torch.complex64"),
        ((torch.zeros(2), torch.zeros(2)), "is a tuple, expected a tensor, or a dictionary"),
        (np.zeros(2), "is a ndarray, expected a tensor"),
    ],
)
def test_an_example_that_is_no_dictionary_of_tensors_is_refused(example: Any, said: str) -> None:
    with pytest.raises(TaskError, match=said):
        named(example_input=example, named_inputs=None)
