"""A round's cohort: its size, and the reproducible draw of its nodes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from fedcore.config.run import RunConfig
from fedcore.errors import RoundFailed
from fedcore.observability.words import counted, is_or_are
from fedcore.seeds import numpy_rng

_ROUNDING = 1e-9  # 100 * 1.1 is slightly more than 110 in floating point


class Draw(Protocol):
    """Draws a round's cohort among the nodes that are connected now.

    Raises:
        RoundFailed: fewer nodes are connected than the cohort has. With ``short``, fewer than its
            quorum.
    """

    def __call__(self, *, short: bool = False) -> Cohort: ...


@dataclass(frozen=True)
class Cohort:
    """The nodes that a round sends messages of one type, and what their replies weigh."""

    nodes: Sequence[int]
    weights: Mapping[int, int] | None = None
    """Weights of the replies, in examples, by node; None where each weighs what it reports."""


def selection_size(run: RunConfig, cohort: int, *, simulated: bool) -> int:
    """Returns how many clients a round asks, to get ``cohort`` updates before the deadline.

    A simulation without device classes or a trace has no stragglers, so it asks only ``cohort``.
    """
    if simulated and not (run.simulation.devices or run.simulation.trace):
        return cohort
    return math.ceil(cohort * run.federation.over_selection - _ROUNDING)


def quorum_of(quorum: float, clients: int) -> int:
    """Returns the smallest number of clients that meets the quorum."""
    return math.ceil(quorum * clients - _ROUNDING)


def select(
    node_ids: Iterable[int],
    size: int,
    *,
    seed: int,
    words: tuple[str | int, ...],
    least: int | None = None,
) -> list[int]:
    """Draws ``size`` nodes without replacement; the same seed, words and nodes give the same draw.

    With ``least``, it returns all nodes where there are fewer than ``size``, but at least these.

    Raises:
        RoundFailed: there are fewer nodes than needed.
    """
    nodes = node_ids if isinstance(node_ids, range) else sorted(node_ids)
    needed = size if least is None else min(least, size)
    if len(nodes) < needed:
        what = "federation.cohort" if least is None else "federation.quorum of federation.cohort"
        raise RoundFailed(
            f"{' '.join(map(str, words))}: {counted(len(nodes), 'client')} "
            f"{is_or_are(len(nodes))} connected, but {what} needs {needed}. The round "
            "was not started; start more clients, or start over with a lower cohort."
        )
    size = min(size, len(nodes))
    drawn = numpy_rng(seed, *words).choice(len(nodes), size=size, replace=False)
    return [nodes[index] for index in sorted(drawn)]
