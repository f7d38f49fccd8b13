"""Client-level privacy of an update: the client clips it, the server checks the bound.

The bound limits the difference between the weights that a client returns and those that it
received: all that the client's data can change. The server adds the noise.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from fedcore.config.run import Privacy
from fedcore.errors import InvalidUpdate
from fedcore.updates.messages import EPSILON, UNCLIPPED, Instruction, Update
from fedcore.updates.pack import Vector

SLACK = 1e-6
"""Relative excess over the bound that a check tolerates, as float64 norms depend on summation
order. The noise accounts for it."""
_CHUNK = 1 << 16  # elements per chunk: float64 temporaries stay in the cache
_TRIES = 8


@dataclass(frozen=True)
class Clipped:
    """Weights whose difference from the start is within a bound."""

    weights: Vector
    unclipped: bool
    """Whether the difference was within the bound before clipping."""


@dataclass(frozen=True)
class Bound:
    """The bound that the server enforces on every update of a round."""

    start: Vector
    """The weights that clients received."""
    clip_norm: float
    adaptive: bool
    """Whether each update also reports whether it was within the bound before clipping."""

    def check(self, parts: Iterable[Vector], metrics: Mapping[str, float], *, where: str) -> None:
        """Rejects an update that exceeds the bound, which the noise would not cover.

        Args:
            parts: The update's weights in order, as consecutive parts; finite.
            metrics: The update's metrics.
            where: The update's origin, for the error message.

        Raises:
            InvalidUpdate: The update is further from ``start`` than the bound, or fails to report
                whether it was clipped where that is required.
        """
        found = distance(self.start, parts)
        if not found <= self.clip_norm * (1 + SLACK):
            raise InvalidUpdate(
                f"{where}: its distance is {found:.6g} from the weights that were sent, "
                f"expected at most privacy.client.clip_norm = {self.clip_norm:.6g}. It was not "
                "used, because the noise only hides updates within that bound; install the "
                "server's version of fedcore on this client."
            )
        if self.adaptive and metrics.get(UNCLIPPED) not in (0.0, 1.0):
            raise InvalidUpdate(
                f"{where}: {UNCLIPPED} = {metrics.get(UNCLIPPED)}, expected 0 or 1. It was not "
                "used; install the server's version of fedcore on this client."
            )


def distance(start: Vector, parts: Iterable[Vector]) -> float:
    """Returns the L2 distance from ``start`` to weights in consecutive parts, in float64.

    Infinite where the weights are not finite.
    """
    squares, place = [], 0
    for part in parts:
        for piece in _chunks(part):
            gap = np.subtract(piece, start[place : place + len(piece)], dtype=np.float64)
            squares.append(float(gap @ gap))
            place += len(piece)
    return math.sqrt(math.fsum(squares)) if np.isfinite(squares).all() else math.inf


def clip(start: Vector, trained: Vector, clip_norm: float) -> Clipped:
    """Moves ``trained`` straight towards ``start`` until it is within ``clip_norm`` of it.

    Guarantee:
        The distance of the result, as measured by `Bound.check`, is at most ``clip_norm`` for any
        values of ``trained``: if these are not finite, or float32 cannot express so small a
        difference, the result is ``start``.

    Args:
        start: Weights before training, shape ``(D,)``, float32, finite.
        trained: Weights after training, shape ``(D,)``, float32; may be non-finite.
        clip_norm: The bound, > 0.
    """
    length = distance(start, (trained,))
    if length <= clip_norm:
        return Clipped(trained, unclipped=True)
    scale = clip_norm / length
    for _ in range(_TRIES if math.isfinite(length) else 0):
        moved = _moved(start, trained, scale)
        found = distance(start, (moved,))
        if found <= clip_norm:
            return Clipped(moved, unclipped=False)
        scale *= clip_norm / found * (1 - 1e-7)  # rounding to float32 has made it longer
    return Clipped(start.copy(), unclipped=False)


def bounded(
    privacy: Privacy, instruction: Instruction, weights: Vector, metrics: Mapping[str, float]
) -> Update:
    """Returns a client's update under client-level privacy, clipped to the instruction's bound.

    The number of examples stays on the client, as all updates have equal weight, and so do its
    metrics, except for the epsilon of its examples.

    Raises:
        InvalidUpdate: The server's instruction has no valid bound.
    """
    if not 0 < instruction.clip_norm < math.inf:
        raise InvalidUpdate(
            f"round {instruction.round}: privacy.unit = {privacy.unit!r}, but the server's "
            "message contains no bound for the update. No update was sent; server and client "
            "must run the same version."
        )
    clipped = clip(instruction.weights, weights, instruction.clip_norm)
    kept = {EPSILON: metrics[EPSILON]} if EPSILON in metrics else {}
    if privacy.client.clip_norm == "adaptive":
        kept[UNCLIPPED] = float(clipped.unclipped)
    return Update(clipped.weights, 1, kept)


def _moved(start: Vector, trained: Vector, scale: float) -> Vector:
    moved = np.empty(len(start), np.float32)
    place = 0
    for piece in _chunks(trained):
        part = slice(place, place + len(piece))
        gap = np.subtract(piece, start[part], dtype=np.float64)
        moved[part] = start[part] + gap * scale
        place += len(piece)
    return moved


def _chunks(values: Vector) -> Iterator[Vector]:
    return (values[place : place + _CHUNK] for place in range(0, len(values), _CHUNK))
