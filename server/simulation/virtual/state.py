"""What a simulation remembers of its virtual clients between rounds."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

from fedcore.privacy.ledger import Ledger

Method = Literal["loop", "vectorised"]
"""One client after the other by the ClientApp that devices run, or many side by side."""


@dataclass(frozen=True)
class Choice:
    """How clients are trained, and why; part of a run's record, for it decides the last bits."""

    method: Method
    loop_s: float | None
    """Seconds a client, one after the other; None where it was not measured."""
    vectorised_s: float | None
    """Seconds a client, side by side; None where it was not measured."""
    reason: str


@dataclass
class SimulationState:
    """Of clients that were never asked nothing is held, and of the others what they have spent.

    Together with the server's own state and the seed it fixes everything that follows.
    """

    ledgers: dict[str, Ledger] = field(default_factory=dict)
    """What clients have spent, by name."""
    rounds: Counter[str] = field(default_factory=Counter)
    """How often each client was asked to train, by name."""
    clock_s: float = 0.0
    """The virtual clock."""
    choice: Choice | None = None
    """How clients are trained; None until the first of them are."""
