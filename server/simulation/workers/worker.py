"""One worker: trains the clients that it is given, in the process that it lives in."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from math import isfinite

import numpy as np
import torch
from flwr.app import Context, Error, Message, MessageType, RecordDict
from flwr.clientapp import ClientApp
from numpy.typing import NDArray

from fedcore.client_app import error_of
from fedcore.errors import (
    ConfigError,
    DataError,
    FedcoreError,
    InsufficientMemory,
    InvalidUpdate,
    TaskError,
    TrainingDiverged,
)
from fedcore.privacy.client_level import bounded
from fedcore.privacy.ledger import Ledger, read_ledger, write_ledger
from fedcore.seeds import Randomness
from fedcore.task.definition import Examples, size_of
from fedcore.task.model import FullModel
from fedcore.training.client import Client, learn, local_data, model_of, spend
from fedcore.training.device import available
from fedcore.training.local import diverged
from fedcore.training.memory import memory_errors
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
from server.simulation.batched.trainer import Trainer, find_trainer, train_in_groups
from server.simulation.batched.work import LocalWork, PrivateWork, Trained
from server.simulation.virtual.devices import Fate, Fleet, begun, counts, fate
from server.simulation.virtual.nodes import RUN_ID
from server.simulation.workers.messages import Answer, Asked, Order


@dataclass(frozen=True)
class Ready:
    """A client that is about to be trained beside others."""

    asked: Asked
    fate: Fate | None
    work: LocalWork
    ledger: Ledger | None


class Worker:
    """Trains clients one order at a time; the model stays in memory from order to order.

    Of a folded order only the sum of its updates is kept, until `hand_in`.
    """

    def __init__(
        self, client: Client, app: ClientApp, fleet: Fleet | None, skipped: dict[str, int]
    ) -> None:
        """``skipped`` is where ``client`` and ``app`` note what counted as zero, by client."""
        self._client = client
        self._skipped = skipped
        self._app = app
        self._fleet = fleet
        self._order: Order | None = None
        self._instruction: Instruction | None = None
        self._sum = ExactMean(0)

    def begin(self, order: Order) -> None:
        """Takes an order; what the one before left is gone."""
        self._order = order
        self._instruction = None
        if order.fold:
            self._sum = ExactMean(self._client.resident.layout.size)

    def prepare(self, order: Order, asked: Sequence[Asked]) -> None:
        """Finds what clients' noise takes, which is kept, before anybody measures training them."""
        if self._client.run.private:
            self.begin(order)
            for one in asked:
                with suppress(Exception, SystemExit):  # it says so itself, when it is to train
                    examples, _ = local_data(self._client, one.name)
                    self._spend(one, examples, self._read(order))

    def work(self, asked: Sequence[Asked]) -> list[Answer]:
        """Does for these clients what the order says; answers stand in their order."""
        order = self._order
        assert order is not None
        if order.kind != MessageType.TRAIN:
            return [self._by_app(order, one, None) for one in asked]
        there, lost = [], []
        self._skipped.clear()
        for one in asked:
            found = self._fate(order, one)
            if found is None or counts(found, deadline_s=order.deadline_s):
                there.append((one, found))
            else:
                lost.append(self._lost(order, one, found))
        if order.method == "vectorised":
            answers = list(self._together(order, there))
        else:
            answers = [self._alone(order, one, found) for one, found in there]
        places = {one.node: place for place, one in enumerate(asked)}
        answers = [replace(one, skipped=self._skipped.get(one.asked.name, 0)) for one in answers]
        return sorted(answers + lost, key=lambda answer: places[answer.asked.node])

    def reached(self, order: Order, asked: Sequence[Asked]) -> list[Asked]:
        """Those of ``asked`` whose updates arrive in time on the virtual clock."""
        fates = ((one, self._fate(order, one)) for one in asked)
        return [
            one
            for one, found in fates
            if found is None or counts(found, deadline_s=order.deadline_s)
        ]

    def hand_in(self) -> ExactMean:
        """The sum of what was folded since the order began."""
        return self._sum

    def _read(self, order: Order) -> Instruction:
        """What an order to train asks for, read once."""
        if self._instruction is None:
            self._instruction = read_instruction(order.content)
        return self._instruction

    def _fate(self, order: Order, one: Asked) -> Fate | None:
        """What the client's device does on the virtual clock; None without device classes."""
        if self._fleet is None:
            return None
        try:
            examples = size_of(local_data(self._client, one.name)[0])
        except (Exception, SystemExit):  # the client says so itself, when it is asked to train
            return None
        sent = sum(len(array.data) for array in order.content.array_records[ARRAYS].values())
        return fate(
            self._fleet,
            one.name,
            self._read(order).round,
            clock_s=order.clock_s,
            examples=examples,
            epochs=self._client.run.client.epochs,
            bytes_down=sent,
            bytes_up=sent,
        )

    def _lost(self, order: Order, one: Asked, found: Fate) -> Answer:
        """A client whose update does not arrive in time; if it began, it has charged its ledger."""
        ledger = one.ledger
        if self._client.run.private and begun(found):
            number = self._read(order).round
            with suppress(FedcoreError):  # it declined or failed, and nobody heard of it
                examples, _ = local_data(self._client, one.name)
                _, ledger = spend(
                    self._client, one.name, examples, ledger or Ledger(), round=number
                )
        return Answer(one, ledger=ledger, fate=found)

    def _alone(self, order: Order, one: Asked, found: Fate | None) -> Answer:
        """One client's training; without messages, where only the sum of updates is asked for."""
        if not order.fold:
            return self._by_app(order, one, found)
        instruction, ledgers = self._read(order), [one.ledger]
        try:
            update = learn(
                self._client,
                one.name,
                instruction,
                one.ledger or Ledger(),
                on_spend=ledgers.append,
            )
        except (Exception, SystemExit) as error:  # the task's code: that client's failure
            return Answer(
                one, error=error_of(one.name, error, hide=False), ledger=ledgers[-1], fate=found
            )
        return self._folded(order, one, update, ledgers[-1], found)

    def _by_app(self, order: Order, one: Asked, found: Fate | None) -> Answer:
        """By the ClientApp that devices run, mods included."""
        context = Context(RUN_ID, one.node, {"client": one.name}, RecordDict(), {})
        if one.ledger is not None:
            write_ledger(context, one.ledger)
        message = Message(order.content, one.node, order.kind)
        try:
            reply = self._app(message, context)
        except Exception as error:  # as a node does: a mod that fails is a client that fails
            reason = f"client {one.name!r}: its app raised {type(error).__name__}: {error}"
            reply = Message(Error(REFUSED, reason), reply_to=message)
        kept = read_ledger(context)
        ledger = kept if kept.charges else None
        if reply.has_error():
            code = (reply.error.code, reply.error.reason or f"error {reply.error.code}")
            return Answer(one, error=code, ledger=ledger, fate=found)
        return Answer(one, content=reply.content, ledger=ledger, fate=found)

    def _together(
        self, order: Order, asked: Sequence[tuple[Asked, Fate | None]]
    ) -> Iterator[Answer]:
        """Side by side, each with the result that it would have had alone."""
        client = self._client
        instruction = self._read(order)
        ready: list[Ready] = []
        for one, found in asked:
            try:
                examples, _ = local_data(client, one.name)
                private, ledger = self._spend(one, examples, instruction)
            except (Exception, SystemExit) as error:  # the task's code: that client's failure
                if client.run.client_private:  # which does not show there
                    yield self._alone(order, one, found)
                    continue
                code = error_of(one.name, error, hide=False)
                yield Answer(one, error=code, ledger=one.ledger, fate=found)
                continue
            work = LocalWork(examples, self._stream("order", instruction, one), private)
            ready.append(Ready(one, found, work, ledger))
        if not ready:
            return
        work_of = [one.work for one in ready]
        trainer = self._trainer(instruction, work_of, chosen=order.chosen)
        try:
            if trainer is None:
                raise DataError("data: none of these clients can be trained side by side")
            with memory_errors(f"round {instruction.round}: {len(ready)} clients together"):
                groups = train_in_groups(
                    trainer, self._model(instruction), work_of, client, instruction.proximal_mu
                )
        except InsufficientMemory:
            raise
        except (Exception, SystemExit):  # some client's data or loss failed: alone, it says how
            yield from (self._alone(order, one.asked, one.fate) for one in ready)
            return
        for places, trained in groups:
            yield from self._answers(order, [ready[place] for place in places], trained, trainer)

    def _answers(
        self, order: Order, ready: Sequence[Ready], trained: Trained, trainer: Trainer
    ) -> Iterator[Answer]:
        """What clients answer that were trained together; folded, where that is asked for."""
        rows = trained.weights.cpu().numpy()
        finite = np.isfinite(rows).all(axis=1)
        errors = [self._diverged(*both) for both in zip(trained.losses, finite, strict=True)]
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
                code = error_of(one.asked.name, wrong, hide=False)
                yield Answer(one.asked, error=code, ledger=ledger, fate=one.fate)
                continue
            loss = trained.losses[place]
            metrics = {} if loss is None else {TRAIN_LOSS: loss}
            if ledger is not None:
                metrics[EPSILON] = ledger.epsilon(self._client.run.privacy)
            if order.fold:
                yield Answer(
                    one.asked,
                    num_examples=sizes[place],
                    metrics=metrics,
                    ledger=ledger,
                    fate=one.fate,
                )
            else:
                content = update_content(Update(rows[place], sizes[place], metrics))
                yield Answer(one.asked, content=content, ledger=ledger, fate=one.fate)

    def _bounded(
        self,
        order: Order,
        ready: Sequence[Ready],
        rows: NDArray[np.float32],
        errors: Sequence[Exception | None],
    ) -> Iterator[Answer]:
        """The same under client-level privacy, where each update is bounded first."""
        privacy, instruction = self._client.run.privacy, self._read(order)
        for one, row, error in zip(ready, rows, errors, strict=True):
            spent = {EPSILON: one.ledger.epsilon(privacy)} if one.ledger is not None else {}
            weights = row if error is None else instruction.weights
            update = bounded(privacy, instruction, weights, spent)
            if order.fold:
                yield self._folded(order, one.asked, update, one.ledger, one.fate)
            else:
                content = update_content(update)
                yield Answer(one.asked, content=content, ledger=one.ledger, fate=one.fate)

    def _folded(
        self, order: Order, one: Asked, update: Update, ledger: Ledger | None, found: Fate | None
    ) -> Answer:
        """An update that is added to the sum; an error where the sum could leave its range."""
        try:
            self._sum.add(update.weights, 1 if order.uniform else update.num_examples)
        except InvalidUpdate as error:
            return Answer(
                one, error=error_of(one.name, error, hide=False), ledger=ledger, fate=found
            )
        return Answer(
            one,
            num_examples=update.num_examples,
            metrics=update.metrics,
            ledger=ledger,
            fate=found,
        )

    def _trainer(
        self, instruction: Instruction, work: Sequence[LocalWork], *, chosen: bool
    ) -> Trainer | None:
        """What trains clients side by side, found with the first whose data the task takes.

        None where it takes none of theirs, or none can be trained so though others could.

        Raises:
            ConfigError: none can be trained so, and no other was before.
        """
        if self._found is not None:
            return self._found
        for sample in work:
            found = self._tried(instruction, sample)
            if isinstance(found, Trainer):
                self._found = found
                return found
            if found is not None and not chosen:
                raise ConfigError(
                    f"simulation.training = 'vectorised': {found}. Nothing was trained; use 'loop' "
                    "or 'auto'."
                )
        return None

    _found: Trainer | None = None

    def _tried(self, instruction: Instruction, sample: LocalWork) -> Trainer | str | None:
        """What trains clients like this one, or why nothing can; None where its data fail."""
        try:
            self._model(instruction)
            return find_trainer(self._client, self._client.resident, sample)
        except (ConfigError, InsufficientMemory, InvalidUpdate, TaskError):
            raise
        except (Exception, SystemExit):  # trained alone, this client says what is wrong
            return None

    @cached_property
    def _device(self) -> torch.device:
        return available(self._client.run.client.device)

    def _model(self, instruction: Instruction) -> FullModel:
        model = model_of(self._client, instruction)
        there = next(model.parameters()).device == self._device  # moving looks at every module
        return model if there else model.to(self._device)

    def _spend(
        self, one: Asked, examples: Examples, instruction: Instruction
    ) -> tuple[PrivateWork | None, Ledger | None]:
        if not self._client.run.private:
            return None, None
        planned, ledger = spend(
            self._client, one.name, examples, one.ledger or Ledger(), round=instruction.round
        )
        randomness: Randomness = self._client.randomness

        def noise(device: torch.device) -> torch.Generator:
            return randomness.generator(device, "noise", instruction.round, one.name)

        return PrivateWork(planned, noise), ledger

    def _stream(
        self, word: str, instruction: Instruction, one: Asked
    ) -> Callable[[], torch.Generator]:
        cpu, randomness = torch.device("cpu"), self._client.randomness
        return lambda: randomness.generator(cpu, word, instruction.round, one.name)

    def _diverged(self, loss: float | None, finite: bool) -> Exception | None:
        settings = self._client.run.client
        if loss is not None and not isfinite(loss):
            return diverged(loss, epoch=settings.epochs - 1, learning_rate=settings.learning_rate)
        if not finite:
            return TrainingDiverged(
                f"training: the trained weights are not finite at learning_rate "
                f"{settings.learning_rate}. No update was sent; lower the learning rate."
            )
        return None
