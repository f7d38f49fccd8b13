"""Adapter from a user's `Algorithm` to Flower's ``Strategy``, and its dry run before the start."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from fedcore.config.client_settings import ClientSettings
from fedcore.errors import ConfigError, RoundFailed
from fedcore.seeds import numpy_rng
from fedcore.task.algorithm import ClientUpdate
from fedcore.updates.messages import (
    ARRAYS,
    CONFIG,
    EPSILON,
    METRICS,
    MODEL,
    NUM_EXAMPLES,
    array_of,
    weights_record,
)
from fedcore.updates.pack import Vector
from server.rounds.strategies.checked import AlgorithmRefused, CheckedAlgorithm, State

_DRY_RUN_ROUNDS = 3  # rounds: errors in handling returned state show in the second
_SYNTHETIC_CLIENTS = 2  # clients with synthetic updates


class AlgorithmStrategy(Strategy):
    """Runs an `Algorithm` as a strategy, and keeps the algorithm's state between rounds."""

    REMEMBERS = ("state",)
    """Names of the attributes that a checkpoint stores."""

    def __init__(
        self, checked: CheckedAlgorithm, label: str, *, name_of: Callable[[int], str]
    ) -> None:
        """Creates the strategy in its state before the first round.

        Args:
            checked: The algorithm.
            label: The algorithm's name in errors: the value of ``federation.strategy``.
            name_of: Maps a node to its client's name.
        """
        self.checked = checked
        self._label = label
        self._name_of = name_of
        self._sent: Vector | None = None
        self.state: State | None = None

    def content_of_round(
        self, number: int, arrays: ArrayRecord, config: ConfigRecord, nodes: Sequence[int]
    ) -> tuple[RecordDict, Mapping[int, ConfigRecord]]:
        """Returns the content of a round's messages, and configurations of nodes with their own.

        Raises:
            RoundFailed: the algorithm failed, or returned settings that are not allowed.
        """
        self._sent = array_of(arrays[MODEL], where="global model")
        names = {self._name_of(node): node for node in nodes}
        try:
            if self.state is None:
                self.state = self.checked.initial(self._sent)
            chosen = self.checked.configure(number, tuple(names), self.state)
        except AlgorithmRefused as error:
            raise self._failed(number, error) from error.__cause__
        base = {**config, "server-round": number}
        made: dict[ClientSettings, ConfigRecord] = {}
        for settings in chosen.own.values():
            if settings not in made:
                made[settings] = ConfigRecord({**base, **settings.sent()})
        content = RecordDict(
            {ARRAYS: arrays, CONFIG: ConfigRecord({**base, **chosen.common.sent()})}
        )
        return content, {names[name]: made[one] for name, one in chosen.own.items()}

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Returns one message per node; nodes with the same settings share one content."""
        nodes = list(grid.get_node_ids())
        content, configs = self.content_of_round(server_round, arrays, config, nodes)
        contents = {id(one): RecordDict({**content, CONFIG: one}) for one in configs.values()}
        return [
            Message(
                contents[id(configs[node])] if node in configs else content,
                node,
                MessageType.TRAIN,
            )
            for node in nodes
        ]

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Returns the next weights; where the algorithm folds, the only reply contains the mean.

        Raises:
            RoundFailed: the algorithm failed, or returned invalid weights or state.
        """
        assert self._sent is not None  # `content_of_round` comes first
        assert self.state is not None
        updates = [self._update(reply) for reply in replies]
        if not updates:
            return None, None
        checked, sent = self.checked, self._sent
        try:
            if checked.algorithm.folds:
                mean = updates[0].weights
                made, self.state = checked.step(server_round, sent, mean, self.state)
            else:
                made, self.state = checked.aggregate(server_round, sent, updates, self.state)
        except AlgorithmRefused as error:
            raise self._failed(server_round, error) from error.__cause__
        return weights_record(made), None

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Returns no messages: the round loop evaluates models."""
        return []

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Returns None: the round loop evaluates models."""
        return None

    def summary(self) -> None:
        """Prints nothing: the run has its own report."""

    def _update(self, reply: Message) -> ClientUpdate:
        weights = array_of(reply.content.array_records[ARRAYS][MODEL], where="update")
        weights = weights.view()
        weights.flags.writeable = False
        metrics = reply.content.metric_records[METRICS]
        return ClientUpdate(
            self._name_of(reply.metadata.src_node_id),
            weights,
            int(str(metrics[NUM_EXAMPLES])),
            {
                name: float(value)
                for name, value in metrics.items()
                if name not in (NUM_EXAMPLES, EPSILON) and isinstance(value, int | float)
            },
        )

    def _failed(self, number: int, error: AlgorithmRefused) -> RoundFailed:
        return RoundFailed(
            f"round {number}: federation.strategy = {self._label!r}: {error}. The global model "
            f"is that of round {number - 1}; correct the strategy and start over with --fresh (in "
            "Python fresh=True): a resumed run needs the strategy that it started with."
        )


def dry_run(checked: CheckedAlgorithm, label: str, weights: Vector, clients: Sequence[str]) -> None:
    """Runs an algorithm on synthetic updates, to find its mistakes before a run starts.

    Args:
        checked: The algorithm.
        label: The algorithm's name in errors: the value of ``federation.strategy``.
        weights: Of a new model.
        clients: Names of clients that a round may ask. Empty where they are not known yet;
            ``configure`` is then not called.

    Raises:
        ConfigError: the algorithm fails, or returns something that is not allowed. Nothing was run.
    """
    rounds = checked.run.federation.rounds
    known = clients or checked.run.client_private  # then it never sees clients' names
    try:
        state = checked.initial(weights)
        for number in range(1, min(rounds, _DRY_RUN_ROUNDS) + 1):
            if known:
                checked.configure(number, clients, state)
            updates = [
                _synthetic_update(checked, weights, number, place)
                for place in range(_SYNTHETIC_CLIENTS)
            ]
            if checked.algorithm.folds:
                _, state = checked.step(number, weights, updates[0].weights, state)
            else:
                _, state = checked.aggregate(number, weights, updates, state)
        if known:
            _check_last(checked, rounds, clients, state)
    except AlgorithmRefused as error:
        raise ConfigError(
            f"federation.strategy = {label!r}: {error}. This was found with synthetic updates, "
            "before the first round. Nothing was run; correct the strategy."
        ) from error.__cause__


def _check_last(
    checked: CheckedAlgorithm, rounds: int, clients: Sequence[str], state: State
) -> None:
    """Checks the settings of the last round, where a schedule most likely exceeds its bounds."""
    try:
        checked.configure(rounds, clients, state)
    except AlgorithmRefused as error:
        if error.__cause__ is None:  # the algorithm may raise: this is not the last round's state
            raise AlgorithmRefused(f"in the last round, {rounds}, {error}") from None


def _synthetic_update(
    checked: CheckedAlgorithm, weights: Vector, number: int, place: int
) -> ClientUpdate:
    moved = numpy_rng(0, "rehearsal", number, place).normal(0.0, 1e-3, len(weights))
    metrics = {} if checked.run.privacy.unit != "none" else {"train_loss": 0.5}
    made = (weights + moved).astype(np.float32)
    return ClientUpdate(f"synthetic-{place}", made, 1 + place, metrics)
