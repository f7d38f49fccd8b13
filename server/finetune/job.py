"""What a fine-tuning process is told: plain values, so that it can be started anywhere."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fedcore.config.run import RunConfig


@dataclass(frozen=True)
class Job:
    """One launch: train the same network from one or more starting points, one after the other."""

    run: str
    """The run's configuration as JSON."""
    base: str
    """The folder that the configuration's paths start from."""
    starts: tuple[str, ...]
    """Safetensors files to start from; each is replaced by ``<file>.trained``."""
    folder: str
    """Where starts lie, and where a process that fails says why."""

    @property
    def config(self) -> RunConfig:
        """The configuration that the job was made from."""
        config = RunConfig.model_validate_json(self.run)
        return config.model_copy(update={"base": Path(self.base)})

    def error_file(self, rank: int) -> Path:
        """Where process ``rank`` writes why it failed."""
        return Path(self.folder) / f"error-{rank}.json"


def trained(start: Path) -> Path:
    """Where the result of a starting point is written."""
    return start.with_name(start.name + ".trained")
