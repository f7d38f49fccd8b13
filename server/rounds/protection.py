"""What client-level privacy remembers from round to round; brings no torch.

It is part of a run's progress, so that whoever commits a round commits with its model what the
model has cost.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class ClientPlan:
    """How a run protects its clients: fixed before its first round."""

    clients: int
    """Those that rounds draw from."""
    expected: int
    """Clients a round in expectation; what every noised sum is divided by, whoever answers."""
    noise_multiplier: float
    """Deviation of the noise on a sum of updates, over the bound of one."""
    separation: int | None
    """Rounds in which no client is asked twice; None where each round draws each client again."""

    @property
    def sample_rate(self) -> float:
        """The probability with which a client is asked, where epsilon counts on it; 1 elsewhere."""
        return self.expected / self.clients if self.separation is None else 1.0


@dataclass(frozen=True)
class Protection:
    """How far the protection of a run's clients is."""

    plan: ClientPlan
    clip_norm: float
    """The bound of the next round's updates."""
    asked: tuple[tuple[int, ...], ...] = ()
    """Nodes of the last ``separation - 1`` rounds, the latest last."""
    noise: tuple[NDArray[np.float64], ...] = field(default=(), compare=False)
    """Correlated noise that the last rounds added, the latest last."""


def protection_doc(protection: Protection | None) -> dict[str, Any] | None:
    """As JSON takes it, but for the noise, whose vectors are kept beside it."""
    if protection is None:
        return None
    plan = protection.plan
    return {
        "clients": plan.clients,
        "expected": plan.expected,
        "noise_multiplier": plan.noise_multiplier,
        "separation": plan.separation,
        "clip_norm": protection.clip_norm,
        "asked": [list(nodes) for nodes in protection.asked],
        "noise": len(protection.noise),
    }


def protection_of(
    doc: Mapping[str, Any] | None, noise: Sequence[NDArray[np.float64]]
) -> Protection | None:
    """What `protection_doc` described.

    Raises:
        KeyError: it describes none.
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
    """The vectors that are kept beside `protection_doc`."""
    return () if protection is None else protection.noise
