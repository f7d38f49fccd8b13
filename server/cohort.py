"""Who takes part in a round."""

from __future__ import annotations

from collections.abc import Iterable

from fedcore.errors import RoundFailed
from fedcore.seeds import numpy_rng


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
            f"{' '.join(map(str, words))}: {len(nodes)} clients are there, and federation.cohort "
            f"asks for {size}. The round was not begun; wait for more clients, or lower the cohort."
        )
    drawn = numpy_rng(seed, *words).choice(len(nodes), size=size, replace=False)
    return [nodes[index] for index in sorted(drawn)]
