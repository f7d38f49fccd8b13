"""The ServerApp: the federated part of a run, over any Flower Grid.

`server_app` is the entry point. It waits for clients, prepares the strategy and the preprocessing,
runs the rounds of `server.rounds.loop` and passes the `Outcome` to a `Listener`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from torch import nn

from fedcore.config.run import RunConfig
from fedcore.observability.words import counted
from fedcore.seeds import Randomness
from fedcore.task.definition import Task
from fedcore.task.model import FullModel, build_model, load_preprocess, warm_start
from fedcore.training.evaluate import measure, output_shape
from fedcore.updates.distance import COMPILED_FROM
from fedcore.updates.frozen import load_frozen
from fedcore.updates.local import local_tensors
from fedcore.updates.pack import layout_of, unpack
from server.cloud import CloudData
from server.process.memory import loading
from server.records import RoundRecord
from server.rounds.checkpointing.checkpointer import NoCheckpoints, RoundCheckpointer
from server.rounds.checkpointing.progress import Start
from server.rounds.expected import evaluation_of
from server.rounds.federation import Federation
from server.rounds.gathering import Waiting, count
from server.rounds.loop import Federated, run_rounds
from server.rounds.normalisation import normalise
from server.rounds.peers import NumberedPeers, Peers
from server.rounds.roles import roles_of
from server.rounds.strategies.feddf import FEDDF, distiller_of
from server.rounds.strategies.flower import choose_strategy
from server.rounds.strategies.own import UserStrategy
from server.rounds.strategies.state import restore_strategy
from server.rounds.tuning import Tuner


@dataclass(frozen=True)
class Outcome:
    """Result of the federated part of a run: input of fine-tuning, compression and publishing."""

    model: FullModel
    """The best global model, on the CPU, in evaluation mode."""
    federated: Federated


@dataclass(frozen=True)
class Listener:
    """Callbacks for the events of a run; each is called in the server's own thread."""

    on_note: Callable[[str], None]
    on_round: Callable[[RoundRecord], None]
    on_end: Callable[[Outcome], None]
    on_wait: Callable[[str], None] = lambda text: None
    """Callback at intervals while the server waits for clients before the first round."""


def server_app(
    task: Task,
    run: RunConfig,
    *,
    cloud: CloudData | None,
    randomness: Randomness,
    listener: Listener,
    checkpointer: RoundCheckpointer | None = None,
    start: Start | None = None,
    peers: Peers | None = None,
    awaited: Callable[[], int] = lambda: 1,
    strategy: UserStrategy | type[UserStrategy] | None = None,
    client_name: Callable[[int], str] | None = None,
    annotate: Callable[[RoundRecord], RoundRecord] = lambda record: record,
    tuner: Tuner | None = None,
) -> ServerApp:
    """Returns a Flower ServerApp that trains ``task`` with the settings of ``run``.

    Args:
        task: Defines the model, the data and the metrics.
        run: Configuration of the run.
        cloud: The cloud's data, on which rounds are evaluated; None when there is none.
        randomness: Source of the server's random numbers.
        listener: Callbacks for the events of the run.
        checkpointer: Makes rounds durable, so that they can be resumed; none are when None.
        start: State to resume from; None to start from the beginning.
        peers: Names of the clients, for messages to the user. None, for node ids, in a simulation
            and in a Flower network that fedcore does not run.
        awaited: Returns how many clients to wait for where the run sets no cohort. Those connected
            by then are the cohort; clients that connect after the deadline are not waited for.
            Clients that only evaluate are waited for and are no part of the cohort.
        strategy: The user's own, where it was passed in from Python; None where the run names it.
        client_name: Maps a node to its client's name, for an algorithm, and to tell judges from
            clients that train; ``peers`` does when None.
        annotate: Adds to a round's record what only the caller knows, such as a virtual time.
        tuner: Fine-tunes the global model between rounds; None where the run does not.

    Raises:
        ConfigError: the run needs clients' names, and neither ``peers`` nor ``client_name`` knows
            them.
    """
    app = ServerApp()
    known_as = client_name or (peers.client if peers is not None else None)
    roles = roles_of(run.federation, known_as)

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        model = _built(task, run, live=peers is not None)
        if run.private and start is None:
            # Imported here: Opacus takes seconds to import, which a resuming server does not need.
            from fedcore.privacy.layers import check_layers

            check_layers(model.model)  # once, before every client fails on it
        waiting = Waiting(grid, roles, run.federation.deadline_s, listener)
        cohort = _cohort(run, waiting, start, awaited)
        chosen = choose_strategy(
            run,
            strategy,
            cohort=cohort,
            size=layout_of(model.model).size,
            name_of=known_as or NumberedPeers().client,
            distil=distiller_of(task, run, model, cloud),
        )
        if start is None:
            for note in (*chosen.notes, *local_notes(model.model), *_cloud_notes(run)):
                listener.on_note(note)
            warm_start(run, model)
            normalise(run, model, grid, cloud, peers or NumberedPeers(), roles, listener.on_note)
        else:
            load_preprocess(start.progress.preprocess, model)
            load_frozen(start.progress.frozen, model.model)
            restore_strategy(chosen.strategy, start.progress.strategy)

        federation = Federation(
            run=run,
            grid=grid,
            chosen=chosen,
            cohort=cohort,
            metrics=tuple(task.metrics),
            randomness=randomness,
            evaluate_on_cloud=partial(measure, examples=cloud.of_rounds, metrics=task.metrics)
            if cloud
            else None,
            on_round=listener.on_round,
            on_note=listener.on_note,
            annotate=annotate,
            checkpointer=checkpointer or NoCheckpoints(),
            start=start,
            peers=peers or NumberedPeers(),
            live=peers is not None,
            tuner=tuner,
            outputs=_outputs(task, model, run) if run.federation.evaluate_cohort else (),
            clients=max(count(grid.get_node_ids()), awaited()) if run.client_private else 0,
            roles=roles,
        )
        federated = run_rounds(federation, model)
        unpack(federated.weights, model.model)
        listener.on_end(Outcome(model.eval(), federated))

    return app


def _cohort(
    run: RunConfig, waiting: Waiting, start: Start | None, awaited: Callable[[], int]
) -> int:
    """Returns how many clients a round trains, once enough are connected to begin."""
    cohort = run.federation.cohort or (start.cohort if start is not None else None)
    if cohort is None:
        return waiting.for_all(awaited)
    if start is None:
        waiting.for_cohort(cohort)
    return cohort


def _built(task: Task, run: RunConfig, *, live: bool) -> FullModel:
    """Builds the model; also loads the compiled loops for a live run's updates if it is large."""
    model = build_model(task, run)
    if live and layout_of(model.model).size >= COMPILED_FROM:
        with loading():  # now, as no round should wait for it
            import fedcore.kernels.distance
            import fedcore.kernels.fixed_point  # noqa: F401
    return model


def _outputs(task: Task, model: FullModel, run: RunConfig) -> tuple[int, ...]:
    """Returns the shape of the model's outputs for one example, which all metrics fit.

    Raises:
        ConfigError: no noise fits the primary metric, under privacy.
        TaskError: a metric's limits do not fit it.
    """
    found = output_shape(model, task.example_input)
    evaluation_of(run, task.metrics, found)
    return found


def local_notes(model: nn.Module) -> list[str]:
    """Returns a note on the layers that stay on clients; none without such layers."""
    found = local_tensors(model)
    if not found:
        return []
    count = sum(one.numel() for one in found.values())
    return [
        f"{counted(count, 'number')} of the model in {counted(len(found), 'tensor')} "
        f"({', '.join(list(found)[:5])}{', ...' if len(found) > 5 else ''}) stay on each client. "
        "The server does not know them: in its model they have their initial values."
    ]


def _cloud_notes(run: RunConfig) -> list[str]:
    """Returns a note where a private run's global model learns from the cloud's data, too."""
    learns = run.finetune.in_rounds or run.federation.strategy == FEDDF
    if run.privacy.unit == "none" or not learns:
        return []
    return [
        "The privacy guarantee covers the clients' data alone. The global model also learns from "
        "the cloud's data between rounds, which must be public, or of owners who agreed to that."
    ]


def outcome_of(run: RunConfig, task: Task, start: Start) -> Outcome:
    """Returns the outcome of a run whose rounds have all ended."""
    progress = start.progress
    model = build_model(task, run)
    load_preprocess(progress.preprocess, model)
    load_frozen(progress.frozen, model.model)
    unpack(progress.best, model.model)
    federated = Federated(progress.best, progress.best_round, start.records, progress.protection)
    return Outcome(model.eval(), federated)
