"""The quicker way of training is chosen by what it takes on the first clients."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
from flwr.app import RecordDict

from fedcore.errors import ConfigError
from fedcore.updates.messages import ARRAYS, Update, update_content, weights_record
from server.simulation.virtual.state import Choice, Method
from server.simulation.workers.autotune import choose, difference, trial_budget_s
from server.simulation.workers.messages import ClientOutcome, ClientRef, RoundTask

ASKED = [ClientRef(node, f"client-{node}", None) for node in range(20)]
ORDER = RoundTask("train", RecordDict())


class Rigged:
    """A worker whose clients take a given time each, and the clock that tells it."""

    def __init__(self, seconds: dict[Method, float], first: float = 0.0) -> None:
        self.now = 0.0
        self.seconds = seconds
        self.first = first
        self.seen: list[tuple[Method, int]] = []
        self.order = ORDER

    def start_task(self, order: RoundTask) -> None:
        self.order = order

    def prepare(self, order: RoundTask, asked: Sequence[ClientRef]) -> None:
        self.now += 1000.0  # of which nothing may be seen in what is measured

    def work(self, asked: Sequence[ClientRef]) -> list[object]:
        method = self.order.method
        if method not in self.seconds:
            raise ConfigError(
                "simulation.training = 'vectorised': the model holds BatchNorm. Nothing was "
                "trained; use 'loop'."
            )
        if method not in [seen for seen, _ in self.seen]:
            self.now += self.first
        self.seen.append((method, len(asked)))
        self.now += self.seconds[method] * len(asked)
        return []

    @property
    def clock(self) -> Callable[[], float]:
        return lambda: self.now


def chosen(worker: Rigged, loop_s: float, *, trainings: int = 10**5) -> Choice:
    budget_s = trial_budget_s(loop_s, trainings=trainings)
    return choose(
        worker,  # type: ignore[arg-type]
        ORDER,
        ASKED,
        loop_s=loop_s,
        budget_s=budget_s,
        clock=worker.clock,
    )


@pytest.mark.parametrize(
    ("loop_s", "vectorised_s", "method"),
    [(0.01, 0.001, "vectorised"), (0.01, 0.02, "loop"), (0.01, 0.0097, "loop")],
)
def test_the_quicker_is_chosen_and_a_tie_goes_to_what_devices_do(
    loop_s: float, vectorised_s: float, method: str
) -> None:
    choice = chosen(Rigged({"vectorised": vectorised_s}), loop_s)
    assert choice.method == method
    assert choice.loop_s == pytest.approx(loop_s)
    assert choice.vectorised_s == pytest.approx(vectorised_s)
    assert f"{loop_s * 1e3:.3g} ms" in choice.reason


def test_what_the_first_time_costs_does_not_count() -> None:
    choice = chosen(Rigged({"vectorised": 0.001}, first=3.0), 0.01)
    assert choice.method == "vectorised"
    assert choice.vectorised_s == pytest.approx(0.001)


def test_clients_that_take_long_are_looked_at_once() -> None:
    worker = Rigged({"vectorised": 30.0})
    assert chosen(worker, 60.0).method == "vectorised"
    assert worker.seen == [("vectorised", 2)]


@pytest.mark.parametrize("vectorised_s", [0.001, 0.05, 0.5, 2.0])
@pytest.mark.parametrize("trainings", [100, 1000, 10_000])
def test_a_trial_costs_at_most_a_tenth_of_what_it_can_save(
    vectorised_s: float, trainings: int
) -> None:
    worker, loop_s = Rigged({"vectorised": vectorised_s}), 0.05
    chosen(worker, loop_s, trainings=trainings)
    cost_s = worker.now - 1000.0 * bool(worker.seen)
    first_s = 2 * vectorised_s  # which nothing is known of before
    assert cost_s <= max(0.1 * loop_s * trainings, first_s)


def test_where_few_are_trained_nothing_is_tried() -> None:
    worker = Rigged({"vectorised": 0.001})
    choice = chosen(worker, 0.01, trainings=100)
    assert (choice.method, worker.seen) == ("loop", [])
    assert choice.reason == "a client takes 10 ms, and the run is too short to try another way"


def test_why_clients_cannot_go_side_by_side_is_said() -> None:
    choice = chosen(Rigged({}), 0.01)
    assert (choice.method, choice.vectorised_s) == ("loop", None)
    assert choice.reason == "the model holds BatchNorm"


class Comparing:
    """A worker whose clients differ from those trained alone by a share of their update."""

    def __init__(self, gaps: Sequence[float]) -> None:
        self.gaps = gaps

    def start_task(self, order: RoundTask) -> None:
        assert (order.method, order.fold) == ("vectorised", False)

    def work(self, asked: Sequence[ClientRef]) -> list[ClientOutcome]:
        return [answer(one, 1.0 + gap) for one, gap in zip(asked, self.gaps, strict=True)]


def answer(asked: ClientRef, moved: float) -> ClientOutcome:
    weights = np.full(4, 10.0 + moved, np.float32)
    return ClientOutcome(asked, content=update_content(Update(weights, 3, {})))


@pytest.mark.parametrize(
    ("gaps", "who"),
    [
        ((0.0, 2e-5, 0.0, 0.0), None),
        ((0.0, 4e-3, 0.0, 0.0), None),  # rounding decided what pooling keeps
        ((0.0, 4e-3, 0.0, 3e-3), "client 'c3'"),
        ((0.0, 0.0, 4e-2, 0.0), "client 'c2'"),
        ((4e-3,), "client 'c0'"),
    ],
)
def test_one_of_several_may_meet_a_tie(gaps: Sequence[float], who: str | None) -> None:
    content = RecordDict({ARRAYS: weights_record(np.full(4, 10.0, np.float32))})
    asked = [ClientRef(place, f"c{place}", None) for place in range(len(gaps))]
    alone = [answer(one, 1.0) for one in asked]
    order = RoundTask("train", content)
    found = difference(Comparing(gaps), order, alone)  # type: ignore[arg-type]
    assert (found is None) if who is None else (found or "").startswith(who)
