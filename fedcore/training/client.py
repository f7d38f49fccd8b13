"""One client and its local training: `learn` turns an instruction into an update."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
import torch
from torch.utils.data import Subset

from fedcore.config.client_settings import settings_with
from fedcore.config.in_round import client_in_round, planned_epochs, privacy_in_round
from fedcore.config.owner import OwnerPolicy
from fedcore.config.run import ClientConfig as Settings
from fedcore.config.run import RunConfig
from fedcore.errors import DataError, FedcoreError, InvalidUpdate, TaskError, TrainingDiverged
from fedcore.observability.words import counted
from fedcore.privacy.accounting import TRAIN, part_of_split
from fedcore.privacy.client_level import bounded
from fedcore.privacy.ledger import NO_OTHER_RUNS, Ledger, OtherRuns, charge
from fedcore.privacy.planning import PrivatePlan, expected_batch_size, plan
from fedcore.seeds import Randomness, derive
from fedcore.task.definition import Examples, Folder, Task, data_folder, size_of
from fedcore.task.model import FullModel, build_model, warm_start
from fedcore.training.batches import split
from fedcore.training.bounds import Bounds, unbounded
from fedcore.training.device import available
from fedcore.training.examples import task_examples
from fedcore.training.local import proximal, train
from fedcore.training.memory import check_memory, memory_errors
from fedcore.training.per_example.gradient_methods import GradientMethod
from fedcore.training.per_example.pace import step_seconds
from fedcore.training.per_example.trial import choose_method
from fedcore.training.private import MEMORY_BYTES, train_private
from fedcore.training.resident import Resident
from fedcore.training.roles import is_judge
from fedcore.training.server_numbers import check_instruction
from fedcore.training.split_label import NOT_SPLIT, split_label
from fedcore.updates.frozen import check_unchanged, frozen_parameters
from fedcore.updates.local import local_state
from fedcore.updates.messages import EPSILON, TRAIN_LOSS, Instruction, Update
from fedcore.updates.pack import pack

log = logging.getLogger("fedcore.device")


def log_skipped(name: str, count: int) -> None:
    """Logs on the device how many examples counted as zero; the count is private."""
    log.warning("%s", skipped_text(name, count))


def skipped_text(name: str, count: int) -> str:
    """Returns the log message for examples in a client's batches that counted as zero."""
    return (
        f"client {name!r}: {counted(count, 'example')} in its batches had no finite gradient at "
        "the server's weights or could not be read, and counted as zero"
    )


@dataclass(frozen=True)
class Client:
    """A client's fixed parts: task, run settings, owner's limits and source of randomness."""

    task: Task
    run: RunConfig
    owner: OwnerPolicy
    randomness: Randomness
    others: OtherRuns = NO_OTHER_RUNS
    """Charges of other runs on the same data."""
    on_skipped: Callable[[str, int], None] = log_skipped
    """Callback with the client's name and the number of batch positions that counted as zero;
    private."""
    bounds: Callable[[], Bounds] = unbounded
    """Returns the limits for the work on a message that arrives now."""

    @cached_property
    def folder(self) -> Folder:
        """The data folder: the owner's setting, else ``FEDCORE_DATA``."""
        return self.owner.data_folder or data_folder()

    @cached_property
    def method(self) -> GradientMethod:
        """The per-example gradient method, chosen on synthetic examples and fresh weights."""
        model = build_model(self.task, self.run).to(available(self.run.client.device))
        with self.randomness.library_streams("way"):  # else the first message's draws would differ
            return choose_method(self.task, model)

    @property
    def protects(self) -> bool:
        """Whether this client's updates must be private at example level."""
        return self.run.private and self.is_real

    @property
    def is_real(self) -> bool:
        """Whether this client is a device rather than part of a simulation."""
        return self.randomness.origin == "system"

    @cached_property
    def resident(self) -> Resident:
        """The model, built for the first message that needs it."""
        model = build_model(self.task, self.run)
        if not self.is_real and frozen_parameters(model.model):
            warm_start(self.run, model)  # a simulation has the file, and sends nothing frozen
        return Resident(model)


def learn(
    client: Client,
    name: str,
    instruction: Instruction,
    ledger: Ledger,
    *,
    on_spend: Callable[[Ledger], None],
    local: bytes = b"",
    on_local: Callable[[bytes], None] = lambda local: None,
) -> Update:
    """Trains one client locally and returns its update, whatever the transport.

    Under client-level privacy, an error that the data may have caused yields an unchanged update.

    Args:
        client: The task, the settings and the limits.
        name: Name of the client whose data is used.
        instruction: The server's request.
        ledger: The client's privacy ledger; read only under example-level privacy.
        on_spend: Callback with the charged ledger, before any training.
        local: The client's local layers, see `fedcore.updates.local`; the initial ones if empty.
        on_local: Callback with the trained local layers, which must outlive the update.

    Raises:
        FedcoreError: Training was refused or failed; charges stay in the ledger.
    """
    try:
        update, after = _train(client, name, instruction, ledger, on_spend, local)
    except BaseException as error:
        # The model may be half-trained: the next message builds a new one.
        client.__dict__.pop("resident", None)
        if not (client.run.client_private and _is_of_data(error)):
            raise
        # Which clients reply, and whether a round reaches its quorum, must not depend on the data.
        log.error(
            "client %r replies with an unchanged model, as client-level privacy requires: %s: %s",
            name,
            type(error).__name__,
            error,
        )
        return bounded(client.run.privacy, instruction, instruction.weights, {})
    on_local(after)
    return update


def _is_of_data(error: BaseException) -> bool:
    """Returns whether a client's data may have caused this error."""
    if isinstance(error, FedcoreError):
        return isinstance(error, TrainingDiverged | DataError)
    return isinstance(error, Exception | SystemExit)


def _train(
    client: Client,
    name: str,
    instruction: Instruction,
    ledger: Ledger,
    on_spend: Callable[[Ledger], None],
    local: bytes,
) -> tuple[Update, bytes]:
    """Returns the update and the trained local layers."""
    run, number, bounds = client.run, instruction.round, client.bounds()
    settings = settings_of(client, instruction)
    examples = training_data(client, name)
    bounds.admit(settings.steps_of(size_of(examples)))
    device = available(run.client.device)
    if client.owner.max_threads:
        torch.set_num_threads(min(torch.get_num_threads(), client.owner.max_threads))
    with (
        memory_errors(f"round {number}: training"),
        client.randomness.library_streams("train", number, name),
    ):
        model = model_of(client, instruction, local).to(device)
        limit = client.owner.max_memory_bytes
        check_memory(
            model.model,
            settings,
            run.privacy,
            device,
            owner_limit_bytes=limit,
        )
        metrics: dict[str, float] = {}
        if run.private:
            check_instruction(instruction, model, initial=not local)
            metrics[EPSILON] = _train_private(
                client, name, model, examples, ledger, on_spend, instruction, settings, bounds
            )
        else:
            order = client.randomness.generator(torch.device("cpu"), "order", number, name)
            metrics[TRAIN_LOSS] = train(
                model,
                examples,
                client.task.loss_of,
                settings,
                epochs=settings.epochs,
                batch_size=settings.batch_size,
                rng=order,
                steps=settings.steps,
                physical_batch_size=settings.physical_batch_size,
                penalty=proximal(model.model, instruction.proximal_mu)
                if instruction.proximal_mu
                else None,
                between=bounds.check,
            )
        weights, after = pack(model.model), local_state(model.model)
        check_unchanged(client.resident.checksums, model.model)
    if not np.isfinite(weights).all():
        raise TrainingDiverged(
            f"round {number}: the trained weights are not finite at learning_rate "
            f"{settings.learning_rate}. No update was sent; lower the learning rate."
        )
    if run.client_private:
        whole = client.resident.layout.whole  # integers stay: a step of one would fill the bound
        weights[len(weights) - whole :] = instruction.weights[len(weights) - whole :]
        return bounded(run.privacy, instruction, weights, metrics), after
    return Update(weights, size_of(examples), metrics), after


def _train_private(
    client: Client,
    name: str,
    model: FullModel,
    examples: Examples,
    ledger: Ledger,
    on_spend: Callable[[Ledger], None],
    instruction: Instruction,
    settings: Settings,
    bounds: Bounds,
) -> float:
    """Trains by DP-SGD after charging the ledger; returns the total epsilon, with this round."""
    run, number = client.run, instruction.round
    method = client.method
    device = next(model.model.parameters()).device
    planned, ledger = spend(client, name, examples, ledger, settings, round=number)
    memory_bytes = min(MEMORY_BYTES, (client.owner.max_memory_bytes or MEMORY_BYTES) // 2)
    bounds.admit(
        planned.charge.steps,
        # The expected batch size, which depends only on the settings and the number of examples.
        step_s=partial(
            step_seconds,
            client.task,
            model,
            method,
            planned,
            batch_size=expected_batch_size(size_of(examples), planned),
            memory_bytes=memory_bytes,
        )
        if client.owner.max_round_s is not None or client.owner.hours is not None
        else None,
    )
    on_spend(ledger)  # spend before release
    skipped = train_private(
        model.preprocess,
        model.model,
        examples,
        client.task.loss_of,
        settings,
        planned,
        method=method,
        draws=client.randomness.draws(device, number, name),
        proximal_mu=instruction.proximal_mu,
        memory_bytes=memory_bytes,
        between=partial(bounds.check, memory=False),  # memory use may depend on the examples
    )
    if skipped:
        client.on_skipped(name, skipped)
    return ledger.epsilon(run.privacy)


def settings_of(client: Client, instruction: Instruction) -> Settings:
    """Returns this round's client settings: the run's by its schedules, with the server's changes.

    Raises:
        InvalidUpdate: An override is out of bounds, or may not change under privacy. Nothing was
            trained or charged.
    """
    try:
        asked = instruction.settings
        run = client_in_round(client.run, instruction.round)
        return settings_with(run, asked, private=client.run.private)
    except ValueError as error:
        raise InvalidUpdate(
            f"round {instruction.round}: invalid settings from the server: {error}. Nothing was "
            "trained or charged; correct what federation.strategy on the server sends to clients."
        ) from None


def spend(
    client: Client,
    name: str,
    examples: Examples,
    ledger: Ledger,
    settings: Settings,
    *,
    round: int,
) -> tuple[PrivatePlan, Ledger]:
    """Returns the plan of this round's private training, and the ledger with that charge added.

    Raises:
        BudgetExhausted: The charge would exceed the budget; the client must not train.
    """
    run = client.run
    participations = run.privacy.participations or run.federation.rounds
    held_back = run.federation.holdout and not run.federation.has_judges
    part = part_of_split(split_of(client, examples), TRAIN) if held_back else ""
    planned = plan(
        examples,
        settings,
        privacy_in_round(run, round),
        round=round,
        participations=participations,
        epochs_in_all=planned_epochs(run, participations),
        max_delta_share=client.owner.max_delta_share,
        part=part,
    )
    after = charge(
        ledger,
        planned.charge,
        run.privacy,
        client=name,
        owner=client.owner,
        others=client.others,
    )
    return planned, after


def split_of(client: Client, examples: Examples) -> str:
    """Returns the label of the split that ``examples`` are a part of (see `split_label`)."""
    if client.run.federation.has_judges:
        return NOT_SPLIT
    return split_label(examples, client.run.federation.holdout, read=client.is_real)


def local_data(client: Client, name: str) -> tuple[Examples, Examples]:
    """Returns the client's training examples and its holdout; either is empty for some clients.

    Raises:
        DataError: The data cannot be read, or are empty.
    """
    folder = client.folder
    examples = task_examples(
        client.task,
        lambda: client.task.client_data(name, folder),
        what=f"data of client {name!r}",
        folder=folder,
    )
    federation = client.run.federation
    if is_judge(federation, name):
        return Subset(examples, []), examples
    if federation.has_judges or not federation.holdout:
        return examples, Subset(examples, [])
    return split(examples, federation.holdout, derive(0, "holdout", name))


def training_data(client: Client, name: str) -> Examples:
    """Returns the examples that a client trains on.

    Raises:
        InvalidUpdate: The client only evaluates. Its data were not read.
        DataError: The data cannot be read, or are empty.
    """
    if is_judge(client.run.federation, name):
        raise InvalidUpdate(
            f"client {name!r} holds back all of its data (federation.holdout_by = 'clients', "
            f"holdout = {client.run.federation.holdout:g}): it evaluates models, and never trains. "
            "Its data were not read; the server must ask other clients to train."
        )
    return local_data(client, name)[0]


def model_of(client: Client, instruction: Instruction, local: bytes = b"") -> FullModel:
    """Returns the model with the server's weights and the client's ``local`` layers loaded.

    Raises:
        TaskError: The server's weights belong to another model.
    """
    layout = client.resident.layout
    if layout.digest != instruction.layout:
        raise TaskError(
            f"round {instruction.round}: the server's weights have layout "
            f"{instruction.layout[:12]}, this client's model {layout.digest[:12]}. Nothing was "
            "trained; install the task that the server runs."
        )
    return client.resident.load(instruction, local)
