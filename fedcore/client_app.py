"""The ClientApp: what a client does, the same on a device and in a simulation."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.typing import Mod

from fedcore.config.owner import OwnerPolicy, tighten
from fedcore.config.run import RunConfig
from fedcore.errors import (
    ConfigError,
    FedcoreError,
    InsufficientMemory,
    InvalidUpdate,
    OwnerLimit,
    PrivacyError,
    TaskError,
)
from fedcore.observability.words import counted
from fedcore.privacy.ledger import NO_OTHER_RUNS, Ledger, OtherRuns, read_ledger, write_ledger
from fedcore.seeds import Randomness
from fedcore.task.definition import Task, data_folder, size_of
from fedcore.training.batches import in_order
from fedcore.training.bounds import Bounds, bounds_of
from fedcore.training.client import Client, learn, local_data, log_skipped, model_of
from fedcore.training.device import available
from fedcore.training.evaluate import BATCH_SIZE, evaluate
from fedcore.updates.messages import (
    ARRAYS,
    DECLINES,
    METRICS,
    NUM_EXAMPLES,
    code_of,
    read_instruction,
    update_content,
)

log = logging.getLogger("fedcore.device")


@dataclass(frozen=True)
class DurableLedger:
    """A ledger that outlives this process."""

    others: OtherRuns
    """What other runs have spent on the same data."""
    keep: Callable[[], None]
    """Has what the node's state says on disk when it returns; called once a round is charged and
    before it is trained, so that whatever training ends with, its charge stays."""


def client_app(
    task: Task,
    run: RunConfig,
    *,
    owner: OwnerPolicy,
    randomness: Randomness,
    mods: Sequence[Mod] = (),
    durable: DurableLedger | None = None,
    on_skipped: Callable[[str, int], None] = log_skipped,
    bounds: Callable[[], Bounds] | None = None,
) -> ClientApp:
    """An ordinary Flower ClientApp that trains, evaluates and counts for one client a message.

    Args:
        task: The task installed here; nothing sent by a server is run.
        run: The run, as the server asks for it.
        owner: What the owner of this device allows; it tightens ``run``.
        randomness: The seed of a simulation, or the operating system's entropy.
        mods: Flower mods around training, as some strategies need.
        durable: Where charges are kept; None where the node's state in memory is all there is.
        on_skipped: See `fedcore.training.client.Client`.
        bounds: What bounds the work on a message that comes now; the owner's limits when None.

    Raises:
        PrivacyError: it would train real data with privacy, and forget what that cost; or as
            `tighten` says.
    """
    client = Client(
        task,
        tighten(run, owner),
        owner,
        randomness,
        durable.others if durable else NO_OTHER_RUNS,
        on_skipped,
        bounds or partial(bounds_of, owner),
    )
    if durable is None and client.run.private and randomness.origin == "system":
        raise PrivacyError(
            f"run {run.name!r}: training with privacy needs a ledger that outlives this process, "
            "and Flower keeps a node's state in memory: after a restart the whole budget would "
            "be there again. Nothing was trained; `fedcore client start` keeps one on disk, and a "
            "simulation takes `fedcore.seeds.Simulated`, which protects nobody."
        )
    app = ClientApp()

    @app.train(mods=list(mods))
    def on_train(message: Message, context: Context) -> Message:
        def work(client: Client, name: str, message: Message, context: Context) -> RecordDict:
            return train_client(client, name, message, context, durable.keep if durable else None)

        return _answer(work, client, message, context)

    @app.evaluate()
    def on_evaluate(message: Message, context: Context) -> Message:
        return _answer(_evaluate, client, message, context)

    @app.query("statistics")
    def on_statistics(message: Message, context: Context) -> Message:
        return _answer(_statistics, client, message, context)

    return app


def client_name(context: Context, task: Task) -> str:
    """Who this node is: its configured name, or its place among the task's clients.

    Raises:
        ConfigError: it is neither named nor one of them. Two nodes never share a client: each
            would keep a ledger of its own, and neither would tell what was spent.
    """
    named = context.node_config.get("client")
    if named is not None:
        return str(named)
    clients = task.clients(data_folder())
    place = context.node_config.get("partition-id")
    if place is None or not 0 <= int(place) < len(clients):
        raise ConfigError(
            f"node {context.node_id}: partition-id = {place!r}, and the task has "
            f"{counted(len(clients), 'client')}. It has nothing to train on; run as many nodes as "
            "clients, or set `client` in the node's configuration."
        )
    return clients[int(place)]


Work = Callable[[Client, str, Message, Context], RecordDict]


def _answer(work: Work, client: Client, message: Message, context: Context) -> Message:
    """Runs ``work`` and answers with its result, or with an error that says what went wrong."""
    name = f"node {context.node_id}"
    try:
        name = client_name(context, client.task)
        return Message(work(client, name, message, context), reply_to=message)
    except (Exception, SystemExit) as error:  # the task's code: its failure is reported, not lost
        hide = client.protects or (
            client.is_real and isinstance(error, OwnerLimit | InsufficientMemory)
        )
        return Message(Error(*error_of(name, error, hide=hide)), reply_to=message)


def error_of(name: str, error: Exception | SystemExit, *, hide: bool) -> tuple[int, str]:
    """Code and reason in the reply of a client that could not do what was asked, or declined.

    Args:
        name: The client's.
        error: What stopped it.
        hide: Sends the kind of the error alone, and writes its text, which may quote examples or
            the owner's limits, to the device's own log.
    """
    kind = type(error) if isinstance(error, FedcoreError) else TaskError
    code = code_of(kind)
    if hide:
        level = logging.WARNING if code in DECLINES else logging.ERROR
        log.log(level, "%s: %s", type(error).__name__, error)
        return code, f"client {name!r}: {kind.__name__}; its log says more"
    if code in DECLINES:
        return code, str(error)
    if isinstance(error, FedcoreError):
        return code, f"client {name!r}: {type(error).__name__}: {error}"
    return code, f"client {name!r}: the task raised {type(error).__name__}: {error}"


def train_client(
    client: Client,
    name: str,
    message: Message,
    context: Context,
    keep: Callable[[], None] | None = None,
) -> RecordDict:
    """Trains one client as a message asks; whatever fails is raised as it is.

    Args:
        client: The task and the limits.
        name: Whose data is trained on.
        message: What the server asks for.
        context: Whose state the ledger is in.
        keep: Called when the state has the charge, before anything is trained.
    """
    instruction = read_instruction(message.content)
    ledger = read_ledger(context) if client.run.private else Ledger()

    def on_spend(spent: Ledger) -> None:
        write_ledger(context, spent)
        if keep is not None:
            keep()

    return update_content(learn(client, name, instruction, ledger, on_spend=on_spend))


def _evaluate(client: Client, name: str, message: Message, context: Context) -> RecordDict:
    instruction, bounds = read_instruction(message.content), client.bounds()
    if client.run.private:
        raise InvalidUpdate(
            "evaluation: this client trains with example-level privacy and releases no metrics."
        )
    _, held_out = local_data(client, name)
    if not size_of(held_out):
        raise InvalidUpdate("evaluation: this client holds no data back; set federation.holdout.")
    model = model_of(client, instruction).to(available(client.run.client.device))
    values = evaluate(model, held_out, client.task.metrics, between=bounds.check)
    return RecordDict({METRICS: MetricRecord({NUM_EXAMPLES: size_of(held_out), **values})})


def _statistics(client: Client, name: str, message: Message, context: Context) -> RecordDict:
    """Sums and squares of the inputs behind the task's own preprocessing, in float64."""
    if client.run.private:
        raise InvalidUpdate(
            "statistics: this client trains with example-level privacy and releases no sums."
        )
    bounds = client.bounds()
    examples, _ = local_data(client, name)
    preprocess = client.task.preprocess() if client.task.preprocess else torch.nn.Identity()
    total, squares = np.zeros(0), np.zeros(0)
    with torch.inference_mode():
        for inputs, _ in in_order(examples, BATCH_SIZE):
            bounds.check()
            values = preprocess(inputs).double().numpy()
            total = total + values.sum(axis=0) if total.size else values.sum(axis=0)
            squared = np.square(values).sum(axis=0)
            squares = squares + squared if squares.size else squared
    arrays = ArrayRecord({"sum": Array(np.asarray(total)), "squares": Array(np.asarray(squares))})
    count = MetricRecord({NUM_EXAMPLES: size_of(examples)})
    return RecordDict({ARRAYS: arrays, METRICS: count})
