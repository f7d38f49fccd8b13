"""Grid of a simulation: virtual nodes whose messages are answered by workers."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from flwr.app import ConfigRecord, Error, Message, MessageType, RecordDict

from fedcore.flower.grid import LazyGrid
from fedcore.training.client import skipped_text
from fedcore.updates.messages import CONFIG
from server.rounds.aggregation.exact_mean import ExactMean
from server.rounds.aggregation.mean import StreamedMean
from server.rounds.inbound import Folded
from server.simulation.virtual.devices import Fate, first_of, resolve_round
from server.simulation.virtual.nodes import FIRST_NODE_ID, RUN_ID
from server.simulation.virtual.state import SimulationState
from server.simulation.workers.messages import ClientOutcome, ClientRef, RoundTask
from server.simulation.workers.scheduler import WorkerScheduler

log = logging.getLogger("fedcore.server")


class SimulatedGrid(LazyGrid):
    """Grid with one virtual node per client; nodes are in the order of ``clients``."""

    def __init__(
        self,
        clients: Sequence[str],
        scheduler: WorkerScheduler,
        state: SimulationState,
        *,
        first: int | None = None,
    ) -> None:
        """Creates the grid of one run.

        Args:
            clients: Clients' names.
            scheduler: Provides the workers.
            state: State of the clients between rounds; updated in place.
            first: Number of updates that ends a round on the virtual clock, if more are asked; None
                to wait for all.
        """
        super().__init__(RUN_ID)
        self._first = first
        self._clients = clients
        self._scheduler = scheduler
        self._told: set[str] = set()
        self._state = state

    def get_node_ids(self) -> Sequence[int]:
        """Returns all nodes as a range, which takes no memory for a million of them."""
        return range(FIRST_NODE_ID, FIRST_NODE_ID + len(self._clients))

    def fold(
        self,
        content: RecordDict,
        nodes: Sequence[int],
        *,
        configs: Mapping[int, ConfigRecord],
        uniform: bool,
        deadline_s: float,
    ) -> Folded:
        """Trains ``nodes``; the workers add their updates up."""
        order = RoundTask(MessageType.TRAIN, content, configs, fold=True, uniform=uniform)
        answers, total = self._carry_out(order, nodes, deadline_s)
        taken = [(one.num_examples, one.metrics) for one in answers if one.num_examples]
        return Folded(
            StreamedMean(total), taken, [one.error for one in answers if one.error is not None]
        )

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterator[Message]:
        """Yields replies, one group of messages after the other; ``timeout`` is in virtual time.

        Messages that share all records except the configuration form a group. There is no reply
        from a client that is lost or late.
        """
        deadline_s = float("inf") if timeout is None else timeout
        groups: dict[tuple[object, ...], list[Message]] = {}
        for message in messages:  # a cohort shares all records except the configuration
            key = (message.metadata.message_type, *_same_but_for_config(message.content))
            groups.setdefault(key, []).append(message)
        for group in groups.values():
            asked = {message.metadata.dst_node_id: message for message in group}
            content, kind = group[0].content, group[0].metadata.message_type
            configs = {
                node: config
                for node, message in asked.items()
                if (config := message.content.config_records.get(CONFIG)) is not None
                and config is not content.config_records.get(CONFIG)
            }
            answers, _ = self._carry_out(RoundTask(kind, content, configs), list(asked), deadline_s)
            for answer in answers:
                message = asked[answer.client.node]
                if answer.content is not None:
                    yield Message(answer.content, reply_to=message)
                elif answer.error is not None:
                    yield Message(Error(*answer.error), reply_to=message)

    def _carry_out(
        self, order: RoundTask, nodes: Sequence[int], deadline_s: float
    ) -> tuple[list[ClientOutcome], ExactMean]:
        asked = [self._asked(node) for node in nodes]
        training = order.kind == MessageType.TRAIN
        if training:
            order = replace(order, clock_s=self._state.clock_s, deadline_s=deadline_s)
            self._state.rounds.update(one.name for one in asked)
        executor, order = self._scheduler.executor_for(order, asked)
        began_s = time.perf_counter()
        answers, total = executor.run_task(order, asked)
        self._scheduler.took(order, len(asked), time.perf_counter() - began_s)
        for answer in answers:
            self._tell(answer)
            if answer.ledger is not None:
                self._state.ledgers[answer.client.name] = answer.ledger
            if answer.local:
                self._state.locals[answer.client.name] = answer.local
        if training:
            answers = self._advance(answers, deadline_s)
        return answers, total

    def _tell(self, answer: ClientOutcome) -> None:
        """Logs, once per client, that examples counted as zero: they will in each round."""
        name = answer.client.name
        if not answer.skipped or name in self._told:
            return
        self._told.add(name)
        log.warning("%s; logged once per client", skipped_text(name, answer.skipped))

    def _asked(self, node: int) -> ClientRef:
        name = self._clients[node - FIRST_NODE_ID]
        return ClientRef(
            node, name, self._state.ledgers.get(name), self._state.locals.get(name, b"")
        )

    def _advance(self, answers: Sequence[ClientOutcome], deadline_s: float) -> list[ClientOutcome]:
        """Advances the virtual clock; drops the content of updates that arrive after the end."""
        fates = [answer.fate for answer in answers if answer.fate is not None]
        if not fates:
            return list(answers)
        enough: list[Fate] = []
        if self._first is not None and self._first < len(answers):
            updates = [one.fate for one in answers if one.fate is not None and not one.error]
            enough = first_of(updates, self._first, deadline_s=deadline_s)
            if len(enough) < self._first:
                enough = []  # too few in time: the round waits for all
        self._state.last = resolve_round(fates, deadline_s=deadline_s, enough=enough).record
        self._state.clock_s += self._state.last.simulated_s
        if not enough:
            return list(answers)
        names = {one.client for one in enough}
        return [
            one if one.error or one.client.name in names else replace(one, content=None)
            for one in answers
        ]


def _same_but_for_config(content: RecordDict) -> tuple[object, ...]:
    """Returns a key that is equal for contents which differ only in their configuration."""
    return tuple((name, id(record)) for name, record in content.items() if name != CONFIG)
