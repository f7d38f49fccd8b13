"""A manifest describes a task's named inputs, or the task is refused before it trains."""

from __future__ import annotations

import pytest
import torch

from fedcore.errors import TaskError
from fedcore.task.named import NamedInputs
from server.release.named import named_tensors


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
