"""Which values come of examples, and functions that choose by their values.

Clients that run together share a model's Python code and the shapes of its tensors. So neither may
depend on what the examples of all clients together look like.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from server.simulation.batched.stacked.weights import NotStackable, tensors_in

_MARK = "comes_of_examples"


def mark(tensors: Iterable[Tensor]) -> None:
    """Marks tensors as computed from examples."""
    for one in tensors:
        setattr(one, _MARK, True)


def come_of_examples(tensors: Iterable[Tensor]) -> bool:
    """Returns whether any of the tensors was marked."""
    return any(getattr(one, _MARK, False) for one in tensors)


def refuse_choices(
    func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> None:
    """Refuses functions through which examples decide what code runs, or the shape of a result.

    Args:
        func: Function of torch's.
        args: Its arguments; one of them comes of examples.
        kwargs: Its named arguments.

    Raises:
        NotStackable: says what the model does.
    """
    if func in READINGS:
        raise NotStackable("its code depends on the values of its examples")
    if func is Tensor.__getitem__:
        index = args[1] if isinstance(args[1], tuple) else (args[1],)
        if any(come_of_examples(tensors_in([one])) for one in index if _chooses(one)):
            raise NotStackable("it selects a part of a batch by the values of examples")
    if func in _SHAPING or (func in _BY_ONE and len(args) + len(kwargs) == 1):
        raise NotStackable("the size of a result depends on the values of examples")
    repeats = args[1:2] or [kwargs.get("repeats")]
    if func in _REPEATING and come_of_examples(tensors_in(repeats)):
        raise NotStackable("it repeats examples as often as their values say")


def _chooses(index: object) -> bool:
    """Whether an index is a slice or a mask, so that its values decide how much is selected."""
    masks = (torch.bool, torch.uint8)
    return isinstance(index, slice) or (isinstance(index, Tensor) and index.dtype in masks)


READINGS = {
    Tensor.item,
    Tensor.tolist,
    Tensor.numpy,
    Tensor.__array__,
    Tensor.__bool__,
    Tensor.__contains__,
    Tensor.__float__,
    Tensor.__int__,
    Tensor.__index__,
    Tensor.allclose,
    Tensor.equal,
    Tensor.is_nonzero,
    torch.allclose,
    torch.equal,
    torch.is_nonzero,
}
"""Functions that make numbers for Python's own code out of a tensor's, which differ by client."""

_SHAPING = {
    Tensor.argwhere,
    Tensor.bincount,
    Tensor.masked_select,
    Tensor.nonzero,
    Tensor.unique,
    Tensor.unique_consecutive,
    torch.arange,
    torch.argwhere,
    torch.bincount,
    torch.linspace,
    torch.masked_select,
    torch.nonzero,
    torch.unique,
    torch.unique_consecutive,
}
_BY_ONE = {torch.where, functional.one_hot}
"""Functions that do so where they have no further argument."""
_REPEATING = {Tensor.repeat_interleave, torch.repeat_interleave}
