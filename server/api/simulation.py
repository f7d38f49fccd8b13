"""A simulation as a call. ``fedcore simulate`` does the same from a run's file."""

from __future__ import annotations

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
from fedcore.observability.events import Sink, tee, unhurried
from fedcore.observability.jsonl import json_lines
from fedcore.observability.patience import FIRST_STEP, told_if_slow
from fedcore.task.definition import Task
from server.after_rounds import Completed
from server.api.asked import (
    AnyRun,
    AnyTask,
    configured,
    loaded,
    refuse_elsewhere,
    shown,
    with_strategy,
)
from server.api.result import Result
from server.preflight import Prepared, prepare
from server.report.folder import open_folder, reopen_folder, write_results
from server.report.tensorboard import tensorboard_events
from server.rounds.own_strategy import Own
from server.simulation.checkpoint import Checkpoint
from server.simulation.resume import pick_up
from server.simulation.run import run_pipeline
from server.unfinished import drop_all, refuse_to_drop


def simulate(
    task: AnyTask | None,
    run: AnyRun | None = None,
    *,
    owner: OwnerPolicy = OPEN_POLICY,
    runs: str | PathLike[str] | None = None,
    fresh: bool = False,
    resume: bool = False,
    progress: bool | Sink = True,
    strategy: Own | type[Own] | str | None = None,
    **settings: Any,
) -> Result:
    """Trains over simulated clients, then fine-tunes, compresses, tests and publishes.

    Example::

        result = fedcore.simulate(task, "run.toml", federation={"rounds": 20}, seed=3)
        result.metrics, result.history.to_pandas(), result.model

    Args:
        task: A task, or the file that defines one; None for the one that the run names. A task made
            in memory, as in a notebook, is trained by forked workers and fine-tuned in this
            process. It cannot go to processes that are started afresh (several GPUs, Ray,
            fine-tuning by several processes), which is said before anything runs.
        run: The run, or its file; a run with every setting's default when None.
        owner: What every virtual client keeps to.
        runs: A folder: results go to the folder of the run's name in it, in place of a complete
            run that was there. A folder that lives as long as the result when None.
        fresh: A run that was interrupted there is replaced, too; it is an error otherwise.
        resume: Goes on with a run that was interrupted there, from its last checkpoint. That a task
            made in memory is still the same is not checked.
        progress: Whether progress is shown: on standard error, or in the notebook's cell. A
            function gets the events instead.
        strategy: In place of the run's: a `fedcore.Algorithm` or a strategy of Flower's kind, as
            an instance, a class, which gets ``strategy_options``, or a name.
        settings: Sections or settings of the run that are to be others.

    Returns:
        What the run left. Where its final test withholds the model, ``record.withheld`` says why.

    Raises:
        FedcoreError: whatever is wrong or fails, as the command line says it. Nothing is printed
            but progress, and the process goes on.
    """
    asked, own = with_strategy(configured(task, run, settings), strategy)
    return simulated(
        task,
        asked,
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
    strategy: Own | type[Own] | None = None,
) -> Result:
    """Simulates a run whose settings are made up; the other arguments are those of `simulate`.

    Args:
        task: As there.
        run: The run.
        owner: As there.
        runs: As there.
        fresh: As there.
        resume: As there.
        progress: As there.
        say_slow: Whether standard error says so where the first step takes long.
        command: The command line that asks for this, for advice on what to do.
        strategy: The user's own, where it was made in Python.
    """
    started = time.monotonic()
    if resume and (fresh or runs is None):
        raise ConfigError(
            f"resume=True{' with fresh=True' if fresh else ''}: it goes on with what a run left in "
            "a folder. Nothing was run; name that folder by runs=..., and leave fresh out."
        )
    kept = tempfile.TemporaryDirectory(prefix="fedcore-run-") if runs is None else None
    try:
        base = Path(kept.name) if kept is not None else Path(runs or ".")
        found = loaded(task, run)
        refuse_elsewhere(run, found, rounds=True)
        quiet()
        with told_if_slow(FIRST_STEP) if run.private and say_slow else nullcontext():
            prepared = prepare(run, found, owner, base / run.name, strategy=strategy)
        if resume:
            opening = reopen_folder(run, base)
        else:
            opening = open_folder(run, base, before=drop_all if fresh else refuse_to_drop)
        with opening as folder:
            resumed = pick_up(folder, run, owner) if resume else None
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
