"""Weights of many clients that a model takes for its own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor


class NotStackable(Exception):
    """A model uses its weights or examples in a way that cannot run for many clients at once."""


class StackedWeight(Tensor):
    """One parameter of ``K`` clients; it looks like the parameter of a single one.

    It holds no numbers itself: code that reads it other than through torch's functions fails
    instead of computing with the wrong client's weights.
    """

    stacked: Tensor
    """The clients' parameters, ``(K, ...)``."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, stacked: Tensor) -> StackedWeight:
        """Wraps parameters ``(K, ...)``."""
        made: StackedWeight = torch.Tensor._make_wrapper_subclass(
            cls,
            stacked.shape[1:],
            dtype=stacked.dtype,
            device=stacked.device,
            requires_grad=stacked.requires_grad,  # a gradient that reached it would be an error
        )
        made.stacked = stacked
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Tensor:
        """Refuses every operation on the wrapper itself.

        Raises:
            NotStackable: always.
        """
        raise NotStackable(f"its weights are read by {func.__name__}, outside torch's functions")


def tensors_in(values: Iterable[Any]) -> Iterator[Tensor]:
    """Yields the tensors among values, and in lists, tuples and slices among them."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from tensors_in(value)
        elif isinstance(value, slice):
            yield from tensors_in((value.start, value.stop, value.step))
