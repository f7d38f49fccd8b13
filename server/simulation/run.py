"""The first part of a run: rounds over virtual clients, which can be interrupted and resumed."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from fedcore.config.owner import OwnerPolicy
from fedcore.config.run import RunConfig
from fedcore.errors import FedcoreError
from fedcore.observability.events import Noted, RoundFinished, Sink
from fedcore.observability.foreign import say
from fedcore.observability.pace import Pace
from fedcore.seeds import Simulated
from fedcore.task.definition import Task
from fedcore.task.model import build_model, load_preprocess
from fedcore.updates.pack import unpack
from server.preflight import Prepared
from server.process.signals import asked_to_stop
from server.records import RoundRecord, TrainingRecord
from server.rounds.app import Listener, Outcome, server_app
from server.rounds.checkpointing import Keeper, Start
from server.rounds.loop import Federated
from server.rounds.run_identity import identity_of
from server.simulation.checkpoint import Checkpoint, Told
from server.simulation.checkpointer import CheckpointKeeper
from server.simulation.devices import read_fleet
from server.simulation.federate import federate
from server.simulation.state import State
from server.simulation.workers.autotune import Choice

_WAYS = {"loop": "one after the other", "vectorised": "side by side"}


@dataclass(frozen=True)
class Done:
    """What the federated part of a run leaves."""

    outcome: Outcome
    state: State
    training: TrainingRecord | None
    notes: tuple[str, ...]
    """Those of processes that were interrupted, too."""


def federated_part(
    run: RunConfig,
    task: Task,
    owner: OwnerPolicy,
    prepared: Prepared,
    folder: Path,
    emit: Sink,
    *,
    command: str,
    resumed: Checkpoint | None,
) -> Done:
    """Runs the rounds that are left; the arguments are those of `server.pipeline.run_pipeline`.

    Raises:
        FedcoreError: whatever stops it; a checkpoint from before the failed round is kept.
        KeyboardInterrupt: the user stopped it; a checkpoint is kept.
    """
    told: list[Told] = list(resumed.told) if resumed else []
    state = resumed.state if resumed else State()
    to_choose, hired = state.choice is None, list[int]()

    def tell(event: Told) -> None:
        told.append(event)
        emit(event)

    def on_choice(choice: Choice, workers: int) -> None:
        hired.append(workers)
        if to_choose:
            tell(Noted(choice_text(choice, workers)))

    if resumed:
        tell(Noted(f"Resumed after round {resumed.progress.round}."))
    if resumed and resumed.progress.over:
        outcome = outcome_of(run, task, resumed.start)
    else:
        with asked_to_stop(_say_stopping) as stopping:
            keeper = CheckpointKeeper(
                folder,
                identity_of(run, owner),
                prepared.clients,
                state=state,
                told=told,
                stopping=stopping,
                command=command,
                elapsed_s=resumed.elapsed_s if resumed else 0.0,
            )
            try:
                outcome = rounds(
                    run,
                    task,
                    owner,
                    prepared,
                    state=state,
                    resumed=resumed,
                    keeper=keeper,
                    tell=tell,
                    on_choice=on_choice,
                )
            except FedcoreError:
                if stopping():  # whoever stops a service asks its workers, too, and they do
                    raise KeyboardInterrupt from None
                raise
        if stopping():
            raise KeyboardInterrupt
    training = None
    if state.choice is not None:
        workers = hired[-1] if hired else None
        training = TrainingRecord(**asdict(state.choice), workers=workers)
    notes = tuple(event.text for event in told if isinstance(event, Noted))
    return Done(outcome, state, training, notes)


def rounds(
    run: RunConfig,
    task: Task,
    owner: OwnerPolicy,
    prepared: Prepared,
    *,
    state: State,
    resumed: Checkpoint | None,
    keeper: Keeper,
    tell: Callable[[Told], None],
    on_choice: Callable[[Choice, int], None],
) -> Outcome:
    """Rounds from where ``resumed`` and ``state`` are until the last, or until ``keeper`` says."""
    outcomes: list[Outcome] = []
    pace = Pace()

    def on_round(record: RoundRecord) -> None:
        left = record.rounds - record.round
        tell(RoundFinished(asdict(record) | pace.after(record.seconds, record.cohort, left)))

    server = server_app(
        task,
        run,
        cloud=prepared.cloud,
        randomness=Simulated(run.seed),
        listener=Listener(lambda text: tell(Noted(text)), on_round, outcomes.append),
        keeper=keeper,
        start=resumed.start if resumed else None,
    )
    fleet = read_fleet(run, prepared.clients)
    federate(
        server, task, run, owner, prepared.clients, state=state, fleet=fleet, on_choice=on_choice
    )
    return outcomes[0]


def choice_text(choice: Choice, workers: int) -> str:
    """How clients are trained, in a sentence."""
    return (
        f"Clients are trained {_WAYS[choice.method]} by {workers} "
        f"worker{'s' if workers > 1 else ''}: {choice.reason}."
    )


def outcome_of(run: RunConfig, task: Task, start: Start) -> Outcome:
    """What the rounds that are over have left."""
    progress = start.progress
    model = build_model(task, run)
    load_preprocess(progress.preprocess, model)
    unpack(progress.best, model.model)
    federated = Federated(progress.best, progress.best_round, start.records, progress.protection)
    return Outcome(model.eval(), federated)


def _say_stopping() -> None:
    with suppress(RuntimeError):  # the signal came in the middle of another line
        say(
            "Interrupted: the round is finished first, and a checkpoint written. Again to stop at "
            "once.",
            to=sys.stderr,
            flush=True,
        )
