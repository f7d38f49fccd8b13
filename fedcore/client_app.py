"""The ClientApp: what a client does, the same on a device and in a simulation."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from flwr.app import (
    Array,
    ArrayRecord,
    Context,
    Error,
    Message,
    MetricRecord,
    RecordDict,
)
from flwr.clientapp import ClientApp
from flwr.clientapp.typing import Mod
from torch.utils.data import Subset

from fedcore.config import RunConfig
from fedcore.errors import (
    BudgetExhausted,
    ConfigError,
    FedcoreError,
    InvalidUpdate,
    TaskError,
    TrainingDiverged,
)
from fedcore.model import FullModel, build_model
from fedcore.owner import OwnerPolicy, tighten
from fedcore.privacy.ledger import (
    NO_OTHER_RUNS,
    Ledger,
    OtherRuns,
    charge,
    read_ledger,
    write_ledger,
)
from fedcore.privacy.planning import PrivatePlan, plan
from fedcore.resident import Resident
from fedcore.seeds import Randomness, derive
from fedcore.task import Examples, Folder, Task, data_folder, read_examples, size_of
from fedcore.training.batches import in_order, split
from fedcore.training.device import available
from fedcore.training.evaluate import BATCH_SIZE, evaluate
from fedcore.training.local import proximal, train
from fedcore.training.memory import check_memory, memory_errors
from fedcore.training.per_example.trial import find_way
from fedcore.training.per_example.ways import Way
from fedcore.training.private import MEMORY_BYTES, train_private
from fedcore.updates.messages import (
    ARRAYS,
    DECLINED,
    EPSILON,
    METRICS,
    NUM_EXAMPLES,
    REFUSED,
    TRAIN_LOSS,
    Instruction,
    Update,
    read_instruction,
    update_content,
)
from fedcore.updates.pack import pack

log = logging.getLogger("fedcore.device")

_LARGEST_WEIGHT = 1e6
_LARGEST_STATISTIC = 1e12
"""What a server may send where examples are protected: nothing larger comes of training."""


@dataclass(frozen=True)
class Client:
    """What a client is made of: the task and the limits it runs within."""

    task: Task
    run: RunConfig
    owner: OwnerPolicy
    randomness: Randomness
    others: OtherRuns = NO_OTHER_RUNS
    """What other runs have spent on the same data."""

    @cached_property
    def folder(self) -> Folder:
        """Where its data is: where the owner says, or ``FEDCORE_DATA``."""
        return self.owner.data_folder or data_folder()

    @cached_property
    def way(self) -> Way:
        """How per-example gradients are taken, found on made-up examples and fresh weights."""
        model = build_model(self.task, self.run).to(available(self.run.client.device))
        return find_way(self.task, model)

    @property
    def protects(self) -> bool:
        """Whether what this client sends is to say nothing of single examples."""
        return self.run.private and self.randomness.origin == "system"

    @cached_property
    def resident(self) -> Resident:
        """The model, built with the first message that needs it."""
        return Resident(build_model(self.task, self.run))


def client_app(
    task: Task,
    run: RunConfig,
    *,
    owner: OwnerPolicy,
    randomness: Randomness,
    mods: Sequence[Mod] = (),
    others: OtherRuns = NO_OTHER_RUNS,
) -> ClientApp:
    """An ordinary Flower ClientApp that trains, evaluates and counts for one client a message.

    Args:
        task: The task installed here; nothing sent by a server is run.
        run: The run, as the server asks for it.
        owner: What the owner of this device allows; it tightens ``run``.
        randomness: The seed of a simulation, or the operating system's entropy.
        mods: Flower mods around training, as some strategies need.
        others: What other runs have spent on the same data, as a device knows.
    """
    client = Client(task, tighten(run, owner), owner, randomness, others)
    app = ClientApp()

    @app.train(mods=list(mods))
    def on_train(message: Message, context: Context) -> Message:
        return _answer(train_client, client, message, context)

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
            f"node {context.node_id}: partition-id = {place!r}, and the task has {len(clients)} "
            "clients. It has nothing to train on; run as many nodes as clients, or set `client` in "
            "the node's configuration."
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
        return Message(Error(*error_of(name, error, hide=client.protects)), reply_to=message)


def error_of(name: str, error: Exception | SystemExit, *, hide: bool) -> tuple[int, str]:
    """Code and reason in the reply of a client that could not do what was asked, or declined.

    Args:
        name: The client's.
        error: What stopped it.
        hide: Sends the kind of the error alone, and writes its text, which may quote examples, to
            the device's own log.
    """
    if isinstance(error, BudgetExhausted):
        return DECLINED, str(error)
    kind = type(error) if isinstance(error, FedcoreError) else TaskError
    if hide:
        log.error("%s: %s", type(error).__name__, error)
        return REFUSED + kind.exit_code, f"client {name!r}: {kind.__name__}; its log says more"
    if isinstance(error, FedcoreError):
        return REFUSED + error.exit_code, f"client {name!r}: {type(error).__name__}: {error}"
    reason = f"client {name!r}: the task raised {type(error).__name__}: {error}"
    return REFUSED + TaskError.exit_code, reason


def train_client(client: Client, name: str, message: Message, context: Context) -> RecordDict:
    """Trains one client as a message asks; whatever fails is raised as it is."""
    instruction = read_instruction(message.content)
    ledger = read_ledger(context) if client.run.private else Ledger()
    update = learn(
        client, name, instruction, ledger, on_spend=lambda spent: write_ledger(context, spent)
    )
    return update_content(update)


def learn(
    client: Client,
    name: str,
    instruction: Instruction,
    ledger: Ledger,
    *,
    on_spend: Callable[[Ledger], None],
) -> Update:
    """One client's local training, whatever its messages travel by.

    Args:
        client: The task and the limits.
        name: Whose data is trained on.
        instruction: What the server asks for.
        ledger: What the client has spent; looked at under privacy alone.
        on_spend: Gets the charged ledger before anything is trained.

    Raises:
        FedcoreError: whatever stops it; what was spent stays spent.
    """
    try:
        return _learn(client, name, instruction, ledger, on_spend)
    except BaseException:  # whatever a half-trained model holds, the next message begins without it
        client.__dict__.pop("resident", None)
        raise


def _learn(
    client: Client,
    name: str,
    instruction: Instruction,
    ledger: Ledger,
    on_spend: Callable[[Ledger], None],
) -> Update:
    run, number = client.run, instruction.round
    examples, _ = local_data(client, name)
    device = available(run.client.device)
    if client.owner.max_threads:
        torch.set_num_threads(min(torch.get_num_threads(), client.owner.max_threads))
    with (
        memory_errors(f"round {number}: training"),
        client.randomness.library_streams("train", number, name),
    ):
        model = model_of(client, instruction).to(device)
        limit = client.owner.max_memory_bytes
        check_memory(
            model.model,
            run.client,
            run.privacy,
            device,
            owner_limit_bytes=limit,
        )
        metrics: dict[str, float] = {}
        if run.private:
            metrics[EPSILON] = _train_private(
                client, name, model, examples, ledger, on_spend, instruction
            )
        else:
            order = client.randomness.generator(torch.device("cpu"), "order", number, name)
            metrics[TRAIN_LOSS] = train(
                model,
                examples,
                client.task.loss_of,
                run.client,
                epochs=run.client.epochs,
                batch_size=run.client.batch_size,
                rng=order,
                penalty=proximal(model.model, instruction.proximal_mu)
                if instruction.proximal_mu
                else None,
            )
        weights = pack(model.model)
    if not np.isfinite(weights).all():
        raise TrainingDiverged(
            f"round {number}: the trained weights are not finite at learning_rate "
            f"{run.client.learning_rate}. No update was sent; lower the learning rate."
        )
    return Update(weights, size_of(examples), metrics)


def _train_private(
    client: Client,
    name: str,
    model: FullModel,
    examples: Examples,
    ledger: Ledger,
    on_spend: Callable[[Ledger], None],
    instruction: Instruction,
) -> float:
    """DP-SGD behind a charged ledger; returns the epsilon spent so far, this round included."""
    run, number = client.run, instruction.round
    check_instruction(instruction, model)
    way = client.way
    device = next(model.model.parameters()).device
    planned, ledger = spend(client, name, examples, ledger, round=number)
    on_spend(ledger)  # spend before release
    train_private(
        model.preprocess,
        model.model,
        examples,
        client.task.loss_of,
        run.client,
        planned,
        way=way,
        draws=client.randomness.draws(device, number, name),
        proximal_mu=instruction.proximal_mu,
        memory_bytes=min(MEMORY_BYTES, (client.owner.max_memory_bytes or MEMORY_BYTES) // 2),
    )
    return ledger.epsilon(run.privacy)


def check_instruction(instruction: Instruction, model: FullModel) -> None:
    """Refuses numbers of a server that no training leads to, whatever the examples are.

    Raises:
        InvalidUpdate: a weight, a statistic of the preprocessing or FedProx's weight is not finite,
            or larger than training leads to.
    """
    statistics = [t for t in model.preprocess.buffers() if t.is_floating_point() and t.numel()]
    found = [
        ("weight", float(np.abs(instruction.weights).max(initial=0)), _LARGEST_WEIGHT),
        ("proximal_mu", abs(instruction.proximal_mu), _LARGEST_WEIGHT),
        *(("statistic of inputs", float(t.abs().max()), _LARGEST_STATISTIC) for t in statistics),
    ]
    for what, largest, limit in found:
        if not largest <= limit:  # holds for NaN, too
            raise InvalidUpdate(
                f"round {instruction.round}: the server sent a {what} of {largest:g}, expected at "
                f"most {limit:g}. Nothing was trained or charged; the server's model has diverged, "
                "or the server is not honest."
            )


def spend(
    client: Client, name: str, examples: Examples, ledger: Ledger, *, round: int
) -> tuple[PrivatePlan, Ledger]:
    """How a client trains in this round, and its ledger with that charged.

    Raises:
        BudgetExhausted: its budget does not allow it; nothing may be trained then.
    """
    run = client.run
    participations = run.privacy.participations or run.federation.rounds
    planned = plan(examples, run.client, run.privacy, round=round, participations=participations)
    after = charge(
        ledger,
        planned.charge,
        run.privacy,
        client=name,
        owner=client.owner,
        others=client.others,
    )
    return planned, after


def _evaluate(client: Client, name: str, message: Message, context: Context) -> RecordDict:
    instruction = read_instruction(message.content)
    if client.run.private:
        raise InvalidUpdate(
            "evaluation: this client trains with example-level privacy and releases no metrics."
        )
    _, held_out = local_data(client, name)
    if not size_of(held_out):
        raise InvalidUpdate("evaluation: this client holds no data back; set federation.holdout.")
    model = model_of(client, instruction).to(available(client.run.client.device))
    values = evaluate(model, held_out, client.task.metrics)
    return RecordDict({METRICS: MetricRecord({NUM_EXAMPLES: size_of(held_out), **values})})


def _statistics(client: Client, name: str, message: Message, context: Context) -> RecordDict:
    """Sums and squares of the inputs behind the task's own preprocessing, in float64."""
    if client.run.private:
        raise InvalidUpdate(
            "statistics: this client trains with example-level privacy and releases no sums."
        )
    examples, _ = local_data(client, name)
    preprocess = client.task.preprocess() if client.task.preprocess else torch.nn.Identity()
    total, squares = np.zeros(0), np.zeros(0)
    with torch.inference_mode():
        for inputs, _ in in_order(examples, BATCH_SIZE):
            values = preprocess(inputs).double().numpy()
            total = total + values.sum(axis=0) if total.size else values.sum(axis=0)
            squared = np.square(values).sum(axis=0)
            squares = squares + squared if squares.size else squared
    arrays = ArrayRecord({"sum": Array(np.asarray(total)), "squares": Array(np.asarray(squares))})
    count = MetricRecord({NUM_EXAMPLES: size_of(examples)})
    return RecordDict({ARRAYS: arrays, METRICS: count})


def local_data(client: Client, name: str) -> tuple[Examples, Examples]:
    """What the client trains on, and what it holds back.

    Raises:
        DataError: it cannot be read, or is empty.
    """
    folder = client.folder
    examples = read_examples(
        lambda: client.task.client_data(name, folder), what=f"data of client {name!r}"
    )
    holdout = client.run.federation.holdout
    if not holdout:
        return examples, Subset(examples, [])
    return split(examples, holdout, derive(0, "holdout", name))


def model_of(client: Client, instruction: Instruction) -> FullModel:
    """The model that a server's message carries, in the task's own code.

    Raises:
        TaskError: the server's weights are of another model.
    """
    layout = client.resident.layout
    if layout.digest != instruction.layout:
        raise TaskError(
            f"round {instruction.round}: the server's weights have layout "
            f"{instruction.layout[:12]}, this client's model {layout.digest[:12]}. Nothing was "
            "trained; install the task that the server runs."
        )
    return client.resident.load(instruction)
