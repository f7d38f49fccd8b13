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

_FEW, _TOGETHER_CLIENTS = 2, 10  # clients of the first trial in batches, and of those that follow
_MORE_TRIALS = 2  # the first after another size includes setup costs
_COMPARED = 4  # clients trained with both methods, to compare the results
_LONG_S = 1.0  # two clients that take longer than this are enough
_ENOUGH_S = 10.0  # a single client that takes longer than this is enough
_TRIAL_SHARE = 0.1  # of the time that all clients take in the loop, which a trial may cost
_SETUP_S = 0.3  # a trial of batches costs at least this
_GAP, _ROUNDING = 1e-4, 1e-6  # relative to update and weights; far above rounding errors
_TIE = 1e-2  # relative to the update; rounding can change which value max pooling keeps
_MARGIN = 1.05  # a smaller speed-up does not justify last bits that differ from a device's

Clock = Callable[[], float]


def forced(method: Method) -> Choice:
    """Returns the choice that the configuration specifies."""
    return Choice(method, None, None, "as configured")


def attempts(
    worker: Worker, order: RoundTask, clients: Sequence[ClientRef], *, clock: Clock
) -> tuple[list[ClientOutcome], float]:
    """Trains clients one after the other, until enough of them have trained for a comparison.

    Returns their outcomes, without effect on sums and ledgers, and the mean seconds of those that
    trained, without the first, which pays for setup, where there are more.

    Args:
        worker: An idle worker.
        order: Task of the first round.
        clients: Clients of that round whose updates arrive in time.
        clock: Returns seconds.
    """
    worker.start_task(replace(order, method="loop", fold=False))
    found: list[ClientOutcome] = []
    taken_s: list[float] = []
    for one in clients:
        started = clock()
        found += worker.work([one])
        if found[-1].content is None:
            continue
        taken_s.append(clock() - started)
        trained, last_s = len(taken_s), taken_s[-1]
        if trained == _COMPARED or last_s > (_LONG_S if trained > 1 else _ENOUGH_S):
            break
    rest = taken_s[1:] or taken_s
    return found, sum(rest) / len(rest) if rest else 0.0


def trial_budget_s(loop_s: float, *, trainings: int) -> float:
    """Returns the seconds that a trial of batches may take: a tenth of what it can save at most.

    Args:
        loop_s: Seconds per client in the loop.
        trainings: How often clients are trained in the run.
    """
    return _TRIAL_SHARE * loop_s * trainings


def choose(
    worker: Worker,
    order: RoundTask,
    clients: Sequence[ClientRef],
    *,
    loop_s: float,
    budget_s: float,
    clock: Clock,
) -> Choice:
    """Measures training in batches on the first clients; returns the faster method.

    Discards all results; ledgers are unchanged. Where the times are about equal, it chooses one
    client after the other, as devices train. No trial begins that would exceed the budget, as far
    as earlier ones tell.

    Args:
        worker: An idle worker.
        order: Task of the first round.
        clients: Clients of that round, at least one; the first ones are trained.
        loop_s: Measured seconds per client, one after the other.
        budget_s: Seconds that the trials may take.
        clock: Returns seconds.
    """
    if budget_s < _SETUP_S:
        taken = f"a client takes {loop_s * 1e3:.3g} ms"
        return Choice("loop", loop_s, None, f"{taken}, and the run is too short to try another way")
    worker.prepare(order, clients[:_TOGETHER_CLIENTS])
    try:
        vectorised_s = _vectorised_s(worker, order, clients, budget_s=budget_s, clock=clock)
    except ConfigError as error:
        reason = str(error).removeprefix("simulation.training = 'vectorised': ").split(". ")[0]
        return Choice("loop", loop_s, None, reason)
    method: Method = "vectorised" if vectorised_s * _MARGIN < loop_s else "loop"
    measured = (
        f"a client takes {loop_s * 1e3:.3g} ms in the loop and {vectorised_s * 1e3:.3g} ms "
        "vectorised"
    )
    return Choice(method, loop_s, vectorised_s, measured)


def _vectorised_s(
    worker: Worker,
    order: RoundTask,
    clients: Sequence[ClientRef],
    *,
    budget_s: float,
    clock: Clock,
) -> float:
    """Returns the seconds per client in batches, by the last trial that the budget allowed."""

    def seconds(clients: Sequence[ClientRef]) -> float:
        worker.start_task(replace(order, method="vectorised"))
        started = clock()
        worker.work(clients)
        return clock() - started

    few, many = clients[:_FEW], clients[:_TOGETHER_CLIENTS]
    spent_s = seconds(few)
    each_s = spent_s / len(few)
    for _ in range(_MORE_TRIALS):
        left_s = budget_s - spent_s
        sizes = [some for some in (many, few) if each_s * len(some) <= left_s]
        if not sizes or each_s > _ENOUGH_S:
            break
        taken_s = seconds(sizes[0])
        spent_s, each_s = spent_s + taken_s, taken_s / len(sizes[0])
    return each_s


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
