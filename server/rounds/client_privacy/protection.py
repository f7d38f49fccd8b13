"""State of client-level privacy between rounds; does not import torch.

It is part of a run's `Progress`, so each commit of a model includes its privacy cost.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class ClientPlan:
    """Parameters of client-level privacy, fixed before the first round."""

    clients: int
    """Number of clients that rounds draw from."""
    expected: int
    """Expected number of clients per round; the divisor of every noised sum, however many reply."""
    noise_multiplier: float
    """Deviation of the noise on a sum of updates, divided by the bound on one update."""
    separation: int | None
    """Number of consecutive rounds in which no client is asked twice; None where each round
    draws independently."""

    @property
    def sample_rate(self) -> float:
        """Probability of asking a client, where accounting relies on it; else 1."""
        return self.expected / self.clients if self.separation is None else 1.0


@dataclass(frozen=True)
class Protection:
    """State of client-level privacy after a round."""

    plan: ClientPlan
    clip_norm: float
    """Bound on the next round's updates."""
    recent_cohorts: tuple[tuple[int, ...], ...] = ()
    """Nodes of the last ``separation - 1`` rounds, the latest last."""
    noise: tuple[NDArray[np.float64], ...] = field(default=(), compare=False)
    """Correlated noise that recent rounds added, the latest last."""


def protection_doc(protection: Protection | None) -> dict[str, Any] | None:
    """Returns the state as JSON values, without the noise, whose vectors are stored separately."""
    if protection is None:
        return None
    plan = protection.plan
    return {
        "clients": plan.clients,
        "expected": plan.expected,
        "noise_multiplier": plan.noise_multiplier,
        "separation": plan.separation,
        "clip_norm": protection.clip_norm,
        "asked": [list(nodes) for nodes in protection.recent_cohorts],
        "noise": len(protection.noise),
    }


def protection_of(
    doc: Mapping[str, Any] | None, noise: Sequence[NDArray[np.float64]]
) -> Protection | None:
    """Restores the state from the output of `protection_doc` and the noise vectors.

    Raises:
        KeyError: ``doc`` is not the output of `protection_doc`.
    """
    if doc is None:
        return None
    return Protection(
        ClientPlan(doc["clients"], doc["expected"], doc["noise_multiplier"], doc["separation"]),
        doc["clip_norm"],
        tuple(tuple(nodes) for nodes in doc["asked"]),
        tuple(noise),
    )


def noise_of(protection: Protection | None) -> tuple[NDArray[np.float64], ...]:
    """Returns the noise vectors, which are stored separately from `protection_doc`."""
    return () if protection is None else protection.noise
