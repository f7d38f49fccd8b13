"""What is asked of the virtual clients of a round, and what they answer."""

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
    """One virtual client that is asked for something."""

    node: int
    name: str
    ledger: Ledger | None
    """What it has spent so far; None where it keeps none."""


@dataclass(frozen=True)
class RoundTask:
    """What a round asks of all of its clients."""

    kind: str
    """Type of the message."""
    content: RecordDict
    configs: Mapping[int, ConfigRecord] = field(default_factory=dict)
    """Configuration in place of the content's own, by node: settings of single clients."""
    method: Method = "loop"
    chosen: bool = False
    """Whether ``method`` was tried on the run's first clients: whoever it cannot take goes
    alone."""
    fold: bool = False
    """Whether updates are added up where they are made, and only sums travel."""
    uniform: bool = False
    """Whether every update weighs the same."""
    clock_s: float = 0.0
    """The virtual clock at the start of the round."""
    deadline_s: float = float("inf")
    """On the virtual clock, from the start of the round."""


@dataclass(frozen=True)
class ClientOutcome:
    """What became of one client."""

    asked: ClientRef
    content: RecordDict | None = None
    """Its reply; None where it was folded into a sum, or failed."""
    num_examples: int = 0
    """Of an update that was folded."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Of an update that was folded."""
    error: tuple[int, str] | None = None
    """Code and reason, where it failed or declined."""
    ledger: Ledger | None = None
    """What it has spent now."""
    fate: Fate | None = None
    """What its device did on the virtual clock; None without device classes."""
    skipped: int = 0
    """Places in its batches that counted as zero; told to whoever runs the simulation alone."""


def instruction_for(order: RoundTask, one: ClientRef, instruction: Instruction) -> Instruction:
    """What an order asks of one client: ``instruction``, with settings of its own if it has any.

    Raises:
        InvalidUpdate: these are no settings.
    """
    if one.node not in order.configs:
        return instruction
    return replace(read_instruction(content_for(order, one)), weights=instruction.weights)


def content_for(order: RoundTask, one: ClientRef) -> RecordDict:
    """The same as the content of a message."""
    config = order.configs.get(one.node)
    return order.content if config is None else RecordDict({**order.content, CONFIG: config})
