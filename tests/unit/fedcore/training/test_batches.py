from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset, TensorDataset

from fedcore.errors import DataError
from fedcore.seeds import torch_rng
from fedcore.task.definition import Examples
from fedcore.training.batches import gather, in_order, shuffled, split

DATA: Any = TensorDataset(torch.arange(10.0).reshape(10, 1), torch.arange(10))


class Rows(Dataset[Any]):
    """A data set that is neither of the two that have a quick way."""

    def __init__(self, rows: list[Any]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> Any:
        if isinstance(self.rows[row], Exception):
            raise self.rows[row]
        return self.rows[row]


@pytest.mark.parametrize(
    "examples",
    [
        DATA,
        Subset(DATA, list(range(10))),
        Subset(Subset(DATA, list(range(9, -1, -1))), list(range(9, -1, -1))),
        Rows([DATA[i] for i in range(10)]),
    ],
    ids=["tensors", "subset", "subset of a subset", "any data set"],
)
def test_rows_are_gathered_alike_from_every_kind_of_data_set(examples: Examples) -> None:
    inputs, targets = gather(examples, [7, 2, 2])
    assert torch.equal(targets, torch.tensor([7, 2, 2]))
    assert torch.equal(inputs, torch.tensor([[7.0], [2.0], [2.0]]))
    assert torch.equal(gather(examples, torch.tensor([7, 2, 2]))[1], targets)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([(torch.zeros(1), torch.zeros(1)), (torch.zeros(2), torch.zeros(1))], "equal size"),
        ([(torch.zeros(1), torch.zeros(1), 3)] * 2, "too many values to unpack"),
        ([torch.zeros(3)] * 3, "too many values|not enough values"),
        ([{"x": torch.zeros(1), "y": torch.zeros(1)}] * 2, "got dict"),
        ([("text", torch.zeros(1))] * 2, "got tuple"),
        ([(None, None)] * 2, "NoneType"),
    ],
)
def test_examples_that_make_no_batch_are_refused(rows: list[Any], said: str) -> None:
    with pytest.raises(DataError, match=f"(?s)each must be a pair \\(input, target\\).*({said})"):
        gather(Rows(rows), range(len(rows)))


def test_an_example_that_cannot_be_read_is_named() -> None:
    rows = Rows([DATA[0], OSError("Input/output error")])
    with pytest.raises(DataError, match="reading example 1 failed: OSError: Input/output error"):
        gather(rows, [0, 1])
    told = Rows([DataError("scan-07.png: not an image.")])
    with pytest.raises(DataError, match=r"^scan-07\.png: not an image\.$"):
        gather(told, [0])


def seen(batches: list[tuple[Tensor, Tensor]]) -> list[int]:
    return [int(target) for _, targets in batches for target in targets]


def test_an_epoch_holds_every_example_once_in_an_order_that_the_generator_fixes() -> None:
    one, again = (list(shuffled(DATA, 4, torch_rng(1, "order"))) for _ in range(2))
    assert [len(targets) for _, targets in one] == [4, 4, 2]
    assert sorted(seen(one)) == list(range(10))
    assert seen(one) == seen(again)
    assert seen(one) != seen(list(shuffled(DATA, 4, torch_rng(2, "order"))))


def test_in_order_is_in_order() -> None:
    assert seen(list(in_order(DATA, 3))) == list(range(10))


@pytest.mark.parametrize(
    ("count", "holdout", "held"),
    [(10, 0.3, 3), (10, 0.0, 0), (10, 0.01, 1), (10, 0.99, 9), (2, 0.9, 1), (1, 0.5, 0)],
)
def test_a_split_keeps_something_on_each_side_where_it_can(
    count: int, holdout: float, held: int
) -> None:
    rest, out = split(Subset(DATA, list(range(count))), holdout, seed=5)
    kept = seen(list(in_order(rest, 5)))
    held_out = seen(list(in_order(out, 5)))
    assert len(held_out) == held
    assert sorted(kept + held_out) == list(range(count))


def test_a_split_is_fixed_by_its_seed() -> None:
    def held_out(seed: int) -> list[int]:
        return seen(list(in_order(split(DATA, 0.4, seed)[1], 5)))

    assert held_out(5) == held_out(5)
    assert held_out(5) != held_out(6)


def test_text_as_targets_is_refused_with_its_row_and_the_remedy() -> None:
    rows = [(torch.zeros(1), 0), (torch.zeros(1), "high")]
    with pytest.raises(DataError, match=r"row 1: the target is the text 'high'.*`labels`"):
        gather(Rows(rows), [0, 1])  # type: ignore[arg-type]
