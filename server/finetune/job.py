"""The job description of a fine-tuning process: plain values, so that it can be spawned."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fedcore.config.run import RunConfig


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

    unused: bool = False
    """Whether some step leaves a parameter without a gradient, as an earlier launch has shown."""

    @property
    def config(self) -> RunConfig:
        """The run's configuration."""
        config = RunConfig.model_validate_json(self.run)
        return config.model_copy(update={"base": Path(self.base)})

    def error_file(self, rank: int) -> Path:
        """Returns the file in which process ``rank`` reports its failure."""
        return Path(self.folder) / f"error-{rank}.json"


def remember_by_start(run: RunConfig, starts: int) -> list[float]:
    """Returns how much each starting point remembers; only the first one is a federated model.

    Nothing where layers stay on clients: the model's own ones are untrained.
    """
    return [0.0 if run.client.local else run.finetune.remember, *[0.0] * (starts - 1)]


def trained(start: Path) -> Path:
    """Returns the file for the result of a starting point."""
    return start.with_name(start.name + ".trained")
