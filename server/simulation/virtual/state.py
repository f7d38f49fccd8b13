"""State of a simulation's virtual clients between rounds."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Literal

from fedcore.privacy.ledger import Ledger
from server.records import RoundRecord, VirtualRecord

Method = Literal["loop", "vectorised"]
"""Training method: clients one after the other with the devices' ClientApp, or in batches."""


@dataclass(frozen=True)
class Choice:
    """Training method and its reason; part of a run's record, since it affects the last bits."""

    method: Method
    loop_s: float | None
    """Seconds per client, one after the other; None where it was not measured."""
    vectorised_s: float | None
    """Seconds per client, in batches; None where it was not measured."""
    reason: str


@dataclass
class SimulationState:
    """What clients have spent and how often they trained; nothing for clients never asked.

    With the server's own state and the seed, it determines everything that follows.
    """

    ledgers: dict[str, Ledger] = field(default_factory=dict)
    """Privacy ledgers of clients, by name."""
    rounds: Counter[str] = field(default_factory=Counter)
    """How often each client was asked to train, by name."""
    clock_s: float = 0.0
    """Time on the virtual clock."""
    choice: Choice | None = None
    """How clients are trained; None until the first ones are."""
    last: VirtualRecord | None = None
    """The last round on the virtual clock, in this process; None without device classes or a
    trace."""
    locals: dict[str, bytes] = field(default_factory=dict)
    """Local layers of clients, see `fedcore.updates.local`, by name."""

    def with_clock(self, record: RoundRecord) -> RoundRecord:
        """Returns the last round's record with its time on the virtual clock, if it has one."""
        return replace(record, virtual=self.last)
