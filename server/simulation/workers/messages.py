"""Messages between a simulation's grid and its workers: tasks of a round, outcomes of clients."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from flwr.app import ConfigRecord, RecordDict

from fedcore.privacy.ledger import Ledger
from fedcore.updates.messages import CONFIG, Instruction, read_instruction
from server.simulation.virtual.devices import Fate
from server.simulation.virtual.state import Method


@dataclass(frozen=True)
class ClientRef:
    """One virtual client that is sent a task."""

    node: int
    name: str
    ledger: Ledger | None
    """Privacy budget spent so far; None where the client has no ledger yet."""
    local: bytes = b""
    """Its local layers, see `fedcore.updates.local`; empty before its first round."""


@dataclass(frozen=True)
class RoundTask:
    """Task of a round for all of its clients."""

    kind: str
    """Flower message type."""
    content: RecordDict
    configs: Mapping[int, ConfigRecord] = field(default_factory=dict)
    """Configuration that replaces the content's own, by node, for clients with their own
    settings."""
    method: Method = "loop"
    chosen: bool = False
    """Whether ``method`` was tested on the run's first clients. A client that it does not
    support is then trained one by one."""
    fold: bool = False
    """Whether workers add updates up and return only sums."""
    uniform: bool = False
    """Whether every update has the same weight."""
    clock_s: float = 0.0
    """Virtual time at the start of the round."""
    deadline_s: float = float("inf")
    """In virtual time, from the start of the round."""


@dataclass(frozen=True)
class ClientOutcome:
    """Result of a round's task for one client."""

    client: ClientRef
    content: RecordDict | None = None
    """The reply; None where it was folded into a sum, failed or arrives too late."""
    num_examples: int = 0
    """Number of examples of a folded update."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Metrics of a folded update."""
    error: tuple[int, str] | None = None
    """Code and reason, where the client failed or declined."""
    ledger: Ledger | None = None
    """Privacy budget spent after the task."""
    local: bytes = b""
    """Its local layers after the task; empty where it has none, or has not trained."""
    fate: Fate | None = None
    """Course of the round for its device on the virtual clock; None without devices."""
    skipped: int = 0
    """Places in its batches that counted as zero; shown only to the user of the simulation."""


def instruction_for(order: RoundTask, one: ClientRef, instruction: Instruction) -> Instruction:
    """Returns ``instruction`` with the client's own settings, where the task has any.

    Raises:
        InvalidUpdate: the client's configuration is invalid.
    """
    if one.node not in order.configs:
        return instruction
    return replace(read_instruction(content_for(order, one)), weights=instruction.weights)


def content_for(order: RoundTask, one: ClientRef) -> RecordDict:
    """Returns the content of a message to the client, with its own configuration if it has one."""
    config = order.configs.get(one.node)
    return order.content if config is None else RecordDict({**order.content, CONFIG: config})
