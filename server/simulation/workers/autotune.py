"""Choice of the faster training method on this machine, measured on the run's first clients.

`choose` compares the speed of both methods; `difference` checks that their results agree.
"""

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
_COMPARED = 4  # clients trained with both methods, to compare the results
_LONG_S = 1.0  # a single client that takes longer than this is enough
_ENOUGH_S = 10.0  # shorter times are measured again, without setup costs
_GAP, _ROUNDING = 1e-4, 1e-6  # relative to update and weights; far above rounding errors
_TIE = 1e-2  # relative to the update; rounding can change which value max pooling keeps
_MARGIN = 1.05  # a smaller speed-up does not justify last bits that differ from a device's

Clock = Callable[[], float]


def forced(method: Method) -> Choice:
    """Returns the choice that the configuration specifies."""
    return Choice(method, None, None, "as configured")


def attempts(
    worker: Worker, order: RoundTask, clients: Sequence[ClientRef], *, clock: Clock
) -> list[ClientOutcome]:
    """Trains clients one after the other, until enough of them have trained for a comparison.

    Returns their outcomes, without effect on sums and ledgers.

    Args:
        worker: An idle worker.
        order: Task of the first round.
        clients: Clients of that round whose updates arrive in time.
        clock: Returns seconds.
    """
    worker.start_task(replace(order, method="loop", fold=False))
    found: list[ClientOutcome] = []
    trained = 0
    for one in clients:
        started = clock()
        found += worker.work([one])
        trained += found[-1].content is not None
        if trained == _COMPARED or (trained and clock() - started > _LONG_S):
            break
    return found


def choose(
    worker: Worker, order: RoundTask, clients: Sequence[ClientRef], *, clock: Clock
) -> Choice:
    """Measures both methods on the first clients; returns the faster one.

    Discards all results; ledgers are unchanged. Where the times are about equal, it chooses one
    client after the other, as devices train.

    Args:
        worker: An idle worker.
        order: Task of the first round.
        clients: Clients of that round, at least one; the first ones are trained.
        clock: Returns seconds.
    """

    def seconds(method: Method, clients: Sequence[ClientRef]) -> float:
        worker.start_task(replace(order, method=method))
        started = clock()
        worker.work(clients)
        return (clock() - started) / len(clients)

    worker.prepare(order, clients[:_TOGETHER_CLIENTS])
    loop_s = seconds("loop", clients[:1])
    if loop_s < _ENOUGH_S:  # the first measurement includes setup
        loop_s = seconds("loop", clients[:_LOOP_CLIENTS])
    try:
        vectorised_s = seconds("vectorised", clients[:_TOGETHER_CLIENTS])
        if vectorised_s < _ENOUGH_S:
            vectorised_s = seconds("vectorised", clients[:_TOGETHER_CLIENTS])
    except ConfigError as error:
        reason = str(error).removeprefix("simulation.training = 'vectorised': ").split(". ")[0]
        return Choice("loop", loop_s, None, reason)
    method: Method = "vectorised" if vectorised_s * _MARGIN < loop_s else "loop"
    measured = (
        f"a client takes {loop_s * 1e3:.3g} ms in the loop and {vectorised_s * 1e3:.3g} ms "
        "vectorised"
    )
    return Choice(method, loop_s, vectorised_s, measured)


def difference(worker: Worker, order: RoundTask, alone: Sequence[ClientOutcome]) -> str | None:
    """Returns why clients cannot be trained in batches; None if the results of both methods agree.

    Only this comparison finds every effect of a batch on a model or a loss. Discards all results;
    ledgers are unchanged.

    Args:
        worker: An idle worker.
        order: Task of the first round.
        alone: Outcomes of the same clients, trained one after the other, from `attempts`.
    """
    worker.start_task(replace(order, method="vectorised", fold=False))
    together = worker.work([one.client for one in alone])
    start = _weights(order.content)
    found = ""
    for by_itself, beside in zip(alone, together, strict=True):
        name = by_itself.client.name
        if by_itself.content is None or beside.content is None:
            if (by_itself.content is None) != (beside.content is None):
                return f"client {name!r} fails with only one of the two training methods"
            continue
        one, other = _weights(by_itself.content), _weights(beside.content)
        gap, moved = np.linalg.norm(one - other), np.linalg.norm(one - start)
        if gap <= _GAP * moved + _ROUNDING * np.linalg.norm(start):
            continue
        seldom = not found and len(alone) > 1 and gap <= _TIE * moved  # one tie is normal
        found = (
            f"client {name!r} gets a different update from vectorised training: it differs by "
            f"{gap / moved if moved else np.inf:.2g} of its length"
        )
        if not seldom:
            return found
    return None


def _weights(content: RecordDict) -> Vector:
    return array_of(content[ARRAYS][MODEL], where="comparison")  # type: ignore[arg-type]
