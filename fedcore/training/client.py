"""One client: what it is made of, and how it trains when it is asked to."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Subset

from fedcore.config.client_settings import settings_with
from fedcore.config.owner import OwnerPolicy
from fedcore.config.run import ClientConfig as Settings
from fedcore.config.run import RunConfig
from fedcore.errors import DataError, FedcoreError, InvalidUpdate, TaskError, TrainingDiverged
from fedcore.observability.words import counted
from fedcore.privacy.client_level import bounded
from fedcore.privacy.ledger import NO_OTHER_RUNS, Ledger, OtherRuns, charge
from fedcore.privacy.planning import PrivatePlan, expected_batch_size, plan
from fedcore.seeds import Randomness, derive
from fedcore.task.definition import Examples, Folder, Task, data_folder, read_examples, size_of
from fedcore.task.model import FullModel, build_model
from fedcore.training.batches import split
from fedcore.training.bounds import Bounds, unbounded
from fedcore.training.device import available
from fedcore.training.local import proximal, train
from fedcore.training.memory import check_memory, memory_errors
from fedcore.training.per_example.pace import step_seconds
from fedcore.training.per_example.trial import find_way
from fedcore.training.per_example.ways import GradientMethod
from fedcore.training.private import MEMORY_BYTES, train_private
from fedcore.training.resident import Resident
from fedcore.updates.messages import EPSILON, TRAIN_LOSS, Instruction, Update
from fedcore.updates.pack import pack

log = logging.getLogger("fedcore.device")

_LARGEST_WEIGHT = 1e6
_LARGEST_STATISTIC = 1e12
"""What a server may send where examples are protected: nothing larger comes of training."""


def log_skipped(name: str, count: int) -> None:
    """Says in the device's own log that examples counted as zero; how many is private."""
    log.warning("%s", skipped_text(name, count))


def skipped_text(name: str, count: int) -> str:
    """What is said of places in a client's batches that counted as zero."""
    return (
        f"client {name!r}: {counted(count, 'example')} of its batches had no finite "
        "gradient at the server's weights or could not be read, and counted as zero"
    )


@dataclass(frozen=True)
class Client:
    """What a client is made of: the task and the limits it runs within."""

    task: Task
    run: RunConfig
    owner: OwnerPolicy
    randomness: Randomness
    others: OtherRuns = NO_OTHER_RUNS
    """What other runs have spent on the same data."""
    on_skipped: Callable[[str, int], None] = log_skipped
    """Hears a client's name, and how many places in its batches counted as zero: private."""
    bounds: Callable[[], Bounds] = unbounded
    """What bounds the work on a message that comes now."""

    @cached_property
    def folder(self) -> Folder:
        """Where its data is: where the owner says, or ``FEDCORE_DATA``."""
        return self.owner.data_folder or data_folder()

    @cached_property
    def way(self) -> GradientMethod:
        """How per-example gradients are taken, found on made-up examples and fresh weights."""
        model = build_model(self.task, self.run).to(available(self.run.client.device))
        with self.randomness.library_streams("way"):  # or the first message would draw otherwise
            return find_way(self.task, model)

    @property
    def protects(self) -> bool:
        """Whether what this client sends is to say nothing of single examples."""
        return self.run.private and self.is_real

    @property
    def is_real(self) -> bool:
        """Whether this is a device, and no client of a simulation."""
        return self.randomness.origin == "system"

    @cached_property
    def resident(self) -> Resident:
        """The model, built with the first message that needs it."""
        return Resident(build_model(self.task, self.run))


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
    except BaseException as error:
        # Whatever a half-trained model holds, the next message begins without it.
        client.__dict__.pop("resident", None)
        if not (client.run.client_private and _is_of_data(error)):
            raise
        # Neither who answers nor whether a round has its quorum is to show what data are like.
        log.error(
            "client %r answers that nothing changed, as client-level privacy asks: %s: %s",
            name,
            type(error).__name__,
            error,
        )
        return bounded(client.run.privacy, instruction, instruction.weights, {})


def _is_of_data(error: BaseException) -> bool:
    """Whether a client's data may have decided that this was raised."""
    if isinstance(error, FedcoreError):
        return isinstance(error, TrainingDiverged | DataError)
    return isinstance(error, Exception | SystemExit)


def _learn(
    client: Client,
    name: str,
    instruction: Instruction,
    ledger: Ledger,
    on_spend: Callable[[Ledger], None],
) -> Update:
    run, number, bounds = client.run, instruction.round, client.bounds()
    settings = settings_of(client, instruction)
    examples, _ = local_data(client, name)
    steps = settings.epochs * -(-size_of(examples) // settings.batch_size)
    bounds.admit(steps)
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
            settings,
            run.privacy,
            device,
            owner_limit_bytes=limit,
        )
        metrics: dict[str, float] = {}
        if run.private:
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
                penalty=proximal(model.model, instruction.proximal_mu)
                if instruction.proximal_mu
                else None,
                between=bounds.check,
            )
        weights = pack(model.model)
    if not np.isfinite(weights).all():
        raise TrainingDiverged(
            f"round {number}: the trained weights are not finite at learning_rate "
            f"{settings.learning_rate}. No update was sent; lower the learning rate."
        )
    if run.client_private:
        return bounded(run.privacy, instruction, weights, metrics)
    return Update(weights, size_of(examples), metrics)


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
    """DP-SGD behind a charged ledger; returns the epsilon spent so far, this round included."""
    run, number = client.run, instruction.round
    check_instruction(instruction, model)
    way = client.way
    device = next(model.model.parameters()).device
    planned, ledger = spend(client, name, examples, ledger, settings, round=number)
    memory_bytes = min(MEMORY_BYTES, (client.owner.max_memory_bytes or MEMORY_BYTES) // 2)
    bounds.admit(
        planned.charge.steps,
        # As large a batch as the settings ask for: the data decide nothing but their number.
        step_s=partial(
            step_seconds,
            client.task,
            model,
            way,
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
        way=way,
        draws=client.randomness.draws(device, number, name),
        proximal_mu=instruction.proximal_mu,
        memory_bytes=memory_bytes,
        between=partial(bounds.check, memory=False),  # what it takes may depend on the examples
    )
    if skipped:
        client.on_skipped(name, skipped)
    return ledger.epsilon(run.privacy)


def check_instruction(instruction: Instruction, model: FullModel) -> None:
    """Refuses numbers of a server that no training leads to, whatever the examples are.

    Raises:
        InvalidUpdate: a weight, a statistic of the preprocessing or FedProx's weight is not finite,
            or larger than training leads to.
    """
    if instruction.weights.dtype != np.float32:  # of the least whole number, abs is negative
        raise InvalidUpdate(
            f"round {instruction.round}: the server's weights are {instruction.weights.dtype}, "
            "expected float32. Nothing was trained or charged; server and client must run the same "
            "version."
        )
    statistics = [t.detach().to("cpu") for t in model.preprocess.buffers() if t.numel()]
    found = [
        ("weight", float(np.abs(instruction.weights).max(initial=0)), _LARGEST_WEIGHT),
        ("proximal_mu", abs(instruction.proximal_mu), _LARGEST_WEIGHT),
        *(("statistic of inputs", _largest(t), _LARGEST_STATISTIC) for t in statistics),
    ]
    for what, largest, limit in found:
        if not largest <= limit:  # holds for NaN, too
            raise InvalidUpdate(
                f"round {instruction.round}: the server sent a {what} of {largest:g}, expected at "
                f"most {limit:g}. Nothing was trained or charged; the server's model has diverged, "
                "or the server is not honest."
            )


def _largest(values: Tensor) -> float:
    wide = torch.complex128 if values.is_complex() else torch.float64
    return float(values.to(wide).abs().max())


def settings_of(client: Client, instruction: Instruction) -> Settings:
    """What a client trains with in this round: the run's settings, and what its server changed.

    Raises:
        InvalidUpdate: what it changed is out of bounds, or may not change under privacy. Nothing
            was trained or charged.
    """
    try:
        asked = instruction.settings
        return settings_with(client.run.client, asked, private=client.run.private)
    except ValueError as error:
        raise InvalidUpdate(
            f"round {instruction.round}: the server asks for {error}. Nothing was trained or "
            "charged; mend what federation.strategy on the server sends to clients."
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
    """How a client trains in this round with ``settings``, and its ledger with that charged.

    Raises:
        BudgetExhausted: its budget does not allow it; nothing may be trained then.
    """
    run = client.run
    participations = run.privacy.participations or run.federation.rounds
    planned = plan(
        examples,
        settings,
        run.privacy,
        round=round,
        participations=participations,
        max_delta_share=client.owner.max_delta_share,
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
