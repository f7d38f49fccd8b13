"""The job description of a fine-tuning process: plain values, so that it can be spawned."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fedcore.config.run import RunConfig
from fedcore.files import sha256_hex


@dataclass(frozen=True)
class Job:
    """One launch: trains a network from one or more starting points, one after the other."""

    run: str
    """The run's configuration as JSON."""
    base: str
    """Base folder of the configuration's relative paths."""
    starts: tuple[str, ...]
    """Safetensors files to start from; results are written to ``<file>.trained``."""
    folder: str
    """Folder of the starting points, and of the error files of failed processes."""
    models: tuple[str, ...]
    """What each starting point becomes, as `TrainingAdvanced.model` says it."""
    places: tuple[str | None, ...]
    """Folder of the checkpoints for each starting point, named by its identity; None for none."""
    unused: bool = False
    """Whether some step leaves a parameter without a gradient, as an earlier launch has shown."""
    joins: bool = False
    """Whether this machine takes the starting points, and leaves results, to another one."""

    @property
    def config(self) -> RunConfig:
        """The run's configuration."""
        config = RunConfig.model_validate_json(self.run)
        return config.model_copy(update={"base": Path(self.base)})

    def error_file(self, rank: int) -> Path:
        """Returns the file in which process ``rank`` reports its failure."""
        return Path(self.folder) / f"error-{rank}.json"

    def curve_file(self, number: int) -> Path:
        """Returns the file for the course of training from a starting point."""
        place = self.places[number]
        return Path(place or self.folder) / f"curve-{number}.jsonl"

    @property
    def notes_file(self) -> Path:
        """The file to which the first process appends notes for the user, one a line."""
        return Path(self.folder) / "notes"

    @property
    def progress_file(self) -> Path:
        """The file to which the first process appends events, one a line."""
        return Path(self.folder) / "progress.jsonl"

    @property
    def stop_file(self) -> Path:
        """The file whose existence asks processes to write a checkpoint and end."""
        return Path(self.folder) / "stop"


def settings_digest(run: RunConfig) -> int:
    """Returns a number of 63 bits that nodes with other settings for fine-tuning don't have."""
    own = {"processes", "rendezvous", "rendezvous_s", "max_restarts", "checkpoints"}
    shared = run.finetune.model_dump_json(exclude=own)
    text = f"{shared} {run.finetune.checkpoints is None} {run.seed} {run.client.local}"
    return int(sha256_hex(text.encode())[:15], 16)


def remember_by_start(run: RunConfig, starts: int) -> list[float]:
    """Returns how much each starting point remembers; only the first one is a federated model.

    Nothing where layers stay on clients: the model's own ones are untrained.
    """
    return [0.0 if run.client.local else run.finetune.remember, *[0.0] * (starts - 1)]


def trained(start: Path) -> Path:
    """Returns the file for the result of a starting point."""
    return start.with_name(start.name + ".trained")


_COURSE = (
    *("epochs", "batch_size", "learning_rate", "momentum", "nesterov", "weight_decay"),
    *("max_grad_norm", "optimizer", "holdout", "precision", "accumulate_steps", "compile", "fused"),
    *("schedule", "warmup_steps", "communication", "powersgd_rank"),
)
"""Settings that a continuation from a checkpoint must share."""


def places_of(run: RunConfig, starts: Sequence[bytes], examples: int) -> tuple[Path | None, ...]:
    """Returns the folder for the checkpoints of each starting point; None where none are written.

    Its name is a digest of the start, the data's size and the settings that determine the course of
    training. The number of processes is not among them.
    """
    if run.finetune.checkpoints is None:
        return (None,) * len(starts)
    course = {name: getattr(run.finetune, name) for name in _COURSE}
    if run.finetune.private:
        course["privacy"] = run.finetune.privacy.model_dump(mode="json", exclude={"ledger"})
    found = list[Path | None]()
    for start, remember in zip(starts, remember_by_start(run, len(starts)), strict=True):
        identity = {
            "start": sha256_hex(start),
            "examples": examples,
            "seed": run.seed,
            "task": run.task,
            "remember": remember,
            **course,
        }
        name = sha256_hex(json.dumps(identity, sort_keys=True).encode())[:32]
        found.append(run.path(run.finetune.checkpoints) / run.name / name)
    return tuple(found)
