"""A run in simulation: resumable rounds over virtual clients, and the stages that follow.

`run_pipeline` is the entry point. It takes a run, its task and data, and writes models and reports
to the run's folder.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

from fedcore.config.owner import OwnerPolicy, tighten
from fedcore.config.run import RunConfig
from fedcore.errors import FedcoreError
from fedcore.observability.events import Noted, RoundFinished, Sink, nowhere
from fedcore.observability.foreign import say
from fedcore.observability.pace import RoundPace
from fedcore.seeds import Simulated
from fedcore.task.definition import Task
from fedcore.training.device import available
from server.after_rounds import (
    Completed,
    FederatedModel,
    StageFunctions,
    StageLog,
    after_rounds,
)
from server.finetune.in_rounds import tuner_of
from server.preflight import Prepared
from server.process.signals import stop_requested
from server.records import RoundRecord, TrainingRecord
from server.release.once import PUBLISHED, publish_once
from server.rounds.app import Listener, Outcome, outcome_of, server_app
from server.rounds.checkpointing.checkpointer import RoundCheckpointer
from server.rounds.checkpointing.run_identity import identity_of
from server.rounds.evaluation.judging import clients_judge
from server.simulation.checkpoint import Checkpoint, StoredEvent
from server.simulation.checkpointer import FileCheckpointer
from server.simulation.clients import client_records, own_model
from server.simulation.evaluating import VirtualClients
from server.simulation.federate import federate
from server.simulation.judging import judge_in_simulation, measure_onnx_in_simulation
from server.simulation.virtual.devices import read_fleet
from server.simulation.virtual.nodes import FIRST_NODE_ID
from server.simulation.virtual.state import Choice, SimulationState

_WAYS = {"loop": "one at a time", "vectorised": "in vectorised batches"}


def run_pipeline(
    run: RunConfig,
    task: Task,
    owner: OwnerPolicy,
    prepared: Prepared,
    folder: Path,
    emit: Sink,
    *,
    command: str,
    resumed: Checkpoint | None,
) -> Completed:
    """Trains in simulation, fine-tunes, compresses, tests and publishes; writes to ``folder``.

    Args:
        run: Configuration of the run.
        task: Its task.
        owner: Policy that virtual clients comply with.
        prepared: Clients, data and strategy of the run.
        folder: Folder for the run's files.
        emit: Callback for each event.
        command: Command line of this run, for advice on how to resume.
        resumed: Checkpoint to resume from; None to start from the beginning.

    Raises:
        FedcoreError: a stage failed; what was published before stays.
        KeyboardInterrupt: the user stopped the run; a checkpoint is in ``folder``.
    """
    story = StageLog(emit)
    elapsed_s = resumed.elapsed_s if resumed else 0.0
    if doubt := task.check_model():
        story.note(doubt)
    with story.stage("federate", run.federation.rounds, before_s=elapsed_s):
        done = run_federated_part(
            run, task, owner, prepared, folder, emit, command=command, resumed=resumed
        )
    story.notes.extend(done.notes)
    model, data = done.outcome.model, prepared.data
    trained = FederatedModel(
        done.outcome,
        client_records(tighten(run, owner), task, model, done.state, data),
        done.training,
        str(available(run.client.device)),
        "none" if run.privacy.unit == "none" else "simulated",
        of_client=partial(own_model, model, done.state) if run.client.local else None,
    )
    if clients_judge(run):
        arguments = (VirtualClients(run, task, owner), prepared.clients, story.note)
        trained = replace(
            trained,
            judge=judge_in_simulation(*arguments, locals=done.state.locals),
            measure_onnx=measure_onnx_in_simulation(*arguments),
        )
    steps = StageFunctions(publish=partial(publish_once, folder / PUBLISHED))
    return after_rounds(
        run, task, prepared.cloud, prepared.test, trained, folder, story, steps=steps
    )


@dataclass(frozen=True)
class SimulatedRounds:
    """Result of the federated part of a run."""

    outcome: Outcome
    state: SimulationState
    training: TrainingRecord | None
    notes: tuple[str, ...]
    """Includes those of earlier, interrupted processes."""


def run_federated_part(
    run: RunConfig,
    task: Task,
    owner: OwnerPolicy,
    prepared: Prepared,
    folder: Path,
    emit: Sink,
    *,
    command: str,
    resumed: Checkpoint | None,
) -> SimulatedRounds:
    """Runs the remaining rounds; the arguments are those of `run_pipeline`.

    Raises:
        FedcoreError: a round failed; a checkpoint from before it is kept.
        KeyboardInterrupt: the user stopped the run; a checkpoint is kept.
    """
    events: list[StoredEvent] = list(resumed.events) if resumed else []
    state = resumed.state if resumed else SimulationState()
    to_choose, hired = state.choice is None, list[int]()

    def tell(event: StoredEvent) -> None:
        events.append(event)
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
        with stop_requested(_announce_stop) as stopping:
            checkpointer = FileCheckpointer(
                folder,
                identity_of(run, owner),
                prepared.clients,
                state=state,
                events=events,
                stopping=stopping,
                command=command,
                elapsed_s=resumed.elapsed_s if resumed else 0.0,
            )
            try:
                outcome = run_simulated_rounds(
                    run,
                    task,
                    owner,
                    prepared,
                    state=state,
                    resumed=resumed,
                    checkpointer=checkpointer,
                    tell=tell,
                    on_choice=on_choice,
                    emit=emit,
                )
            except FedcoreError:
                if stopping():  # a service manager's signal stops the workers, too
                    raise KeyboardInterrupt from None
                raise
        if stopping():
            raise KeyboardInterrupt
    training = None
    if state.choice is not None:
        workers = hired[-1] if hired else None
        training = TrainingRecord(**asdict(state.choice), workers=workers)
    notes = tuple(event.text for event in events if isinstance(event, Noted))
    return SimulatedRounds(outcome, state, training, notes)


def run_simulated_rounds(
    run: RunConfig,
    task: Task,
    owner: OwnerPolicy,
    prepared: Prepared,
    *,
    state: SimulationState,
    resumed: Checkpoint | None,
    checkpointer: RoundCheckpointer,
    tell: Callable[[StoredEvent], None],
    on_choice: Callable[[Choice, int], None],
    emit: Sink = nowhere,
) -> Outcome:
    """Runs rounds from ``resumed`` and ``state`` on, until the last or until asked to stop.

    ``emit`` receives the progress of fine-tuning between rounds, which a checkpoint does not keep.
    """
    outcomes: list[Outcome] = []
    pace = RoundPace()

    def on_round(record: RoundRecord) -> None:
        left = record.rounds - record.round
        tell(RoundFinished(asdict(record) | pace.after(record.seconds, record.cohort, left)))

    server = server_app(
        task,
        run,
        cloud=prepared.cloud,
        randomness=Simulated(run.seed),
        listener=Listener(lambda text: tell(Noted(text)), on_round, outcomes.append),
        checkpointer=checkpointer,
        start=resumed.start if resumed else None,
        strategy=prepared.strategy,
        client_name=lambda node: prepared.clients[node - FIRST_NODE_ID],
        annotate=state.with_clock,
        tuner=tuner_of(task, run, prepared.cloud, emit),
    )
    fleet = read_fleet(run, prepared.clients)
    federate(
        server, task, run, owner, prepared.clients, state=state, fleet=fleet, on_choice=on_choice
    )
    return outcomes[0]


def choice_text(choice: Choice, workers: int) -> str:
    """Returns a sentence on how clients are trained."""
    return (
        f"Clients are trained {_WAYS[choice.method]} by {workers} "
        f"worker{'s' if workers > 1 else ''}: {choice.reason}."
    )


def _announce_stop() -> None:
    with suppress(RuntimeError):  # the signal interrupted another write
        say(
            "Interrupted: finishing the round and writing a checkpoint first. Press Ctrl-C again "
            "to stop at once.",
            to=sys.stderr,
            flush=True,
        )
