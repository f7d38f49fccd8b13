"""Dropout with each client's own random stream, as in training alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fedcore.training.function_mode import FunctionMode


@dataclass(frozen=True)
class DropoutStreams:
    """One random stream a client, and the number of examples in its batch."""

    generators: Sequence[torch.Generator]
    counts: Sequence[int]
    """Examples of each client's batch."""
    rows: int
    """Rows of each client's batch; those after its examples are padding, and drop nothing."""

    def keep(self, like: Tensor, p: float) -> Tensor:
        """Returns the factors of dropout for values ``(K * B, ...)``: 0, or ``1 / (1 - p)``.

        Each client draws them for its batch in one call, in the order in which the values lie in
        memory, as `torch.nn.functional.dropout` does.
        """
        kept = torch.ones_like(like)
        if p >= 1:
            return kept.zero_()
        batches = zip(*(torch.split(one, self.rows) for one in (like, kept)), strict=True)
        for (batch, mine), count, rng in zip(batches, self.counts, self.generators, strict=True):
            drawn = torch.empty_like(batch[:count]).bernoulli_(1 - p, generator=rng)
            torch.div(drawn, 1 - p, out=mine[:count])
        return kept

    def keep_steps(self, steps: int, shape: Sequence[int], p: float, like: Tensor) -> Tensor:
        """Returns the factors for sequences, ``(K, T, B, *shape)``; drawn with the steps first."""
        kept = like.new_ones((len(self.counts), steps, self.rows, *shape))
        if p >= 1:
            return kept.zero_()
        for mine, count, rng in zip(kept, self.counts, self.generators, strict=True):
            drawn = like.new_empty((steps, count, *shape)).bernoulli_(1 - p, generator=rng)
            torch.div(drawn, 1 - p, out=mine[:, :count])
        return kept


class DropForClients(FunctionMode):
    """Torch function mode in which dropout on ``(K, B, ...)`` draws from each client's stream."""

    def __init__(self, streams: DropoutStreams) -> None:
        super().__init__()
        self.streams = streams

    def call(self, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        if func is not functional.dropout:
            return func(*args, **kwargs)
        x, p = _values_and_rate(*args, **kwargs)
        return x * self.streams.keep(x.flatten(0, 1), p).view(x.shape)


def _values_and_rate(
    input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> tuple[Tensor, float]:
    """Takes the arguments of `torch.nn.functional.dropout`, which torch passes on by name."""
    return input, p
