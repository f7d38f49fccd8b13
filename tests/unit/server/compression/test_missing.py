"""A released file takes missing values where the model and the file both do."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fedcore.task.missing import missing_allowed
from fedcore.task.named import NamedInputs, NamedModel
from server.compression.export import export_onnx
from server.compression.missing import missing_in_file


class Fills(nn.Module):
    """Fills missing numbers at some positions alone."""

    def __init__(self, *places: int) -> None:
        super().__init__()
        self.places = list(places)
        self.layer = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        filled = x.clone()
        filled[:, self.places] = torch.nan_to_num(x[:, self.places])
        return self.layer(filled)


@pytest.mark.parametrize(
    ("places", "expected"), [((), None), ((1,), (1,)), ((0, 2), (0, 2)), ((0, 1, 2), "all")]
)
def test_the_positions_that_are_filled_may_be_missing(
    places: tuple[int, ...], expected: object
) -> None:
    model, example = Fills(*places).eval(), torch.ones(3)
    onnx = export_onnx(model, torch.stack([example] * 2), labels=(), kind="regression")
    assert missing_in_file(model, example, onnx, tolerance=1e-4) == expected


def test_a_file_that_answers_otherwise_takes_none() -> None:
    """An operation of onnxruntime may turn NaN into a number that torch does not give."""
    model, example = Fills(0, 1, 2).eval(), torch.ones(3)
    other = export_onnx(Fills().eval(), torch.stack([example] * 2), labels=(), kind="regression")
    assert missing_in_file(model, example, other, tolerance=1e-4) is None


def test_what_makes_no_number_of_nan_allows_none() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1))
    assert not missing_allowed(model, torch.ones(3)).any()
    assert not missing_allowed(model, torch.ones(3, dtype=torch.long)).any()
    fails = nn.Linear(7, 1)
    assert not missing_allowed(fails, torch.ones(3)).any()
    assert model.training  # as it was


def test_positions_that_are_filled_by_each_other_are_not_allowed_together() -> None:
    class First(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            gone = torch.isnan(x)
            return torch.where(gone, x.flip(1), x)  # needs the other one

    assert not missing_allowed(First(), torch.ones(2)).any()


class Reads(nn.Module):
    """Fills a missing number beside a word and a flag, which no NaN may reach."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.layer = nn.Embedding(5, 2), nn.Linear(4, 2)

    def forward(self, x: dict[str, Tensor]) -> Tensor:
        parts = [torch.nan_to_num(x["x"])[:, None], x["flag"][:, None].float()]
        return self.layer(torch.cat([self.words(x["word"]), *parts], dim=1))


def test_of_named_inputs_only_floats_may_be_missing() -> None:
    example = {"word": torch.tensor(1), "flag": torch.tensor(True), "x": torch.tensor(0.5)}
    named = NamedInputs.of(example, task="x")
    vector = named.vector(example)
    model = NamedModel(Reads, named, None, vector)().eval()
    onnx = export_onnx(model, torch.stack([vector] * 2), labels=(), kind="regression")
    assert missing_in_file(model, vector, onnx, tolerance=1e-4, named=named) == (2,)
