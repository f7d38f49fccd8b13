"""`fedcore.replay`: one client of one round trained again, alone, to see how it fails."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from os import PathLike
from pathlib import Path
from typing import Any

from fedcore.config.owner import OPEN_POLICY, OwnerPolicy
from fedcore.config.run import RunConfig
from fedcore.flower.quiet import quiet
from fedcore.observability.patience import FIRST_STEP, note_if_slow
from server.api.arguments import AnyRun, AnyTask, configured, loaded, with_strategy
from server.preflight import prepare
from server.rounds.strategies.own import UserStrategy
from server.simulation.replay import Replayed
from server.simulation.replay import replay as train_again


def replay(
    task: AnyTask | None,
    run: AnyRun | None = None,
    *,
    round: int,
    client: str,
    owner: OwnerPolicy = OPEN_POLICY,
    strategy: UserStrategy | type[UserStrategy] | str | None = None,
    runs: str | PathLike[str] = "runs",
    on_note: Callable[[str], None] = lambda note: None,
    **settings: Any,
) -> Replayed:
    """Trains one client of one round of a simulation again, alone, to see how it fails.

    The client gets the weights and settings that it got in the round: from the nearest checkpoint
    that the run left, and from simulating the rounds since; without a checkpoint, from simulating
    from the start. The task may have been corrected since. Nothing is written.

    Example::

        found = fedcore.replay("task.py", "run.toml", round=3, client="anna", runs="runs")
        if found.error is not None:
            raise found.error  # with its traceback, into the task's code

    Args:
        task: A task, or the file that defines one; None for the task that the run names.
        run: The run, or its file; None for default settings.
        round: Number of the round, from 1 on.
        client: Name of the client, which the round must have selected.
        owner: The policy that every virtual client enforces.
        strategy: Replaces ``federation.strategy``, as in `fedcore.simulate`.
        runs: Parent folder of results; the run's checkpoints are looked for there.
        on_note: Callback with notes on what is done and why.
        settings: Sections or settings of the run to override.

    Returns:
        What the client's training came to. A failure of the client is a value, not an exception.

    Raises:
        ConfigError: the round or client does not exist, the client was not asked in that round, or
            the checkpoint is of another run.
        TaskError: the task's file doesn't exist, or contains no task.
        FedcoreError: an earlier round fails.
    """
    config, own = with_strategy(configured(task, run, settings), strategy)
    return replayed(
        task,
        config,
        f"{round}:{client}",
        owner=owner,
        runs=runs,
        on_note=on_note,
        say_slow=False,
        strategy=own,
    )


def replayed(
    task: AnyTask | None,
    run: RunConfig,
    wanted: str,
    *,
    owner: OwnerPolicy,
    runs: str | PathLike[str],
    on_note: Callable[[str], None],
    say_slow: bool,
    strategy: UserStrategy | type[UserStrategy] | None = None,
) -> Replayed:
    """Replays ``ROUND:CLIENT`` of a run whose settings are final: `replay` without their parsing.

    Args:
        task: A task, or the file that defines one; None for the task that the run names.
        run: The run.
        wanted: ``ROUND:CLIENT``.
        owner: The policy that every virtual client enforces.
        runs: Parent folder of results.
        on_note: Callback with notes on what is done and why.
        say_slow: Whether to print a notice on standard error if the first step takes long.
        strategy: The user's own strategy if it was made in Python.

    Returns:
        What the client's training came to.

    Raises:
        FedcoreError: the replay can't begin, see `replay`.
    """
    quiet()
    found = loaded(task, run)
    with note_if_slow(FIRST_STEP) if run.private and say_slow else nullcontext():
        prepared = prepare(run, found, owner, Path(runs) / run.name, strategy=strategy)
    return train_again(wanted, run, found, owner, prepared, Path(runs), on_note=on_note)
