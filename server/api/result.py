"""What a simulation leaves: rounds, models, figures, and what later steps go on from."""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass, field
from importlib import import_module
from os import PathLike
from pathlib import Path
from typing import Any

from fedcore.config.run import RunConfig
from fedcore.errors import ConfigError
from fedcore.observability.words import counted, figure
from fedcore.task.definition import Task
from fedcore.task.model import FullModel
from server.compression.compress import Compressed
from server.records import ClientRecord, RoundRecord, RunRecord
from server.release.publish import Origin


@dataclass(frozen=True)
class History:
    """The rounds of a run, in order.

    Example::

        history = fedcore.simulate("task.py", "run.toml").history
        history.rows()[-1]["accuracy"]  # a flat row a round
        history.to_pandas().plot(y="accuracy")
    """

    rounds: tuple[RoundRecord, ...]

    def __len__(self) -> int:
        """How many rounds there were."""
        return len(self.rounds)

    def rows(self) -> list[dict[str, Any]]:
        """A flat row for each round: its figures, and each metric under its own name."""
        rows = []
        for each in self.rounds:
            row = asdict(each)
            metrics, virtual = row.pop("metrics"), row.pop("virtual")
            rows.append({**row, **(virtual or {}), **metrics})
        return rows

    def to_pandas(self) -> Any:
        """The rows as a `pandas.DataFrame`, indexed by round.

        Raises:
            ConfigError: pandas is not installed.
        """
        try:
            pandas = import_module("pandas")
        except ImportError:
            raise ConfigError(
                "history.to_pandas() needs pandas, which is not installed: `pip install pandas`, "
                "or take history.rows()."
            ) from None
        rows = self.rows()
        return pandas.DataFrame(rows).set_index("round") if rows else pandas.DataFrame()


class Plot(str):
    """An ``<svg>`` element; a notebook draws it."""

    def _repr_html_(self) -> str:
        return str(self)


@dataclass(frozen=True, repr=False)
class Result:
    """What a simulation left, and what fine-tuning, compression and release go on from.

    A notebook shows it as a plot of its rounds.

    Example::

        result = fedcore.simulate("task.py", "run.toml")
        result.metrics["accuracy"]["released"]
        result.model(inputs)  # a torch module
        result.save("runs/kept")  # the report, the candidates, the checkpoints
    """

    record: RunRecord
    """Everything that the report shows."""
    task: Task
    """The task that was trained."""
    run: RunConfig
    """The run, with all of its settings."""
    model: FullModel
    """Preprocessing and network behind fine-tuning, or of the best round where there was none or
    the gate closed; on the CPU, in evaluation mode. Takes raw inputs ``(B, ...)``."""
    federated: FullModel
    """The model of the best round, likewise: what `fedcore.finetune` begins with."""
    compressed: Compressed
    """The candidates, and which was chosen: what `fedcore.publish` signs."""
    origin: Origin
    """What the manifest of a release says of the rounds."""
    summary: dict[str, Any]
    """What ``summary.json`` holds."""
    folder: Path
    """Where its files lie: report, candidates, checkpoints. It is gone with this object, unless
    ``runs`` was named."""
    _kept: object = field(default=None, compare=False)

    @property
    def history(self) -> History:
        """The rounds."""
        return History(self.record.rounds)

    @property
    def metrics(self) -> dict[str, dict[str, float]]:
        """Scores on the final test split, by metric and then by model.

        Models are ``federated``, ``released``, and behind fine-tuning ``finetuned`` and
        ``cloud_alone``.
        """
        return self.record.scores

    @property
    def clients(self) -> tuple[ClientRecord, ...]:
        """Each client with its examples, its metric, its rounds and what it spent."""
        return self.record.clients

    def plot(self) -> Plot | None:
        """The primary metric, and epsilon, by round: the text of an SVG, which a notebook draws.

        Returns:
            None where there were no rounds to draw.
        """
        from server.report.plots import rounds_plot

        drawn = rounds_plot(
            self.record.rounds,
            primary=self.record.primary,
            higher_is_better=self.record.higher_is_better,
            best_round=self.record.best_round,
        )
        return None if drawn is None else Plot(drawn)

    def __repr__(self) -> str:
        """The run, and the primary metric of each model on the final test split."""
        primary, rounds = self.record.primary, counted(len(self.record.rounds), "round")
        scores = self.metrics.get(primary, {}).items()
        figures = ", ".join(f"{name} {figure(value)}" for name, value in scores)
        return f"<Result {self.record.name!r}: {rounds}; {primary}: {figures}>"

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        return self.plot() or ""

    def save(self, folder: str | PathLike[str]) -> Path:
        """Copies the run's files to a folder that is not there yet.

        Returns:
            That folder.

        Raises:
            ConfigError: it is there.
        """
        path = Path(folder)
        if path.exists():
            raise ConfigError(f"{path}: it is there already. Nothing was saved; name another.")
        shutil.copytree(self.folder, path)
        return path
