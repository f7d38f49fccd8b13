"""A crew of workers: in this process, in processes of its own, or in Ray's actors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from server.rounds.aggregation.exact_mean import ExactMean
from server.simulation.workers.messages import ClientOutcome, ClientRef, RoundTask
from server.simulation.workers.worker import Worker

MakeWorker = Callable[[], Worker]


class Executor(Protocol):
    """Carries orders out."""

    @property
    def size(self) -> int:
        """Workers that compute at the same time."""

    def carry_out(
        self, order: RoundTask, asked: Sequence[ClientRef]
    ) -> tuple[list[ClientOutcome], ExactMean]:
        """Answers in the order of ``asked``, and the sum of what was folded.

        Neither depends on how many workers there are, nor on which of them did what.
        """

    def close(self) -> None:
        """Ends the workers."""


class LocalExecutor:
    """One worker, in this process."""

    size = 1

    def __init__(self, worker: Worker) -> None:
        self.worker = worker

    def carry_out(
        self, order: RoundTask, asked: Sequence[ClientRef]
    ) -> tuple[list[ClientOutcome], ExactMean]:
        """All of it, here and now."""
        self.worker.begin(order)
        return self.worker.work(asked), self.worker.hand_in()

    def close(self) -> None:
        """Nothing is to be ended."""


def pieces(
    order: RoundTask, asked: Sequence[ClientRef], workers: int
) -> Iterator[Sequence[ClientRef]]:
    """The clients of an order in pieces: where they go one by one, ever smaller ones.

    So workers end within about one client of each other, and few messages go to and fro.

    Source:
        Polychronopoulos and Kuck 1987, doi:10.1109/TC.1987.5009495 (guided self-scheduling).
    """
    start = 0
    while start < len(asked):
        left = len(asked) - start
        whole = order.method == "vectorised"
        size = -(-len(asked) // workers) if whole else -(-left // (2 * workers))
        yield asked[start : start + size]
        start += size


def gathered(
    answers: Sequence[ClientOutcome], sums: Sequence[ExactMean], asked: Sequence[ClientRef]
) -> tuple[list[ClientOutcome], ExactMean]:
    """What workers did apart, as if one had done it."""
    total = sums[0]
    for one in sums[1:]:
        total.merge(one)
    places = {one.node: place for place, one in enumerate(asked)}
    return sorted(answers, key=lambda answer: places[answer.asked.node]), total
