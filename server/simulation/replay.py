"""Replay of one client in one round, trained by itself, with its error as an object."""

from __future__ import annotations

import difflib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flwr.app import Context, Message
from flwr.clientapp.typing import ClientAppCallable, Mod

from fedcore.client_app import error_of, train_client
from fedcore.config.owner import OwnerPolicy, tighten
from fedcore.config.run import RunConfig
from fedcore.errors import ConfigError, DataError
from fedcore.flower.grid import InProcessGrid
from fedcore.flower.identity import assume_identity
from fedcore.observability.words import bytes_text, counted, figure, seconds_text
from fedcore.privacy.ledger import Ledger, write_ledger
from fedcore.seeds import Simulated
from fedcore.task.definition import Task
from fedcore.task.model import build_model
from fedcore.training.client import Client
from fedcore.training.mods import client_mods
from fedcore.training.roles import is_judge
from fedcore.updates.local import write_local
from fedcore.updates.pack import layout_of
from fedcore.updates.replies import read_reply
from server.preflight import Prepared
from server.records import RoundRecord
from server.report.folder import CHECKPOINT
from server.rounds.checkpointing.checkpointer import NoCheckpoints
from server.rounds.checkpointing.progress import Progress
from server.rounds.checkpointing.run_identity import TASK, changes, check_same, identity_of
from server.rounds.cohort import select, selection_size
from server.rounds.expected import update_spec
from server.rounds.federation import Federation
from server.rounds.inbound import payload_bytes
from server.rounds.instructions import instructions
from server.rounds.roles import Roles
from server.rounds.strategies.flower import choose_strategy
from server.rounds.strategies.state import restore_strategy
from server.simulation.checkpoint import Checkpoint, read_checkpoint
from server.simulation.checkpointer import FAILED
from server.simulation.run import run_simulated_rounds
from server.simulation.virtual.nodes import FIRST_NODE_ID, RUN_ID, context_of, one_thread
from server.simulation.virtual.state import SimulationState


@dataclass(frozen=True)
class ReplayTarget:
    """The client and round to replay."""

    round: int
    client: str
    node: int
    cohort: Sequence[int]
    """All nodes of the round."""


@dataclass(frozen=True)
class Replayed:
    """The result of training one client of one round again.

    Example::

        found = fedcore.replay("task.py", "run.toml", round=3, client="anna", runs="runs")
        if found.error is not None:
            raise found.error  # with its traceback, into the task's code
    """

    round: int
    client: str
    error: BaseException | None = None
    """The client's error, with its traceback; None if it trained."""
    reason: str = ""
    """The error in words, as the round reported it; empty if it trained."""
    num_examples: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    """The client's own metrics, such as its training loss."""
    payload_bytes: int = 0
    """Size of the client's update."""
    seconds: float = 0.0
    """Time that training took."""

    @property
    def ok(self) -> bool:
        """Whether the client trained without an error."""
        return self.error is None

    @property
    def line(self) -> str:
        """The result in one sentence."""
        if not self.ok:
            return f"round {self.round}: {self.reason}"
        measured = "".join(f", {name} {figure(value)}" for name, value in self.metrics.items())
        return (
            f"round {self.round}: client {self.client!r} trained on "
            f"{counted(self.num_examples, 'example')} in {seconds_text(self.seconds)}{measured}; "
            f"its update has {bytes_text(self.payload_bytes)}"
        )

    def figures(self) -> dict[str, Any]:
        """Returns what training came to, for JSON."""
        return {
            "num_examples": self.num_examples,
            "metrics": self.metrics,
            "payload_bytes": self.payload_bytes,
            "seconds": self.seconds,
        }


def replay(
    text: str,
    run: RunConfig,
    task: Task,
    owner: OwnerPolicy,
    prepared: Prepared,
    runs: Path,
    *,
    on_note: Callable[[str], None] = lambda note: None,
) -> Replayed:
    """Trains the client that ``text`` names, as in the original round.

    The round's weights come from the nearest earlier checkpoint, and from simulating the rounds
    since; without a checkpoint, from simulating from the start. Writes no file.

    Args:
        text: ``ROUND:CLIENT``.
        run: Configuration of the run.
        task: Its task, which may have been corrected since.
        owner: Policy that virtual clients comply with.
        prepared: Clients, data and strategy of the run.
        runs: Parent folder of all runs' folders.
        on_note: Callback with notes on what is done and why.

    Returns:
        What the client's training came to, or its error.

    Raises:
        ConfigError: the round or client does not exist, or the checkpoint is of another run.
        FedcoreError: an earlier round fails.
    """
    wanted = _wanted(text, run, prepared.clients)
    nearest = _nearest(runs / run.name, wanted.round, identity_of(run, owner), on_note)
    state = nearest.state if nearest else SimulationState()
    progress = _progress_before(wanted, run, task, owner, prepared, nearest, state, on_note)
    return _train_alone(wanted, run, task, owner, prepared, progress, state)


def _wanted(text: str, run: RunConfig, clients: Sequence[str]) -> ReplayTarget:
    number, separator, client = text.partition(":")
    if not separator or not (number.isascii() and number.isdigit()):
        raise ConfigError(
            f"replay {text}: expected ROUND:CLIENT, for example --replay 3:anna. Nothing was run."
        )
    planned = run.federation.rounds
    if not 1 <= int(number) <= planned:
        has = f"rounds 1 to {planned}" if planned else "no rounds"
        raise ConfigError(f"replay {text}: this run has {has}. Nothing was run.")
    if client not in clients:
        near = difflib.get_close_matches(client, clients, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ConfigError(
            f"replay {text}: the task has no client {client!r}.{hint} Nothing was run."
        )
    if is_judge(run.federation, client):
        raise ConfigError(
            f"replay {text}: client {client!r} holds back all of its data "
            "(federation.holdout_by = 'clients'), and trains in no round. Nothing was run."
        )
    roles = Roles(run.federation, lambda node: clients[node - FIRST_NODE_ID])
    nodes = roles.training(range(FIRST_NODE_ID, FIRST_NODE_ID + len(clients)))
    size = run.federation.cohort or len(nodes)
    size = min(selection_size(run, size, simulated=True), len(nodes))
    cohort = select(nodes, size, seed=run.seed, words=("round", int(number)))
    node = FIRST_NODE_ID + clients.index(client)
    if node not in cohort:
        asked = ", ".join(clients[one - FIRST_NODE_ID] for one in cohort[:5])
        raise ConfigError(
            f"replay {text}: client {client!r} was not selected in round {number}. Nothing was "
            f"run; the {counted(size, 'client')} selected: {asked}{', ...' if size > 5 else ''}."
        )
    return ReplayTarget(int(number), client, node, cohort)


def _nearest(
    folder: Path, number: int, identity: dict[str, object], on_note: Callable[[str], None]
) -> Checkpoint | None:
    """Returns the latest checkpoint from before a round; None where there is none."""
    best: Checkpoint | None = None
    for path in [folder / CHECKPOINT, *folder.glob(f"{FAILED}/round-*.safetensors")]:
        if not path.is_file():
            continue
        found = read_checkpoint(path)
        mended = {**identity, TASK: found.identity.get(TASK)}  # may be a corrected task
        check_same(path, found.identity, mended)
        if found.progress.round < number and (
            best is None or found.progress.round > best.progress.round
        ):
            best = found
    if best is not None and changes(best.identity, identity):
        on_note("The task file has changed since the run was started.")
    return best


class _Until(NoCheckpoints):
    """Checkpointer that ends the rounds before round ``number``."""

    def __init__(self, number: int) -> None:
        self._number = number
        self.progress: Progress | None = None

    def commit(self, progress: Progress, record: RoundRecord | None) -> None:
        """Keeps the progress in memory."""
        self.progress = progress

    def stops_after(self, progress: Progress) -> bool:
        """Returns whether round ``number`` would follow."""
        return progress.round >= self._number - 1


def _progress_before(
    wanted: ReplayTarget,
    run: RunConfig,
    task: Task,
    owner: OwnerPolicy,
    prepared: Prepared,
    nearest: Checkpoint | None,
    state: SimulationState,
    on_note: Callable[[str], None],
) -> Progress:
    """Returns the progress before the round to replay; updates ``state`` to match."""
    if nearest is not None and nearest.progress.round == wanted.round - 1:
        return nearest.progress
    begun = nearest.progress.round if nearest else 0
    on_note(f"Simulating rounds {begun + 1} to {wanted.round - 1} again.")
    checkpointer = _Until(wanted.round)
    run_simulated_rounds(
        run,
        task,
        owner,
        prepared,
        state=state,
        resumed=nearest,
        checkpointer=checkpointer,
        tell=lambda event: None,
        on_choice=lambda choice, workers: None,
    )
    assert checkpointer.progress is not None  # each run commits before its first round
    if checkpointer.progress.round < wanted.round - 1:
        raise ConfigError(
            f"replay {wanted.round}:{wanted.client}: the run ended after round "
            f"{checkpointer.progress.round}. Nothing was replayed; choose an earlier round."
        )
    return checkpointer.progress


def _train_alone(
    wanted: ReplayTarget,
    run: RunConfig,
    task: Task,
    owner: OwnerPolicy,
    prepared: Prepared,
    progress: Progress,
    state: SimulationState,
) -> Replayed:
    assume_identity(RUN_ID)
    client = Client(task, tighten(run, owner), owner, Simulated(run.seed))
    message = _instruction(wanted, run, task, prepared, progress)
    context = context_of(wanted.node, wanted.client)
    write_ledger(context, state.ledgers.get(wanted.client, Ledger()))
    write_local(context, state.locals.get(wanted.client, b""))
    handle = _handler(client, wanted.client, client_mods(run.federation.strategy))
    started = time.perf_counter()
    try:
        with one_thread():
            reply = handle(message, context)
        asked = update_spec(client.run, client.resident.layout)
        update = read_reply(reply, asked, where=f"update from client {wanted.client!r}")
    except (Exception, SystemExit) as error:  # any error: it is what the user asks for
        _, reason = error_of(wanted.client, error, hide=False)
        return Replayed(wanted.round, wanted.client, error, reason)
    return Replayed(
        wanted.round,
        wanted.client,
        num_examples=update.num_examples,
        metrics={name: float(value) for name, value in update.metrics.items()},
        payload_bytes=payload_bytes(reply),
        seconds=time.perf_counter() - started,
    )


def _handler(client: Client, name: str, mods: Sequence[Mod]) -> ClientAppCallable:
    """Returns the ClientApp's training handler with its mods, except that errors propagate."""

    def train(message: Message, context: Context) -> Message:
        return Message(train_client(client, name, message, context), reply_to=message)

    def within(mod: Mod, inner: ClientAppCallable) -> ClientAppCallable:
        return lambda message, context: mod(message, context, inner)

    handler: ClientAppCallable = train
    for mod in reversed(mods):
        handler = within(mod, handler)
    return handler


def _instruction(
    wanted: ReplayTarget, run: RunConfig, task: Task, prepared: Prepared, progress: Progress
) -> Message:
    """Returns the message that the client was sent."""
    model = build_model(task, run)
    layout = layout_of(model.model)
    if layout.size != len(progress.weights):
        raise DataError(
            f"replay {wanted.round}:{wanted.client}: the task's model has "
            f"{counted(layout.size, 'weight')}, but the run's model has {len(progress.weights)}. "
            "Nothing was replayed; restore the run's model."
        )
    chosen = choose_strategy(
        run,
        prepared.strategy,
        cohort=len(wanted.cohort),
        size=0,
        name_of=lambda node: prepared.clients[node - FIRST_NODE_ID],
    )
    restore_strategy(chosen.strategy, progress.strategy)
    messages = instructions(
        Federation(
            run=run,
            grid=InProcessGrid(RUN_ID, wanted.cohort, lambda message: message),
            chosen=chosen,
            cohort=len(wanted.cohort),
            metrics=tuple(task.metrics),
            randomness=Simulated(run.seed),
            evaluate_on_cloud=None,
            on_round=lambda record: None,
            on_note=lambda note: None,
        ),
        progress,
        layout,
        wanted.cohort,
    )
    return next(one for one in messages if one.metadata.dst_node_id == wanted.node)
