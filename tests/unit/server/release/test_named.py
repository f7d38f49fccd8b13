"""A manifest describes a task's named inputs, or the task is refused before it trains."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedcore.artifacts.golden import Golden
from fedcore.errors import TaskError
from fedcore.task.kinds.classification import Classification
from fedcore.task.kinds.protocol import OutputForm
from fedcore.task.kinds.regression import Regression
from fedcore.task.kinds.several import OutputPart, SeveralOutputs
from fedcore.task.named import NamedInputs
from server.release.named import named_outputs, named_tensors


def test_each_input_keeps_its_place_type_and_shape() -> None:
    example = {"b": torch.zeros(2, 3), "a": torch.tensor(True), "none": torch.zeros(0).half()}
    found = named_tensors(NamedInputs.of(example, task="x"), task="x") or ()
    assert [(each.name, each.dtype, each.shape) for each in found] == [
        ("b", "float32", (2, 3)),
        ("a", "bool", ()),
        ("none", "float16", (0,)),
    ]
    assert named_tensors(None, task="x") is None


@pytest.mark.parametrize(
    ("example", "said"),
    [
        ({f"x{n}": torch.zeros(()) for n in range(65)}, "65 named inputs, .* at most 64"),
        ({"größe": torch.zeros(())}, "its input 'größe'"),
        ({"": torch.zeros(())}, "its input ''"),
        ({"x" * 65: torch.zeros(())}, "its input 'x"),
        ({"deep": torch.zeros((1,) * 17)}, "its input 'deep'"),
    ],
)
def test_what_no_manifest_describes_is_refused(example: dict[str, torch.Tensor], said: str) -> None:
    with pytest.raises(TaskError, match=rf"^task 'x': .*{said}"):
        named_tensors(NamedInputs.of(example, task="x"), task="x")


def several(name: str = "kind") -> SeveralOutputs:
    number = torch.Size([]), torch.float32
    return SeveralOutputs(
        (
            OutputPart(
                name,
                Classification(),
                OutputForm(torch.Size([2]), torch.float32),
                OutputForm(torch.Size([]), torch.int64),
                ("no", "yes"),
                0,
                0,
            ),
            OutputPart("size", Regression(), OutputForm(*number), OutputForm(*number), (), 2, 1),
        )
    )


def test_each_output_has_a_tolerance_by_its_own_numbers() -> None:
    outputs = np.array([[1, -2, 50], [0, 1, -100]], np.float32)
    found = named_outputs(several(), Golden(outputs, outputs), 5.0, task="x") or ()
    assert [(each.name, each.shape, each.presentation, each.labels) for each in found] == [
        ("kind", (2,), "label", ("no", "yes")),
        ("size", (), "values", ()),
    ]
    assert [each.tolerance for each in found] == pytest.approx([0.1, 5.0])
    assert named_outputs(Regression(), None, 5.0, task="x") is None


def test_an_output_that_no_manifest_describes_is_refused() -> None:
    with pytest.raises(TaskError, match=r"^task 'x': a release cannot describe its output 'größe'"):
        named_outputs(several("größe"), None, 1.0, task="x")
    many = SeveralOutputs(several().parts[:1] * 65)
    with pytest.raises(TaskError, match=r"65 named outputs, .* at most 64"):
        named_outputs(many, None, 1.0, task="x")
