"""The result of a simulation: history, models and metrics, and the input of later steps."""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass, field
from importlib import import_module
from os import PathLike
from pathlib import Path
from typing import Any

from fedcore.config.run import RunConfig
from fedcore.errors import ConfigError, ResourceError
from fedcore.observability.words import counted, figure
from fedcore.task.definition import Task
from fedcore.task.model import FullModel
from server.compression.compressed import Compressed
from server.records import ClientRecord, RoundRecord, RunRecord
from server.release.draft import Origin
from server.report.notebook import Plot


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
        """Returns the number of rounds."""
        return len(self.rounds)

    def rows(self) -> list[dict[str, Any]]:
        """Returns one flat dict per round: its fields, and each metric and setting by its name.

        Where clients evaluate rounds, ``mean_of_clients`` names the metrics that are means of the
        clients' values; others are values over all of their examples. A metric whose name is that
        of a field, such as ``seconds``, is stored as ``seconds_metric``.
        """
        rows = []
        for each in self.rounds:
            row = asdict(each)
            metrics, virtual, client = row.pop("metrics"), row.pop("virtual"), row.pop("client")
            sources = row.pop("sources")
            fixed = {**row, **(virtual or {}), **client}
            if sources:
                means = [name for name, source in sources.items() if source["averaged"]]
                fixed["mean_of_clients"] = ", ".join(means)
            named = {f"{name}_metric" if name in fixed else name: metrics[name] for name in metrics}
            rows.append({**fixed, **named})
        return rows

    def to_pandas(self) -> Any:
        """Returns the rows as a `pandas.DataFrame`, indexed by round.

        Raises:
            ConfigError: pandas is not installed.
        """
        try:
            pandas = import_module("pandas")
        except ImportError:
            raise ConfigError(
                "history.to_pandas() needs pandas, which is not installed: `pip install pandas`, "
                "or use history.rows()."
            ) from None
        rows = self.rows()
        return pandas.DataFrame(rows).set_index("round") if rows else pandas.DataFrame()


@dataclass(frozen=True, repr=False)
class Result:
    """The result of a simulation, from which fine-tuning, compression and release continue.

    A notebook shows the result as a plot of its rounds.

    Example::

        result = fedcore.simulate("task.py", "run.toml")
        result.metrics["accuracy"]["released"]
        result.model(inputs)  # a torch module
        result.save("runs/kept")  # the report, the candidates, the checkpoints
    """

    record: RunRecord
    """The complete record of the run, from which the report is made."""
    task: Task
    """The task that was trained."""
    run: RunConfig
    """The run, with all of its settings."""
    model: FullModel
    """The final model, preprocessing included: fine-tuned, or that of ``federated`` if there was no
    fine-tuning or the gate rejected its result. On the CPU, in evaluation mode; takes raw inputs
    ``(B, ...)``."""
    federated: FullModel
    """The model of the best round, or of the last one if no data judged them, preprocessing
    included, on the CPU in evaluation mode: the starting point of `fedcore.finetune`."""
    compressed: Compressed
    """All compression candidates and the choice among them; `fedcore.publish` signs the chosen
    one."""
    origin: Origin
    """Provenance and privacy of the rounds, for the manifest of a release."""
    summary: dict[str, Any]
    """The content of ``summary.json``."""
    folder: Path
    """The folder of the run's files: report, candidates, checkpoints. Deleted with this object
    unless ``runs`` was given."""
    _kept: object = field(default=None, compare=False)

    @property
    def history(self) -> History:
        """The history of rounds."""
        return History(self.record.rounds)

    @property
    def metrics(self) -> dict[str, dict[str, float]]:
        """Scores on the final test split, by metric and then by model; empty without one.

        Models are ``federated`` and ``released``, and with fine-tuning also ``finetuned`` and
        ``cloud_alone``.
        """
        return self.record.scores

    @property
    def clients(self) -> tuple[ClientRecord, ...]:
        """One record per client: number of examples, metric, rounds and privacy spent."""
        return self.record.clients

    def plot(self) -> Plot | None:
        """Plots the primary metric and epsilon by round, as SVG text that a notebook renders.

        Returns:
            The plot; None if there are no rounds to plot.
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
        """Returns the run's name, number of rounds, and each model's primary test metric."""
        primary, rounds = self.record.primary, counted(len(self.record.rounds), "round")
        scores = self.metrics.get(primary, {}).items()
        figures = ", ".join(f"{name} {figure(value)}" for name, value in scores)
        return f"<Result {self.record.name!r}: {rounds}; {primary}: {figures}>"

    def _repr_html_(self) -> str:
        """Returns the HTML that a notebook shows."""
        return self.plot() or ""

    def save(self, folder: str | PathLike[str]) -> Path:
        """Copies the run's files to a new folder.

        Returns:
            The path of the new folder.

        Raises:
            ConfigError: the folder exists already.
            ResourceError: it cannot be written; nothing of it is left.
        """
        path = Path(folder)
        if path.exists():
            raise ConfigError(f"{path}: it already exists. Nothing was saved; choose another path.")
        try:
            shutil.copytree(self.folder, path)
        except OSError as error:
            shutil.rmtree(path, ignore_errors=True)
            raise ResourceError(
                f"{path}: cannot write it ({error}). Nothing was saved; free some space, or "
                "choose a folder that is writable by this user."
            ) from error
        return path
