"""Client-level privacy on both ends of an update: bounded by the client, checked by the server.

What is bounded is the difference between the weights that a client sends and those that it was
sent: all that the client's data could move. Noise is the server's part.
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
"""By this share a difference may pass its bound before it is refused: norms are sums of float64
numbers in whatever order. Noise is counted for it."""
_CHUNK = 1 << 16  # elements: float64 temporaries stay in the cache
_TRIES = 8


@dataclass(frozen=True)
class Clipped:
    """Weights whose difference to those before is within a bound."""

    weights: Vector
    unclipped: bool
    """Whether it was before."""


@dataclass(frozen=True)
class Bound:
    """What the server holds every update of a round to."""

    start: Vector
    """The weights that clients were sent."""
    clip_norm: float
    adaptive: bool
    """Whether each update also says whether it was within the bound by itself."""

    def check(self, parts: Iterable[Vector], metrics: Mapping[str, float], *, where: str) -> None:
        """Refuses an update that one client's share of the noise does not cover.

        Args:
            parts: Its weights, from the first to the last; finite.
            metrics: What came with them.
            where: Whose it is, for the message.

        Raises:
            InvalidUpdate: it is further from ``start`` than the bound, or says neither yes nor no
                where it is asked.
        """
        found = distance(self.start, parts)
        if not found <= self.clip_norm * (1 + SLACK):
            raise InvalidUpdate(
                f"{where}: it is {found:.6g} away from the weights that were sent, expected at "
                f"most privacy.client.clip_norm = {self.clip_norm:.6g}. It was not used: noise "
                "that hides one client hides no more than that. Install the server's version of "
                "fedcore on this client."
            )
        if self.adaptive and metrics.get(UNCLIPPED) not in (0.0, 1.0):
            raise InvalidUpdate(
                f"{where}: {UNCLIPPED} = {metrics.get(UNCLIPPED)}, expected 0 or 1. It was not "
                "used; install the server's version of fedcore on this client."
            )


def distance(start: Vector, parts: Iterable[Vector]) -> float:
    """The L2 distance between ``start`` and weights that come part by part, in float64.

    Not finite where they are not.
    """
    squares, place = [], 0
    for part in parts:
        for piece in _chunks(part):
            gap = np.subtract(piece, start[place : place + len(piece)], dtype=np.float64)
            squares.append(float(gap @ gap))
            place += len(piece)
    return math.sqrt(math.fsum(squares)) if np.isfinite(squares).all() else math.inf


def clip(start: Vector, trained: Vector, clip_norm: float) -> Clipped:
    """``trained``, moved straight towards ``start`` until it is within ``clip_norm`` of it.

    Guarantee:
        The distance of the result, which `Bound.check` measures, is at most ``clip_norm``,
        whatever ``trained`` holds: where that is not finite, or float32 cannot express so small
        a difference, the result is ``start``.

    Args:
        start: Weights before training, shape ``(D,)``, float32, finite.
        trained: Weights after it, likewise, but for values that may not be finite.
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
    """What a client under client-level privacy answers.

    Its number of examples stays on the client, as all updates weigh the same, and so do its
    metrics, but for the epsilon of its examples.

    Raises:
        InvalidUpdate: the server named no bound.
    """
    if not 0 < instruction.clip_norm < math.inf:
        raise InvalidUpdate(
            f"round {instruction.round}: privacy.unit = {privacy.unit!r}, and the server's message "
            "names no bound for the update. None was sent; server and client must run the same "
            "version."
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
