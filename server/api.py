"""fedcore from Python: a simulation as a call, and what it leaves as an object.

`fedcore.simulate` is this room's; ``fedcore simulate`` does the same from a run's file.
"""

from __future__ import annotations

import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from importlib import import_module
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from fedcore.config.owner import OPEN_POLICY, OwnerPolicy, tighten
from fedcore.config.run import RunConfig
from fedcore.config.settings import load_run, with_settings
from fedcore.errors import ConfigError
from fedcore.files import read_bytes
from fedcore.flower.quiet import quiet
from fedcore.observability.console import choose
from fedcore.observability.events import Sink, tee, unhurried
from fedcore.observability.jsonl import json_lines
from fedcore.observability.words import counted
from fedcore.task.definition import Task, load_task
from fedcore.task.model import MAX_CHECKPOINT_BYTES, FullModel, build_model, load_checkpoint
from fedcore.training.device import available
from server.preflight import Prepared, prepare
from server.records import ClientRecord, Finished, RoundRecord, RunRecord
from server.report.folder import open_folder, write_results
from server.report.tensorboard import tensorboard_events
from server.rounds.own_strategy import Own, check_own, label_of
from server.simulation.checkpoint import Checkpoint
from server.simulation.run import run_pipeline
from server.unfinished import drop_all, refuse_to_drop

_UNNAMED = re.compile(r"[^a-z0-9_-]+")  # what the name of a run may not have
_MOST_NAMED = 64


@dataclass(frozen=True)
class History:
    """The rounds of a run, in order."""

    rounds: tuple[RoundRecord, ...]

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
        return pandas.DataFrame(self.rows()).set_index("round")


@dataclass(frozen=True)
class Result:
    """What a simulation left."""

    record: RunRecord
    """Everything that the report shows."""
    model: FullModel = field(repr=False)
    """Preprocessing and network behind fine-tuning, or of the best round where there was none or
    the gate closed; on the CPU, in evaluation mode."""
    summary: dict[str, Any] = field(repr=False)
    """What ``summary.json`` holds."""
    folder: Path
    """Where its files lie: report, candidates, checkpoints. It is gone with this object, unless
    ``runs`` was named."""
    _kept: object = field(default=None, repr=False, compare=False)

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

    def plot(self) -> str | None:
        """The primary metric, and epsilon, by round, as an ``<svg>`` element; None without any."""
        from server.report.plots import rounds_plot

        return rounds_plot(
            self.record.rounds,
            primary=self.record.primary,
            higher_is_better=self.record.higher_is_better,
            best_round=self.record.best_round,
        )

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        return self.plot() or ""

    def save(self, folder: str | PathLike[str]) -> Path:
        """Copies the run's files to a folder that is not there yet.

        Raises:
            ConfigError: it is there.
        """
        path = Path(folder)
        if path.exists():
            raise ConfigError(f"{path}: it is there already. Nothing was saved; name another.")
        shutil.copytree(self.folder, path)
        return path


def simulate(
    task: Task | str | PathLike[str],
    run: RunConfig | str | PathLike[str] | None = None,
    *,
    owner: OwnerPolicy = OPEN_POLICY,
    runs: str | PathLike[str] | None = None,
    fresh: bool = False,
    progress: bool = True,
    strategy: Own | type[Own] | str | None = None,
    **settings: Any,
) -> Result:
    """Trains over simulated clients, then fine-tunes, compresses, tests and publishes.

    Example:
        ``fedcore.simulate(task, "run.toml", federation={"rounds": 20}, seed=3)``

    Args:
        task: A task, or the file that defines one. One that was made in memory, as in a notebook,
            is neither fine-tuned nor trained by several processes on GPUs: those load a task from
            its file.
        run: The run, or its file; a run with every setting's default when None.
        owner: What every virtual client keeps to.
        runs: A folder: results go to the folder of the run's name in it, in place of a complete
            run that was there. A folder that lives as long as the result when None.
        fresh: A run that was interrupted there is replaced, too; it is an error otherwise.
        progress: Whether progress is written to standard error.
        strategy: In place of the run's: a `fedcore.Algorithm` or a strategy of Flower's kind, as
            an instance, a class, which gets ``strategy_options``, or a name.
        settings: Sections or settings of the run that are to be others.

    Raises:
        FedcoreError: whatever is wrong or fails, as the command line says it. Nothing is printed
            but progress, and the process goes on.
    """
    asked, own = _with_strategy(_configured(task, run, settings), strategy)
    kept = tempfile.TemporaryDirectory(prefix="fedcore-run-") if runs is None else None
    try:
        base = Path(kept.name) if kept is not None else Path(runs or ".")
        with _loaded(task, asked) as (loaded, configured):
            quiet()
            prepared = prepare(configured, loaded, owner, base / configured.name, strategy=own)
            with (
                open_folder(
                    configured, base, before=drop_all if fresh else refuse_to_drop
                ) as folder,
                choose(sys.stderr, json=False) if progress else nullcontext(tee()) as shown,
            ):
                finished, summary = run_in(
                    folder,
                    configured,
                    loaded,
                    owner,
                    prepared,
                    shown,
                    command="fedcore.simulate(...)",
                    started=time.monotonic(),
                )
                model = _model(folder, loaded, configured)
    except BaseException:
        if kept is not None:
            kept.cleanup()
        raise
    return Result(finished.record, model, summary, folder, kept)


def run_in(
    folder: Path,
    run: RunConfig,
    task: Task,
    owner: OwnerPolicy,
    prepared: Prepared,
    shown: Sink,
    *,
    command: str,
    started: float,
    resumed: Checkpoint | None = None,
) -> tuple[Finished, dict[str, Any]]:
    """Runs the whole loop and writes everything that a run leaves in its folder.

    Args:
        folder: The run's, open.
        run: The run.
        task: Its task.
        owner: What virtual clients keep to.
        prepared: What it works on.
        shown: Told what happens, beside the run's files.
        command: What goes on with the run where it is interrupted.
        started: The monotonic time that it began at.
        resumed: Where an earlier process stopped.

    Returns:
        What it left, and what ``summary.json`` holds.
    """
    with (
        json_lines(folder / "metrics.jsonl") as lines,
        tensorboard_events(folder / "tensorboard") as board,
        unhurried(tee(lines, board, shown)) as emit,
    ):
        files = tee(lines, board)
        for event in resumed.told if resumed else ():
            files(event)
        finished = run_pipeline(
            run, task, owner, prepared, folder, emit, command=command, resumed=resumed
        )
    delta = tighten(run, owner).privacy.target_delta if run.private else None
    taken_s = time.monotonic() - started + (resumed.elapsed_s if resumed else 0.0)
    return finished, write_results(folder, finished, target_delta=delta, seconds=taken_s)


def _configured(
    task: Task | str | PathLike[str],
    run: RunConfig | str | PathLike[str] | None,
    settings: Mapping[str, Any],
) -> RunConfig:
    file = None if isinstance(task, Task) else Path(task).resolve()
    if run is None:
        named = (task.name if isinstance(task, Task) else Path(task).stem).lower()
        name = _UNNAMED.sub("-", named).lstrip("-_")[:_MOST_NAMED] or "run"
        found = RunConfig(name=name, task="task.py")
    else:
        found = run if isinstance(run, RunConfig) else load_run(Path(run))
    if file is not None:
        found = found.model_copy(update={"task": str(file)})
    return with_settings(found, settings)


def _with_strategy(
    run: RunConfig, strategy: Own | type[Own] | str | None
) -> tuple[RunConfig, Own | type[Own] | None]:
    """The run with that strategy, and the strategy itself where it was made in Python.

    Raises:
        ConfigError: it is none.
    """
    if strategy is None:
        return run, None
    if isinstance(strategy, str):
        return with_settings(run, {"federation": {"strategy": strategy}}), None
    check_own(strategy)
    options = run.federation.strategy_options if isinstance(strategy, type) else {}
    named = {"strategy": label_of(strategy), "strategy_options": options}
    federation = run.federation.model_copy(update=named)
    return run.model_copy(update={"federation": federation}), strategy


@contextmanager
def _loaded(task: Task | str | PathLike[str], run: RunConfig) -> Iterator[tuple[Task, RunConfig]]:
    """The task, and the run with the file that it is from.

    A task that was made in memory has one meanwhile, as its digest stands in the run's identity.

    Raises:
        ConfigError: some of the steps of a task without a file run in processes that would load it.
        TaskError: there is no such file, or no task in it.
    """
    if not isinstance(task, Task):
        yield load_task(run.path(run.task)), run
        return
    needs = []
    if task.cloud_data is not None and run.finetune.epochs:
        needs.append(f"finetune.epochs = {run.finetune.epochs}")
    if run.simulation.engine == "ray":
        needs.append("simulation.engine = 'ray'")
    gpus = torch.cuda.device_count() if available(run.client.device).type == "cuda" else 0
    if gpus and (run.simulation.workers or gpus) > 1:
        needs.append(f"simulation.workers = {run.simulation.workers} with {counted(gpus, 'GPU')}")
    if needs:
        raise ConfigError(
            f"{' and '.join(needs)}: this starts processes that load the task from its file, and "
            f"task {task.name!r} was made in memory. Nothing was run; write it to a file and give "
            "that one's name in its place, or pass finetune={'epochs': 0} and "
            "simulation={'engine': 'local', 'workers': 1}."
        )
    with tempfile.TemporaryDirectory(prefix="fedcore-task-") as folder:
        path = Path(folder) / "task.py"
        path.write_text(f"# task {task.name!r} was made in memory\n")
        yield task, run.model_copy(update={"task": str(path)})


def _model(folder: Path, task: Task, run: RunConfig) -> FullModel:
    names = ("finetuned.safetensors", "global.safetensors")
    path = next(folder / name for name in names if (folder / name).is_file())
    model = build_model(task, run)
    raw = read_bytes(path, max_bytes=MAX_CHECKPOINT_BYTES, what="a checkpoint")
    load_checkpoint(raw, model, where=str(path))
    return model.eval()
