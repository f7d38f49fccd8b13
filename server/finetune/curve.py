"""The course of a training: losses and speed of its steps, kept in memory or in a file."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from server.finetune.control import Exchanged


@dataclass
class Curve:
    """Losses and speed of the steps so far, without steps that a return to a checkpoint undid."""

    path: Path | None = None
    """File that keeps the course, one JSON object a line; None to keep it in memory alone."""
    parts: list[Exchanged] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.path is not None:
            self.parts = _read(self.path)

    @property
    def losses(self) -> tuple[float, ...]:
        """Mean loss of each step."""
        return tuple(loss for part in self.parts for loss in part.losses)

    def append(self, part: Exchanged) -> None:
        """Adds the steps since the last part."""
        self.parts.append(part)
        if self.path is not None:
            with self.path.open("a") as stream:
                stream.write(json.dumps(asdict(part)) + "\n")

    def rewind(self, step: int) -> None:
        """Keeps the course up to ``step``, from which training continues."""
        self.parts = [part for part in self.parts if part.first_step + len(part.losses) <= step]
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            lines = [json.dumps(asdict(part)) + "\n" for part in self.parts]
            self.path.write_text("".join(lines))


def _read(path: Path) -> list[Exchanged]:
    if not path.is_file():
        return []
    lines = path.read_text().split("\n")[:-1]  # the last line may be incomplete
    found = []
    for line in lines:
        try:
            read = json.loads(line)
            lists = {name: tuple(value) for name, value in read.items() if isinstance(value, list)}
            found.append(Exchanged(**(read | lists)))
        except (ValueError, TypeError, AttributeError):
            continue  # a process was killed while it wrote this line, or it has other fields
    return found
