from __future__ import annotations

import sys
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset, TensorDataset

from fedcore.errors import DataError, TaskError
from fedcore.task.definition import Task, data_folder, load_task, read_examples
from fedcore.task.kinds.registry import KindName
from fedcore.task.metrics import ACCURACY, MAE, PERPLEXITY, RMSE

MINIMAL = """
import torch
from fedcore import Task
from torch.utils.data import TensorDataset

def data(*_):
    return TensorDataset(torch.zeros(4, 2), torch.zeros(4, dtype=torch.long))

task = Task(name="t", kind="classification", model=lambda: torch.nn.Linear(2, 3),
            clients=lambda folder: ["a"], client_data=data, test_data=data,
            example_input=torch.zeros(2))
"""


def make(kind: KindName, name: str = "t") -> Task:
    data = TensorDataset(torch.zeros(2, 2), torch.zeros(2))
    return Task(
        name=name,
        kind=kind,
        model=lambda: nn.Linear(2, 1),
        clients=lambda folder: ["a"],
        client_data=lambda client, folder: data,  # type: ignore[arg-type,return-value]
        test_data=lambda folder: data,  # type: ignore[arg-type,return-value]
        example_input=torch.zeros(2),
    )


def written(folder: Path, text: str) -> Path:
    path = folder / "task.py"
    path.write_text(text)
    return path


def test_each_kind_has_its_usual_metrics_the_first_of_them_primary() -> None:
    assert make("classification").metrics == (ACCURACY,)
    assert make("regression").metrics == (RMSE, MAE)
    assert make("regression").primary is RMSE
    assert make("next_token").metrics == (ACCURACY, PERPLEXITY)


def test_each_kind_has_its_usual_loss() -> None:
    logits = torch.tensor([[2.0, 0.0, 1.0], [0.0, 1.0, 0.5]])
    targets = torch.tensor([0, 2])
    expected = nn.functional.cross_entropy(logits, targets)
    assert torch.equal(make("classification").loss_of(logits, targets), expected)
    tokens = make("next_token").loss_of(logits.unsqueeze(0), targets.unsqueeze(0))
    assert torch.allclose(tokens, expected)
    column, values = torch.tensor([[1.0], [3.0]]), torch.tensor([1.0, 1.0])
    assert make("regression").loss_of(column, values).item() == 2.0


def test_a_task_is_frozen_and_of_a_known_kind() -> None:
    with pytest.raises(FrozenInstanceError):
        make("regression").name = "other"  # type: ignore[misc]
    with pytest.raises(TaskError, match="kind = 'clustering'; allowed: classification, regression"):
        make("clustering")  # type: ignore[arg-type]


def test_a_task_file_is_loaded(tmp_path: Path) -> None:
    task = load_task(written(tmp_path, MINIMAL))
    assert task.name == "t"
    assert list(task.clients(None)) == ["a"]


def test_a_task_file_may_import_its_neighbours_and_leaves_the_path_alone(tmp_path: Path) -> None:
    (tmp_path / "neighbour_of_task.py").write_text("NAME = 'from-beside'\n")
    text = "from neighbour_of_task import NAME\n" + MINIMAL.replace('name="t"', "name=NAME")
    before = list(sys.path)
    try:
        assert load_task(written(tmp_path, text)).name == "from-beside"
    finally:
        sys.modules.pop("neighbour_of_task", None)
    assert sys.path == before


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("1/0", "importing this task failed: ZeroDivisionError: division by zero"),
        ("task = (", "importing this task failed: SyntaxError"),
        ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
        (
            MINIMAL.replace("client_data=", "clients_data="),
            "unexpected keyword argument 'clients_data'",
        ),
        ("", "expected a variable `task` that is a fedcore.Task, found nothing of that name"),
        ("task = 3", "expected a variable `task` that is a fedcore.Task, found int"),
        (MINIMAL.replace("classification", "ranking"), "kind = 'ranking'; allowed:"),
    ],
)
def test_a_task_file_that_is_none_is_refused_with_the_reason(
    tmp_path: Path, text: str, said: str
) -> None:
    path = written(tmp_path, text)
    before, loaded = list(sys.path), set(sys.modules)
    with pytest.raises(TaskError) as caught:
        load_task(path)
    assert said in str(caught.value)
    assert "Nothing was run" in str(caught.value) or "allowed:" in str(caught.value)
    assert sys.path == before
    assert not {name for name in set(sys.modules) - loaded if name.startswith("fedcore_task_")}


def test_a_task_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"none\.py: this task file does not exist"):
        load_task(tmp_path / "none.py")
    (tmp_path / "folder.py").mkdir()
    with pytest.raises(TaskError, match=r"is not a regular file\. Nothing was run; give"):
        load_task(tmp_path / "folder.py")
    (tmp_path / "task.txt").write_text(MINIMAL)
    with pytest.raises(TaskError, match=r"a task file ends in \.py"):
        load_task(tmp_path / "task.txt")


def test_data_lies_where_the_environment_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FEDCORE_DATA", raising=False)
    assert data_folder() is None
    monkeypatch.setenv("FEDCORE_DATA", str(tmp_path))
    assert data_folder() == tmp_path
    monkeypatch.setenv("FEDCORE_DATA", str(tmp_path / "none"))
    with pytest.raises(DataError, match="none: this folder does not exist"):
        data_folder()


class Endless(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    def __getitem__(self, row: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.zeros(1), torch.zeros(1)


def test_a_loader_that_fails_says_what_was_being_read() -> None:
    def fails() -> Dataset[tuple[torch.Tensor, torch.Tensor]]:
        raise EOFError("Compressed file ended")

    with pytest.raises(DataError, match="client 'anna': reading it failed: EOFError: Compressed"):
        read_examples(fails, what="client 'anna'", folder=Path())
    with pytest.raises(DataError, match="has no len"):
        read_examples(Endless, what="client 'anna'", folder=Path())


def test_a_client_without_data_is_named() -> None:
    empty = TensorDataset(torch.zeros(0, 2), torch.zeros(0))
    with pytest.raises(DataError, match="client 'anna': got no examples"):
        read_examples(lambda: empty, what="client 'anna'", folder=Path())  # type: ignore[arg-type,return-value]


def test_an_error_that_says_what_is_wrong_is_passed_on() -> None:
    def fails() -> Dataset[tuple[torch.Tensor, torch.Tensor]]:
        raise DataError("readings.csv: row 7 has no label.")

    with pytest.raises(DataError, match=r"^readings\.csv: row 7 has no label\.$"):
        read_examples(fails, what="client 'anna'", folder=Path())


@pytest.mark.parametrize(
    "name", ["two words", "a\nb", "caf\u00e9", "", "a" * 65, "a/b", "t\0", "\u0663", 7]
)
def test_a_name_that_no_header_carries_is_refused(name: str) -> None:
    with pytest.raises(TaskError, match="a task's name is 1 to 64 of the letters") as caught:
        make("classification", name)
    assert repr(name) in str(caught.value)


@pytest.mark.parametrize("name", ["t", "mnist_by_writer", "Churn-2.1", "a" * 64])
def test_plain_names_are_taken(name: str) -> None:
    assert make("classification", name).name == name
