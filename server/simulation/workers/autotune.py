"""Which way of training is quicker for this task on this machine: measured on its first clients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from flwr.app import RecordDict

from fedcore.errors import ConfigError
from fedcore.updates.messages import ARRAYS, MODEL, array_of
from fedcore.updates.pack import Vector
from server.simulation.virtual.state import Choice, Method
from server.simulation.workers.messages import ClientOutcome, ClientRef, RoundTask
from server.simulation.workers.worker import Worker

_LOOP_CLIENTS, _TOGETHER_CLIENTS = 2, 10
_COMPARED = 4  # clients that are trained both ways, to see that they learn the same
_LONG_S = 1.0  # one is enough then
_ENOUGH_S = 10.0  # what takes so long needs no second look; less may be the cost of a first time
_GAP, _ROUNDING = 1e-4, 1e-6  # of an update, and of the weights: both far above what rounding gives
_TIE = 1e-2  # of an update, where rounding decides which of two nearly equal numbers pooling keeps
_MARGIN = 1.05  # a gain below it is not worth other last bits than a device's

Clock = Callable[[], float]


def forced(method: Method) -> Choice:
    """What the configuration names."""
    return Choice(method, None, None, "as the configuration says")


def attempts(
    worker: Worker, order: RoundTask, asked: Sequence[ClientRef], *, clock: Clock
) -> list[ClientOutcome]:
    """What clients answer one after the other, until enough have trained to judge by.

    Results are dropped, and ledgers stay as they are.

    Args:
        worker: Idle; it is left so.
        order: Of the first round.
        asked: Clients of that round that are there.
        clock: Gives seconds.
    """
    worker.begin(replace(order, method="loop", fold=False))
    found: list[ClientOutcome] = []
    trained = 0
    for one in asked:
        started = clock()
        found += worker.work([one])
        trained += found[-1].content is not None
        if trained == _COMPARED or (trained and clock() - started > _LONG_S):
            break
    return found


def choose(worker: Worker, order: RoundTask, asked: Sequence[ClientRef], *, clock: Clock) -> Choice:
    """Trains the first clients both ways and drops the results; ledgers stay as they are.

    Where both take about the same, clients go one after the other, as devices do.

    Args:
        worker: Idle; it is left so.
        order: Of the first round.
        asked: Clients of that round, at least one; the first of them train.
        clock: Gives seconds.
    """

    def seconds(method: Method, clients: Sequence[ClientRef]) -> float:
        worker.begin(replace(order, method=method))
        started = clock()
        worker.work(clients)
        return (clock() - started) / len(clients)

    worker.prepare(order, asked[:_TOGETHER_CLIENTS])
    loop_s = seconds("loop", asked[:1])
    if loop_s < _ENOUGH_S:  # the first time, much is set up
        loop_s = seconds("loop", asked[:_LOOP_CLIENTS])
    try:
        vectorised_s = seconds("vectorised", asked[:_TOGETHER_CLIENTS])
        if vectorised_s < _ENOUGH_S:
            vectorised_s = seconds("vectorised", asked[:_TOGETHER_CLIENTS])
    except ConfigError as error:
        reason = str(error).removeprefix("simulation.training = 'vectorised': ").split(". ")[0]
        return Choice("loop", loop_s, None, reason)
    method: Method = "vectorised" if vectorised_s * _MARGIN < loop_s else "loop"
    measured = (
        f"a client takes {loop_s * 1e3:.3g} ms one after the other and {vectorised_s * 1e3:.3g} ms "
        "side by side"
    )
    return Choice(method, loop_s, vectorised_s, measured)


def difference(worker: Worker, order: RoundTask, alone: Sequence[ClientOutcome]) -> str | None:
    """Why clients may not go side by side, where these learn something else then; None if not.

    What a model or a loss does with a batch can hide from every look at it but this one. Results
    are dropped, and ledgers stay as they are.

    Args:
        worker: Idle; it is left so.
        order: Of the first round.
        alone: What clients answered to it one after the other, from `attempts`.
    """
    worker.begin(replace(order, method="vectorised", fold=False))
    together = worker.work([one.asked for one in alone])
    start = _weights(order.content)
    found = ""
    for by_itself, beside in zip(alone, together, strict=True):
        name = by_itself.asked.name
        if by_itself.content is None or beside.content is None:
            if (by_itself.content is None) != (beside.content is None):
                return f"client {name!r} fails in one way of training alone"
            continue
        one, other = _weights(by_itself.content), _weights(beside.content)
        gap, moved = np.linalg.norm(one - other), np.linalg.norm(one - start)
        if gap <= _GAP * moved + _ROUNDING * np.linalg.norm(start):
            continue
        seldom = not found and len(alone) > 1 and gap <= _TIE * moved  # one client meets a tie
        found = (
            f"client {name!r} learns something else side by side: its update "
            f"differs by {gap / moved if moved else np.inf:.2g} of its length"
        )
        if not seldom:
            return found
    return None


def _weights(content: RecordDict) -> Vector:
    return array_of(content[ARRAYS][MODEL], where="comparison")  # type: ignore[arg-type]
