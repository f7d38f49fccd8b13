"""Who takes part in a round."""

from __future__ import annotations

import math
from collections.abc import Iterable

from fedcore.config.run import RunConfig
from fedcore.errors import RoundFailed
from fedcore.observability.words import counted, is_or_are
from fedcore.seeds import numpy_rng

_ROUNDING = 1e-9  # 100 times 1.1 is a little more than 110 in floating point


def asked_for(run: RunConfig, cohort: int, *, simulated: bool) -> int:
    """How many clients a round asks, where so many are there, to get ``cohort`` updates in time.

    In a simulation without devices nobody is late, so nobody is asked in addition.
    """
    if simulated and not (run.simulation.devices or run.simulation.trace):
        return cohort
    return math.ceil(cohort * run.federation.over_selection - _ROUNDING)


def select(
    node_ids: Iterable[int], size: int, *, seed: int, words: tuple[str | int, ...]
) -> list[int]:
    """Draws ``size`` nodes without replacement, the same ones for the same seed and words.

    Raises:
        RoundFailed: there are fewer nodes than that.
    """
    nodes = node_ids if isinstance(node_ids, range) else sorted(node_ids)
    if len(nodes) < size:
        raise RoundFailed(
            f"{' '.join(map(str, words))}: {counted(len(nodes), 'client')} {is_or_are(len(nodes))} "
            "there, and federation.cohort "
            f"asks for {size}. The round was not begun; wait for more clients, or lower the cohort."
        )
    drawn = numpy_rng(seed, *words).choice(len(nodes), size=size, replace=False)
    return [nodes[index] for index in sorted(drawn)]
