"""The Flower ClientApp of a fedcore client, used on devices and in simulations.

`client_app` builds it from a task and a run. A message in asks to train, to evaluate or for input
statistics; a message out carries the result or an error.
"""

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
from fedcore.training.client import (
    Client,
    learn,
    local_data,
    log_skipped,
    model_of,
    training_data,
)
from fedcore.training.device import available
from fedcore.training.evaluate import BATCH_SIZE, measure
from fedcore.training.evaluate_private import check_evaluates, evaluate_privately
from fedcore.training.roles import evaluates
from fedcore.updates.evaluation import evaluation_content
from fedcore.updates.local import read_local, write_local
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
    """A privacy ledger that survives the end of this process."""

    others: OtherRuns
    """What other runs have spent on the same data."""
    commit: Callable[[], None]
    """Makes the node's state durable on disk before it returns. Called once a round is charged and
    before training starts, so that the charge survives however training ends."""


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
    """Builds a Flower ClientApp that trains, evaluates or reports statistics per message.

    Args:
        task: The locally installed task; code from a server is never executed.
        run: The run as the server requests it.
        owner: The limits of this device's owner, which tighten ``run``.
        randomness: The seed of a simulation, or the operating system's entropy.
        mods: Flower mods around training, which some strategies need.
        durable: Persistent storage of the ledger; None if the node's in-memory state suffices.
        on_skipped: Callback with a client's name and the number of batch places that counted as
            zero; private information, so it must stay on the device.
        bounds: Returns the limits on the work for the message at hand; the owner's limits if None.

    Raises:
        PrivacyError: private training on real data would lose its ledger at the end of the
            process, or the owner set a budget and the run trains without privacy.
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
            "but Flower keeps a node's state in memory only, so a restart would reset the "
            "privacy budget. Nothing was trained; run `fedcore client start`, which keeps the "
            "ledger on disk, or, in a simulation, pass `fedcore.seeds.Simulated`, which protects "
            "nobody."
        )
    app = ClientApp()

    @app.train(mods=list(mods))
    def on_train(message: Message, context: Context) -> Message:
        def work(client: Client, name: str, message: Message, context: Context) -> RecordDict:
            return train_client(client, name, message, context, durable.commit if durable else None)

        return _answer(work, client, message, context)

    @app.evaluate()
    def on_evaluate(message: Message, context: Context) -> Message:
        def work(client: Client, name: str, message: Message, context: Context) -> RecordDict:
            commit = durable.commit if durable else None
            return evaluate_client(client, name, message, context, commit)

        return _answer(work, client, message, context)

    @app.query("statistics")
    def on_statistics(message: Message, context: Context) -> Message:
        return _answer(_statistics, client, message, context)

    return app


def client_name(context: Context, task: Task) -> str:
    """Returns this node's client name: the configured one, or the task's client at its partition.

    Raises:
        ConfigError: the node has no name, and its partition is not among the task's clients. Two
            nodes never share a client: each would keep its own ledger, and neither would show
            the total spent.
    """
    named = context.node_config.get("client")
    if named is not None:
        return str(named)
    clients = task.clients(data_folder())
    place = context.node_config.get("partition-id")
    if place is None or not 0 <= int(place) < len(clients):
        raise ConfigError(
            f"node {context.node_id}: partition-id = {place!r}, but the task has only "
            f"{counted(len(clients), 'client')}. This node has no data to train on; run as many "
            "nodes as clients, or set `client` in the node's configuration."
        )
    return clients[int(place)]


Work = Callable[[Client, str, Message, Context], RecordDict]


def _answer(work: Work, client: Client, message: Message, context: Context) -> Message:
    """Runs ``work`` and replies with its result, or with an error that states the cause."""
    name = f"node {context.node_id}"
    try:
        name = client_name(context, client.task)
        return Message(work(client, name, message, context), reply_to=message)
    except (Exception, SystemExit) as error:  # the task's code may raise anything: report it
        hide = client.protects or (
            client.is_real and isinstance(error, OwnerLimit | InsufficientMemory)
        )
        return Message(Error(*error_of(name, error, hide=hide)), reply_to=message)


def error_of(name: str, error: Exception | SystemExit, *, hide: bool) -> tuple[int, str]:
    """Returns code and reason for the error reply of a client that failed or declined.

    Args:
        name: The client's name.
        error: The exception that stopped the work.
        hide: Sends only the kind of error. Its text, which may quote examples or the owner's
            limits, goes to the device's own log.
    """
    kind = type(error) if isinstance(error, FedcoreError) else TaskError
    code = code_of(kind)
    if hide:
        level = logging.WARNING if code in DECLINES else logging.ERROR
        log.log(level, "%s: %s", type(error).__name__, error)
        return code, f"client {name!r}: {kind.__name__}; the client's log has the details"
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
    commit: Callable[[], None] | None = None,
) -> RecordDict:
    """Trains one client as a message requests, and lets every exception pass.

    Args:
        client: The task with its limits.
        name: The client whose data is trained on.
        message: The server's instruction.
        context: The node's context, whose state contains the ledger and the local layers.
        commit: Called once the state contains the charge, before training starts.
    """
    instruction = read_instruction(message.content)
    ledger = read_ledger(context) if client.run.private else Ledger()

    def on_spend(spent: Ledger) -> None:
        write_ledger(context, spent)
        if commit is not None:
            commit()

    update = learn(
        client,
        name,
        instruction,
        ledger,
        on_spend=on_spend,
        local=read_local(context),
        on_local=partial(write_local, context),
    )
    return update_content(update)


def evaluate_client(
    client: Client,
    name: str,
    message: Message,
    context: Context,
    commit: Callable[[], None] | None = None,
) -> RecordDict:
    """Evaluates a model on one client's held-out data as a message requests.

    Under example-level privacy the reply has the primary metric's sums alone, with noise.

    Args:
        client: The task with its limits.
        name: The client whose held-out data are used.
        message: The server's instruction.
        context: The node's context, whose state contains the ledger and the local layers.
        commit: Called under privacy once the state contains the charge, before examples are read.
    """
    instruction, bounds = read_instruction(message.content), client.bounds()
    if client.run.private:
        check_evaluates(client.run)
    if not evaluates(client.run.federation, name):
        trains = client.run.federation.has_judges
        why = "it trains, and other clients evaluate" if trains else "set federation.holdout"
        raise InvalidUpdate(f"evaluation: this client has no held-out data: {why}.")
    _, held_out = local_data(client, name)
    if not size_of(held_out):
        raise InvalidUpdate("evaluation: this client has too few examples to hold any back.")
    local = read_local(context)
    model = model_of(client, instruction, local)
    model = model.to(available(client.run.client.device))
    if not client.run.private:
        metrics = client.task.metrics
        return evaluation_content(measure(model, held_out, metrics, between=bounds.check))
    ledger = read_ledger(context)

    def on_spend(spent: Ledger) -> None:
        write_ledger(context, spent)
        if commit is not None:
            commit()

    measured = evaluate_privately(
        client,
        name,
        model,
        instruction,
        held_out,
        ledger,
        initial=not local,
        on_spend=on_spend,
        between=partial(bounds.check, memory=False),  # memory use may depend on the examples
    )
    return evaluation_content(measured)


def _statistics(client: Client, name: str, message: Message, context: Context) -> RecordDict:
    """Returns float64 sums and sums of squares of the inputs after the task's preprocessing."""
    if client.run.private:
        raise InvalidUpdate(
            "statistics: this client trains with example-level privacy and releases no sums."
        )
    bounds = client.bounds()
    examples = training_data(client, name)
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
