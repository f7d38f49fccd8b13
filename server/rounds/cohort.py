"""A round's cohort: its size, and the reproducible draw of its nodes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from fedcore.config.run import RunConfig
from fedcore.errors import RoundFailed
from fedcore.observability.words import counted, is_or_are
from fedcore.seeds import numpy_rng

_ROUNDING = 1e-9  # 100 * 1.1 is slightly more than 110 in floating point


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


def select(
    node_ids: Iterable[int], size: int, *, seed: int, words: tuple[str | int, ...]
) -> list[int]:
    """Draws ``size`` nodes without replacement; the same seed, words and nodes give the same draw.

    Raises:
        RoundFailed: there are fewer than ``size`` nodes.
    """
    nodes = node_ids if isinstance(node_ids, range) else sorted(node_ids)
    if len(nodes) < size:
        raise RoundFailed(
            f"{' '.join(map(str, words))}: {counted(len(nodes), 'client')} "
            f"{is_or_are(len(nodes))} connected, but federation.cohort needs {size}. The round "
            "was not started; wait for more clients, or lower the cohort."
        )
    drawn = numpy_rng(seed, *words).choice(len(nodes), size=size, replace=False)
    return [nodes[index] for index in sorted(drawn)]
