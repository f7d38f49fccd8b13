"""Worker: trains the virtual clients of a `RoundTask` in its process, one by one or in batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property, partial

import numpy as np
import torch
from flwr.app import Context, Error, Message, MessageType, RecordDict
from flwr.clientapp import ClientApp
from numpy.typing import NDArray

from fedcore.client_app import error_of
from fedcore.config.run import ClientConfig as Settings
from fedcore.errors import DataError, FedcoreError, InsufficientMemory, InvalidUpdate
from fedcore.privacy.client_level import bounded
from fedcore.privacy.ledger import Ledger, read_ledger, write_ledger
from fedcore.privacy.planning import PrivatePlan
from fedcore.seeds import Randomness
from fedcore.task.definition import Examples, size_of
from fedcore.task.model import FullModel
from fedcore.training.client import Client, learn, model_of, settings_of, spend, training_data
from fedcore.training.device import available
from fedcore.training.memory import memory_errors
from fedcore.updates.local import read_local, write_local
from fedcore.updates.messages import (
    ARRAYS,
    EPSILON,
    REFUSED,
    TRAIN_LOSS,
    Instruction,
    Update,
    read_instruction,
    update_content,
)
from server.rounds.aggregation.exact_mean import ExactMean
from server.simulation.batched.trainer import Trainer, Trainers, train_in_groups
from server.simulation.batched.work import LocalWork, PrivateWork, TrainedClients, divergence
from server.simulation.virtual.devices import Fate, VirtualFleet, counts, fate, has_started
from server.simulation.virtual.nodes import RUN_ID
from server.simulation.workers.messages import (
    ClientOutcome,
    ClientRef,
    RoundTask,
    content_for,
    instruction_for,
)


@dataclass(frozen=True)
class Ready:
    """A client that is about to be trained in a batch."""

    client: ClientRef
    fate: Fate | None
    work: LocalWork
    ledger: Ledger | None


class Worker:
    """Trains clients for one task at a time; keeps the model in memory between tasks.

    Of a folded task, it keeps only the sum of updates, until `partial_sum`.
    """

    def __init__(
        self,
        client: Client,
        app: ClientApp,
        fleet: VirtualFleet | None,
        skipped: dict[str, int],
    ) -> None:
        """Creates a worker; ``client`` and ``app`` count skipped examples in ``skipped``."""
        self._client = client
        self._skipped = skipped
        self._app = app
        self._fleet = fleet
        self._order: RoundTask | None = None
        self._instruction: Instruction | None = None
        self._sum = ExactMean(0)
        self._trainers = Trainers(client)

    def start_task(self, order: RoundTask) -> None:
        """Starts a task; discards the previous task's sum."""
        self._order = order
        self._instruction = None
        if order.fold:
            self._sum = ExactMean(self._client.resident.layout.size)

    def prepare(self, order: RoundTask, clients: Sequence[ClientRef]) -> None:
        """Computes and caches clients' noise multipliers, before training times are measured."""
        if self._client.run.private:
            self.start_task(order)
            for one in clients:
                with suppress(Exception, SystemExit):  # reported when the client trains
                    examples = training_data(self._client, one.name)
                    asked_of = self._instruction_of(order, one)
                    self._spend(one, examples, asked_of, settings_of(self._client, asked_of))

    def work(self, clients: Sequence[ClientRef]) -> list[ClientOutcome]:
        """Runs the task for these clients; returns outcomes in the same order."""
        order = self._order
        assert order is not None
        if order.kind != MessageType.TRAIN:
            return [self._run_app(order, one, None) for one in clients]
        active, lost = [], []
        self._skipped.clear()
        for one in clients:
            found = self._fate(order, one)
            if found is None or counts(found, deadline_s=order.deadline_s):
                active.append((one, found))
            else:
                lost.append(self._lost_outcome(order, one, found))
        if order.method == "vectorised":
            answers = list(self._train_batched(order, active))
        else:
            answers = [self._train_one(order, one, found) for one, found in active]
        places = {one.node: place for place, one in enumerate(clients)}
        answers = [replace(one, skipped=self._skipped.get(one.client.name, 0)) for one in answers]
        return sorted(answers + lost, key=lambda answer: places[answer.client.node])

    def clients_in_time(self, order: RoundTask, clients: Sequence[ClientRef]) -> list[ClientRef]:
        """Returns the clients in ``clients`` whose updates arrive in time on the virtual clock."""
        fates = ((one, self._fate(order, one)) for one in clients)
        return [
            one
            for one, found in fates
            if found is None or counts(found, deadline_s=order.deadline_s)
        ]

    def partial_sum(self) -> ExactMean:
        """Returns the sum of updates folded since the task began."""
        return self._sum

    def _read(self, order: RoundTask) -> Instruction:
        """Returns the task's instruction, parsed once."""
        if self._instruction is None:
            self._instruction = read_instruction(order.content)
        return self._instruction

    def _instruction_of(self, order: RoundTask, one: ClientRef) -> Instruction:
        """Returns the task's instruction for one client."""
        return instruction_for(order, one, self._read(order))

    def _fate(self, order: RoundTask, one: ClientRef) -> Fate | None:
        """Returns the client's fate on the virtual clock; None without devices."""
        if self._fleet is None:
            return None
        try:
            examples = size_of(training_data(self._client, one.name))
            settings = settings_of(self._client, self._instruction_of(order, one))
        except (Exception, SystemExit):  # reported when the client trains
            return None
        sent = sum(len(array.data) for array in order.content.array_records[ARRAYS].values())
        return fate(
            self._fleet,
            one.name,
            self._read(order).round,
            clock_s=order.clock_s,
            examples=examples,
            epochs=settings.passes_of(examples),
            bytes_down=sent,
            bytes_up=sent,
        )

    def _lost_outcome(self, order: RoundTask, one: ClientRef, found: Fate) -> ClientOutcome:
        """Returns the outcome of a late or lost client; charges its ledger if it has begun."""
        ledger = one.ledger
        if self._client.run.private and has_started(found):
            with suppress(FedcoreError):  # it declined or failed, but is lost anyway
                instruction = self._instruction_of(order, one)
                examples = training_data(self._client, one.name)
                settings = settings_of(self._client, instruction)
                _, ledger = self._spent(one, examples, instruction, settings)
        return ClientOutcome(one, ledger=ledger, fate=found)

    def _train_one(self, order: RoundTask, one: ClientRef, found: Fate | None) -> ClientOutcome:
        """Trains one client; without messages, where the task folds updates."""
        if not order.fold:
            return self._run_app(order, one, found)
        ledgers, layers = [one.ledger], [b""]
        try:
            update = learn(
                self._client,
                one.name,
                self._instruction_of(order, one),
                one.ledger or Ledger(),
                on_spend=ledgers.append,
                local=one.local,
                on_local=layers.append,
            )
        except (Exception, SystemExit) as error:  # the task's code: that client's failure
            return ClientOutcome(
                one, error=error_of(one.name, error, hide=False), ledger=ledgers[-1], fate=found
            )
        outcome = self._folded(order, one, update, ledgers[-1], found)
        return outcome if outcome.error else replace(outcome, local=layers[-1])

    def _run_app(self, order: RoundTask, one: ClientRef, found: Fate | None) -> ClientOutcome:
        """Runs one client with the ClientApp that devices run, mods included."""
        context = Context(RUN_ID, one.node, {"client": one.name}, RecordDict(), {})
        if one.ledger is not None:
            write_ledger(context, one.ledger)
        write_local(context, one.local)
        message = Message(content_for(order, one), one.node, order.kind)
        try:
            reply = self._app(message, context)
        except Exception as error:  # like a Flower node: an error in a mod is the client's failure
            reason = f"client {one.name!r}: its app raised {type(error).__name__}: {error}"
            reply = Message(Error(REFUSED, reason), reply_to=message)
        kept = read_ledger(context)
        ledger = kept if kept.charges else None
        if reply.has_error():
            code = (reply.error.code, reply.error.reason or f"error {reply.error.code}")
            return ClientOutcome(one, error=code, ledger=ledger, fate=found)
        local = read_local(context)
        return ClientOutcome(one, content=reply.content, ledger=ledger, local=local, fate=found)

    def _train_batched(
        self, order: RoundTask, clients: Sequence[tuple[ClientRef, Fate | None]]
    ) -> Iterator[ClientOutcome]:
        """Trains clients in batches; each has the result of training by itself.

        Clients are grouped by their settings, and groups are trained in turn.
        """
        groups: dict[tuple[Settings, float], list[Ready]] = {}
        for one, found in clients:
            try:
                instruction = self._instruction_of(order, one)
                settings = settings_of(self._client, instruction)
                examples = training_data(self._client, one.name)
                private, ledger = self._spend(one, examples, instruction, settings)
            except (Exception, SystemExit) as error:  # the task's code: that client's failure
                if self._client.run.client_private:  # hides failures
                    yield self._train_one(order, one, found)
                    continue
                code = error_of(one.name, error, hide=False)
                yield ClientOutcome(one, error=code, ledger=one.ledger, fate=found)
                continue
            order_of, layers = (self._stream(word, instruction, one) for word in ("order", "train"))
            work = LocalWork(examples, order_of, private, layers)
            key = (settings, instruction.proximal_mu)
            groups.setdefault(key, []).append(Ready(one, found, work, ledger))
        for (settings, mu), ready in groups.items():
            yield from self._group(order, ready, settings, mu)

    def _group(
        self, order: RoundTask, ready: Sequence[Ready], settings: Settings, mu: float
    ) -> Iterator[ClientOutcome]:
        """Trains clients that have the same settings."""
        client, instruction = self._client, self._read(order)
        work_of = [one.work for one in ready]
        load = partial(self._model, instruction)
        trainer = self._trainers.find(load, work_of, settings, chosen=order.chosen)
        try:
            if trainer is None:
                raise DataError("data: none of these clients can be trained in a vectorised batch")
            with memory_errors(f"round {instruction.round}: {len(ready)} clients together"):
                model = self._model(instruction)
                groups = train_in_groups(trainer, model, work_of, client, settings, mu)
        except InsufficientMemory:
            raise
        except (Exception, SystemExit):  # a client's error: found when each trains by itself
            yield from (self._train_one(order, one.client, one.fate) for one in ready)
            return
        for places, trained in groups:
            some = [ready[place] for place in places]
            yield from self._answers(order, some, trained, trainer, settings)

    def _answers(
        self,
        order: RoundTask,
        ready: Sequence[Ready],
        trained: TrainedClients,
        trainer: Trainer,
        settings: Settings,
    ) -> Iterator[ClientOutcome]:
        """Yields the outcomes of clients that were trained in one batch; folds their updates."""
        rows = trained.weights.cpu().numpy()
        finite = np.isfinite(rows).all(axis=1)
        errors = [
            divergence(loss, whole, settings, one.work.examples)
            for loss, whole, one in zip(trained.losses, finite, ready, strict=True)
        ]
        if self._client.run.client_private:
            yield from self._bounded(order, ready, rows, errors)
            return
        taken = [place for place, error in enumerate(errors) if error is None]
        sizes = [one.work.size for one in ready]
        if order.fold:
            weights = [1 if order.uniform else sizes[place] for place in taken]
            fitting = rows if len(taken) == len(rows) else rows[taken]
            self._sum.add_rows(fitting, weights, trainer.add_scaled)
        for place, one in enumerate(ready):
            wrong, ledger = errors[place], one.ledger
            if wrong is not None:
                code = error_of(one.client.name, wrong, hide=False)
                yield ClientOutcome(one.client, error=code, ledger=ledger, fate=one.fate)
                continue
            loss = trained.losses[place]
            metrics = {} if loss is None else {TRAIN_LOSS: loss}
            if ledger is not None:
                metrics[EPSILON] = ledger.epsilon(self._client.run.privacy)
            if order.fold:
                yield ClientOutcome(
                    one.client,
                    num_examples=sizes[place],
                    metrics=metrics,
                    ledger=ledger,
                    fate=one.fate,
                )
            else:
                content = update_content(Update(rows[place], sizes[place], metrics))
                yield ClientOutcome(one.client, content=content, ledger=ledger, fate=one.fate)

    def _bounded(
        self,
        order: RoundTask,
        ready: Sequence[Ready],
        rows: NDArray[np.float32],
        errors: Sequence[Exception | None],
    ) -> Iterator[ClientOutcome]:
        """Yields outcomes under client-level privacy: bounds each update before it is used."""
        privacy, instruction = self._client.run.privacy, self._read(order)
        for one, row, error in zip(ready, rows, errors, strict=True):
            spent = {EPSILON: one.ledger.epsilon(privacy)} if one.ledger is not None else {}
            weights = row if error is None else instruction.weights
            update = bounded(privacy, instruction, weights, spent)
            if order.fold:
                yield self._folded(order, one.client, update, one.ledger, one.fate)
            else:
                content = update_content(update)
                yield ClientOutcome(one.client, content=content, ledger=one.ledger, fate=one.fate)

    def _folded(
        self,
        order: RoundTask,
        one: ClientRef,
        update: Update,
        ledger: Ledger | None,
        found: Fate | None,
    ) -> ClientOutcome:
        """Adds an update to the sum; returns an error where the update is not finite."""
        try:
            self._sum.add(update.weights, 1 if order.uniform else update.num_examples)
        except InvalidUpdate as error:
            return ClientOutcome(
                one, error=error_of(one.name, error, hide=False), ledger=ledger, fate=found
            )
        return ClientOutcome(
            one,
            num_examples=update.num_examples,
            metrics=update.metrics,
            ledger=ledger,
            fate=found,
        )

    @cached_property
    def _device(self) -> torch.device:
        return available(self._client.run.client.device)

    def _model(self, instruction: Instruction) -> FullModel:
        model = model_of(self._client, instruction)
        on_device = next(model.parameters()).device == self._device  # `to` walks every module
        return model if on_device else model.to(self._device)

    def _spend(
        self, one: ClientRef, examples: Examples, instruction: Instruction, settings: Settings
    ) -> tuple[PrivateWork | None, Ledger | None]:
        if not self._client.run.private:
            return None, None
        planned, ledger = self._spent(one, examples, instruction, settings)
        randomness: Randomness = self._client.randomness

        def noise(device: torch.device) -> torch.Generator:
            return randomness.generator(device, "noise", instruction.round, one.name)

        return PrivateWork(planned, noise), ledger

    def _spent(
        self, one: ClientRef, examples: Examples, instruction: Instruction, settings: Settings
    ) -> tuple[PrivatePlan, Ledger]:
        before = one.ledger or Ledger()
        number = instruction.round
        return spend(self._client, one.name, examples, before, settings, round=number)

    def _stream(
        self, word: str, instruction: Instruction, one: ClientRef
    ) -> Callable[[], torch.Generator]:
        cpu, randomness = torch.device("cpu"), self._client.randomness
        return lambda: randomness.generator(cpu, word, instruction.round, one.name)
