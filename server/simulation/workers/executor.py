"""`Executor`: runs a round's task on one or more workers; how clients are split among workers.

`LocalExecutor` uses this process. `process_pool` and `ray_executor` contain the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from server.rounds.aggregation.exact_mean import ExactMean
from server.simulation.workers.messages import ClientOutcome, ClientRef, RoundTask
from server.simulation.workers.worker import Worker

MakeWorker = Callable[[], Worker]


class Executor(Protocol):
    """Interface of a group of workers that run a round's tasks."""

    @property
    def size(self) -> int:
        """Number of workers that compute at the same time."""

    def run_task(
        self, order: RoundTask, clients: Sequence[ClientRef]
    ) -> tuple[list[ClientOutcome], ExactMean]:
        """Runs a task for each of ``clients``.

        Returns:
            Outcomes in the order of ``clients``, and the sum of folded updates. Neither depends on
            the number of workers or on how clients are split among them.
        """

    def close(self) -> None:
        """Stops the workers."""


class LocalExecutor:
    """Executor with one worker, in this process."""

    size = 1

    def __init__(self, worker: Worker) -> None:
        self.worker = worker

    def run_task(
        self, order: RoundTask, clients: Sequence[ClientRef]
    ) -> tuple[list[ClientOutcome], ExactMean]:
        """Runs the task in this process; returns the outcomes and the sum of folded updates."""
        self.worker.start_task(order)
        return self.worker.work(clients), self.worker.partial_sum()

    def close(self) -> None:
        """Does nothing: there are no processes to stop."""


def pieces(
    order: RoundTask, clients: Sequence[ClientRef], workers: int
) -> Iterator[Sequence[ClientRef]]:
    """Yields a task's clients in chunks; for clients trained one by one, chunks get smaller.

    So workers finish within about one client of each other, with few messages.

    Source:
        Polychronopoulos and Kuck 1987, doi:10.1109/TC.1987.5009495 (guided self-scheduling).
    """
    start = 0
    while start < len(clients):
        left = len(clients) - start
        whole = order.method == "vectorised"
        size = -(-len(clients) // workers) if whole else -(-left // (2 * workers))
        yield clients[start : start + size]
        start += size


def gathered(
    answers: Sequence[ClientOutcome], sums: Sequence[ExactMean], clients: Sequence[ClientRef]
) -> tuple[list[ClientOutcome], ExactMean]:
    """Merges the workers' outcomes and sums; the result is that of a single worker."""
    total = sums[0]
    for one in sums[1:]:
        total.merge(one)
    places = {one.node: place for place, one in enumerate(clients)}
    return sorted(answers, key=lambda answer: places[answer.client.node]), total
