"""`fedcore.simulate` and its implementation, which ``fedcore simulate`` shares.

In: a task, a run, the owner's policy and a results folder. Out: a `server.api.result.Result`.
"""

from __future__ import annotations

import sys
import tempfile
import time
from contextlib import nullcontext
from os import PathLike
from pathlib import Path
from typing import Any

from fedcore.config.owner import OPEN_POLICY, OwnerPolicy, tighten
from fedcore.config.run import RunConfig
from fedcore.errors import ConfigError
from fedcore.flower.quiet import quiet
from fedcore.observability.console import shown
from fedcore.observability.events import Sink, batched, tee
from fedcore.observability.foreign import say
from fedcore.observability.jsonl import json_lines
from fedcore.observability.patience import FIRST_STEP, note_if_slow
from fedcore.task.definition import Task
from server.after_rounds import Completed
from server.api.arguments import (
    AnyRun,
    AnyTask,
    configured,
    loaded,
    refuse_elsewhere,
    with_strategy,
)
from server.api.result import Result
from server.checking.before import refuse_bad_rows
from server.preflight import Prepared, prepare
from server.report.folder import open_folder, reopen_folder, write_results
from server.report.mlflow_runs import mlflow_run
from server.report.tensorboard import tensorboard_events
from server.rounds.strategies.own import UserStrategy
from server.simulation.checkpoint import Checkpoint
from server.simulation.resume import open_checkpoint
from server.simulation.run import run_pipeline
from server.unfinished import allow_drop, has_finished_round, require_no_progress


def simulate(
    task: AnyTask | None,
    run: AnyRun | None = None,
    *,
    owner: OwnerPolicy = OPEN_POLICY,
    runs: str | PathLike[str] | None = None,
    fresh: bool = False,
    resume: bool = False,
    progress: bool | Sink = True,
    strategy: UserStrategy | type[UserStrategy] | str | None = None,
    **settings: Any,
) -> Result:
    """Trains over simulated clients, then fine-tunes, compresses, tests and publishes.

    Example::

        result = fedcore.simulate(task, "run.toml", federation={"rounds": 20}, seed=3)
        result.metrics, result.history.to_pandas(), result.model

    Args:
        task: A task, or the file that defines one; None for the task that the run names. Forked
            workers train a task made in memory, for example in a notebook, and this process
            fine-tunes it. Spawned processes (several GPUs, Ray, distributed fine-tuning) can't load
            such a task; settings that need them are rejected before anything runs.
        run: The run, or its file; None for a run with default settings.
        owner: The policy that every virtual client enforces.
        runs: Parent folder of results. They go to the subfolder named after the run. When None, a
            temporary folder that is deleted with the result.
        fresh: Replace a complete or interrupted run in that subfolder, which is an error otherwise.
        resume: Resume the interrupted run in that subfolder from its last checkpoint; with a larger
            ``federation.rounds``, also a complete one, and with other settings of the later steps,
            one whose release failed. Whether a task or strategy made in memory is unchanged isn't
            checked.
        progress: Whether to show progress, on standard error or in the notebook's cell; or a
            callback that receives the events instead.
        strategy: Replaces the run's strategy: an instance or a class of `fedcore.Algorithm` or of
            Flower's ``Strategy``, or a name. A class receives ``strategy_options``.
        settings: Sections or settings of the run to override.

    Returns:
        The results of the run. If the final test withholds the model, ``record.withheld`` gives the
        reason; if publishing failed, ``record.unreleased`` does.

    Raises:
        FedcoreError: any failure, with the message that the command line shows. Only progress is
            printed, and the process keeps running.
    """
    config, own = with_strategy(configured(task, run, settings), strategy)
    return simulated(
        task,
        config,
        owner=owner,
        strategy=own,
        runs=runs,
        fresh=fresh,
        resume=resume,
        progress=progress,
        say_slow=progress is True,
        command="fedcore simulate RUN.toml",
    )


def simulated(
    task: AnyTask | None,
    run: RunConfig,
    *,
    owner: OwnerPolicy,
    runs: str | PathLike[str] | None,
    fresh: bool,
    resume: bool,
    progress: bool | Sink,
    say_slow: bool,
    command: str,
    strategy: UserStrategy | type[UserStrategy] | None = None,
) -> Result:
    """Simulates a run whose settings are final: `simulate` without the parsing of settings.

    Args:
        task: A task, or the file that defines one; None for the task that the run names.
        run: The run.
        owner: The policy that every virtual client enforces.
        runs: Parent folder of results; None for a temporary folder that is deleted with the result.
        fresh: Replace a complete or interrupted run in its folder.
        resume: Resume the interrupted run in its folder from its last checkpoint.
        progress: Whether to show progress, or a callback that receives the events.
        say_slow: Whether to print a notice on standard error if the first step takes long.
        command: The equivalent command line, quoted in advice to the user.
        strategy: The user's own strategy if it was made in Python.

    Returns:
        The results of the run.

    Raises:
        FedcoreError: any failure.
    """
    started = time.monotonic()
    if resume and (fresh or runs is None):
        raise ConfigError(
            f"resume=True{' with fresh=True' if fresh else ''}: resuming needs the folder of the "
            "interrupted run. Nothing was run; pass that folder as runs=..., and leave fresh out."
        )
    kept = tempfile.TemporaryDirectory(prefix="fedcore-run-") if runs is None else None
    try:
        base = Path(kept.name) if kept is not None else Path(runs or ".")
        found = loaded(task, run)
        refuse_elsewhere(run, found, rounds=True)
        quiet()
        with note_if_slow(FIRST_STEP) if run.private and say_slow else nullcontext():
            prepared = prepare(run, found, owner, base / run.name, strategy=strategy)
        if not resume:
            refuse_bad_rows(run, found, prepared, _note if say_slow else _silent)
        if resume:
            opening = reopen_folder(run, base)
        else:
            before = allow_drop if fresh else require_no_progress
            opening = open_folder(run, base, before=before, has_progress=has_finished_round)
        with opening as folder:
            resumed = open_checkpoint(folder, run, owner, found) if resume else None
            with shown(progress) as sink:
                done, summary = run_in(
                    folder,
                    run,
                    found,
                    owner,
                    prepared,
                    sink,
                    command=command,
                    started=started,
                    resumed=resumed,
                )
    except BaseException:
        if kept is not None:
            kept.cleanup()
        raise
    models = (done.model.eval(), done.federated.eval())
    return Result(
        done.record, found, run, *models, done.compressed, done.origin, summary, folder, kept
    )


def _note(text: str) -> None:
    say(f"note: {text}", to=sys.stderr, flush=True)


def _silent(text: str) -> None:
    """Takes a line of progress, and shows nothing."""


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
) -> tuple[Completed, dict[str, Any]]:
    """Runs the whole pipeline and writes every result file into the run's folder.

    Args:
        folder: The run's folder, locked by this process.
        run: The run.
        task: Its task.
        owner: The policy that virtual clients enforce.
        prepared: The checked inputs of the run.
        shown: Sink that receives every event in addition to the run's files.
        command: The command line that resumes the run after an interruption.
        started: Monotonic time at which the run began, in seconds.
        resumed: The checkpoint to resume from; None for a new run.

    Returns:
        The completed run, and the content of ``summary.json``.
    """
    delta = tighten(run, owner).privacy.target_delta if run.private else None
    with mlflow_run(run, "simulation", folder) as tracker:
        with (
            json_lines(folder / "metrics.jsonl") as lines,
            tensorboard_events(folder / "tensorboard") as board,
            batched(tee(lines, board, tracker, shown)) as emit,
        ):
            files = tee(lines, board)
            for event in resumed.events if resumed else ():
                files(event)
            finished = run_pipeline(
                run, task, owner, prepared, folder, emit, command=command, resumed=resumed
            )
        taken_s = time.monotonic() - started + (resumed.elapsed_s if resumed else 0.0)
        return finished, write_results(folder, finished, target_delta=delta, seconds=taken_s)
