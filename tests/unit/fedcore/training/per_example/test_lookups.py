"""Gradients by what was looked up, against gradients of whole tables."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fedcore.training.per_example.gradient_methods import one_by_one
from fedcore.training.per_example.lookups import find_tables, lookup_method, sum_duplicate_rows
from tests.ways import weighted

LOSS = functional.cross_entropy


class Words(nn.Module):
    """Words and where they stand; the head is made of what a table gives."""

    def __init__(self, width: int = 5, padding: int | None = None, calls: int = 1) -> None:
        super().__init__()
        self.words = nn.Embedding(200, width, padding_idx=padding)
        self.places = nn.Embedding(200, width)
        self.calls = calls
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        found = self.words(x) * self.places(torch.arange(x.shape[1]).expand_as(x))
        for turn in range(1, self.calls):
            found = found + self.words((x[:, : turn + 1] + turn) % 11).sum(dim=1, keepdim=True)
        result: Tensor = self.head(found.tanh().mean(dim=1))
        return result


class Aside(Words):
    """Uses its table beside the layer."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.words.weight.sum(dim=0)[:3]


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(11, 4), nn.Linear(4, 11)
        self.head.weight = self.words.weight


def batch() -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(3)
    inputs = torch.randint(11, (6, 7), generator=rng)
    inputs[0] = 4  # the same word in every place
    inputs[1, 2:] = 0  # mostly padding, where there is any
    return inputs, torch.randint(3, (6,), generator=rng)


def both_ways(model: nn.Module) -> Iterator[tuple[Tensor, list[Tensor]]]:
    """Squared lengths and weighted sums of gradients, by lookups and then by whole tables."""
    inputs, targets = batch()
    way = lookup_method(model, inputs, LOSS, why="a test")
    assert way is not None
    share = torch.linspace(0, 1, len(inputs))
    for one in (way, one_by_one(LOSS, why="")):
        part = one.compute(nn.Identity(), model, inputs, targets)
        yield part.squares, weighted(part, model, share)


@pytest.mark.parametrize("width", [1, 5, 8])
@pytest.mark.parametrize("padding", [None, 0])
@pytest.mark.parametrize("calls", [1, 3])
def test_gradients_are_those_of_whole_tables(width: int, padding: int | None, calls: int) -> None:
    torch.manual_seed(0)
    (found_squares, found), (right_squares, right) = both_ways(Words(width, padding, calls))
    torch.testing.assert_close(found_squares, right_squares, rtol=1e-6, atol=0)
    torch.testing.assert_close(found, right, rtol=1e-6, atol=1e-7)


def test_what_is_added_for_an_example_is_as_long_as_is_said() -> None:
    torch.manual_seed(0)
    model, (inputs, targets) = Words(), batch()
    way = lookup_method(model, inputs, LOSS, why="")
    assert way is not None
    part = way.compute(nn.Identity(), model, inputs, targets)
    for place in range(len(inputs)):
        alone = torch.zeros(len(inputs))
        alone[place] = 1
        length = torch.cat([one.flatten() for one in weighted(part, model, alone)]).norm()
        assert length.square() == pytest.approx(float(part.squares[place]), rel=1e-6)


def test_other_examples_are_the_same_bits_when_one_is_replaced() -> None:
    torch.manual_seed(0)
    model, (inputs, targets) = Words(), batch()
    way = lookup_method(model, inputs, LOSS, why="")
    assert way is not None
    other = inputs.clone()
    other[0] = torch.arange(7)
    share = torch.ones(len(inputs))
    share[0] = 0
    for one, two in zip(
        weighted(way.compute(nn.Identity(), model, inputs, targets), model, share),
        weighted(way.compute(nn.Identity(), model, other, targets), model, share),
        strict=True,
    ):
        assert torch.equal(one, two)


def test_an_example_that_is_not_finite_is_not_usable() -> None:
    torch.manual_seed(0)
    model, (inputs, targets) = Words(), batch()
    with torch.no_grad():
        model.words.weight[10] = torch.nan
    inputs[inputs == 10] = 9
    inputs[2, 0] = 10
    way = lookup_method(model, inputs, LOSS, why="")
    assert way is not None
    usable = way.compute(nn.Identity(), model, inputs, targets).usable
    assert usable.tolist() == [True, True, False, True, True, True]


def test_equal_row_numbers_are_added_up_in_one_place() -> None:
    index = torch.tensor([[3, 1, 3, 3], [2, 0, 5, 4]])
    each = torch.tensor([[1.0, 2.0, 4.0, 8.0], [1.0, 2.0, 4.0, 8.0]]).unsqueeze(2)
    places, total = sum_duplicate_rows(index, each)
    assert places[0, :2].tolist() == [1, 3]
    assert total.squeeze(2).tolist() == [[2.0, 13.0, 0.0, 0.0], [2.0, 1.0, 8.0, 4.0]]
    assert places[1].tolist() == [0, 2, 4, 5]


def test_tables_that_must_be_whole_are_left_alone() -> None:
    frozen = nn.Embedding(3, 2)
    frozen.weight.requires_grad_(False)
    assert find_tables(nn.Sequential(nn.Embedding(3, 2), nn.Flatten(), nn.Linear(4, 1))) == ("0",)
    for layer in (
        frozen,
        nn.Embedding(3, 2, max_norm=1.0),
        nn.Embedding(3, 2, scale_grad_by_freq=True),
        nn.Embedding(3, 2, sparse=True),
        Tied(),
        nn.Linear(2, 2),
    ):
        assert find_tables(nn.Sequential(layer)) == ()
    small = nn.Sequential(nn.Embedding(11, 5), nn.Flatten(), nn.Linear(35, 3))
    assert lookup_method(small, batch()[0], LOSS, why="") is None
    assert lookup_method(nn.Linear(2, 2), torch.zeros(1, 2), LOSS, why="") is None


def test_a_table_that_is_used_beside_its_layer_differs_and_so_is_found() -> None:
    torch.manual_seed(0)
    (found, _), (right, _) = both_ways(Aside())
    assert not torch.allclose(found, right, rtol=1e-6, atol=0)
