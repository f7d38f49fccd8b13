"""What a run has reported so far, for operators who ask: rounds, notes, and what it does now."""

from __future__ import annotations

import json
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from fedcore.observability.console import training_text
from fedcore.observability.events import (
    Event,
    Noted,
    RoundFinished,
    StageAdvanced,
    StageStarted,
    TrainingAdvanced,
    json_line,
)

_ROUNDS_SHOWN, _NOTES_SHOWN = 1000, 20
_STAGES = {"finetune": "fine-tuning", "compress": "compression"}


@dataclass
class RecentEvents:
    """The latest events of a run. The caller holds a lock."""

    rounds: deque[dict[str, Any]] = field(default_factory=lambda: deque(maxlen=_ROUNDS_SHOWN))
    notes: deque[str] = field(default_factory=lambda: deque(maxlen=_NOTES_SHOWN))
    stage: str = ""
    """Current step after the rounds; empty during the rounds."""
    training: str = ""
    """How far a training in the cloud has come; empty where none is under way."""
    waits: str = ""
    """What the current round waits for; empty where it has not waited long."""

    def record(self, event: Event) -> None:
        """Records an event."""
        if not isinstance(event, Noted):
            self.training = training_text(event) if isinstance(event, TrainingAdvanced) else ""
        if isinstance(event, RoundFinished):
            self.waits = ""
            self.rounds.append(json.loads(json_line(event)))
        elif isinstance(event, Noted):
            self.notes.append(event.text)
        elif isinstance(event, StageAdvanced) and event.stage == "rounds":
            self.waits = event.note
        elif isinstance(event, StageStarted):
            self.stage, self.waits = _STAGES.get(event.stage, event.stage), ""
