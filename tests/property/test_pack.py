from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fedcore.errors import InvalidUpdate
from fedcore.updates.pack import layout_of, pack, unpack

SHAPES = st.lists(st.lists(st.integers(0, 4), max_size=3).map(tuple), max_size=5)
DTYPES = st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64])


class Holder(nn.Module):
    """Tensors of any shapes, every other one a buffer."""

    def __init__(self, shapes: list[tuple[int, ...]], dtype: torch.dtype, seed: int) -> None:
        super().__init__()
        rng = torch.Generator().manual_seed(seed)
        for number, shape in enumerate(shapes):
            # Values of bfloat16 and of float16's range, so that none of the dtypes rounds them.
            values = torch.randn(shape, generator=rng).to(torch.bfloat16).to(dtype)
            if number % 2:
                self.register_buffer(f"part{number}", values)
            else:
                self.register_parameter(f"part{number}", nn.Parameter(values))


def state(model: nn.Module) -> dict[str, Any]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@given(SHAPES, DTYPES, st.integers(0, 99))
def test_what_is_packed_comes_back_bit_for_bit(
    shapes: list[tuple[int, ...]], dtype: torch.dtype, seed: int
) -> None:
    source, target = Holder(shapes, dtype, seed), Holder(shapes, dtype, seed + 1)
    vector = pack(source)
    assert vector.dtype == np.float32
    assert vector.shape == (layout_of(source).size,)
    unpack(vector, target)
    for name, tensor in state(source).items():
        assert torch.equal(tensor, target.state_dict()[name])
        assert target.state_dict()[name].dtype == dtype


@given(SHAPES, st.integers(0, 200))
def test_a_vector_of_another_shape_is_refused_and_changes_nothing(
    shapes: list[tuple[int, ...]], length: int
) -> None:
    model = Holder(shapes, torch.float32, 0)
    before, size = state(model), layout_of(model).size
    wrong = (length,) if length != size else (1, length)
    with pytest.raises(InvalidUpdate, match=rf"expected \({size},\) for this model"):
        unpack(np.zeros(wrong, np.float32), model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in state(model).items())


@given(SHAPES, SHAPES)
def test_digests_are_equal_exactly_when_the_layouts_are(
    one: list[tuple[int, ...]], other: list[tuple[int, ...]]
) -> None:
    left = layout_of(Holder(one, torch.float32, 0))
    right = layout_of(Holder(other, torch.float32, 1))
    assert (left.digest == right.digest) == (one == other)
