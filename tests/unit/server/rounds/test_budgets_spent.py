"""A quorum that is gone because budgets are spent ends a run; what it has learnt stands."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import pytest
from flwr.app import Error, Message, RecordDict
from torch import nn

from fedcore.config.run import RunConfig
from fedcore.errors import RoundFailed
from fedcore.flower.grid import InProcessGrid
from fedcore.flower.identity import assume_identity
from fedcore.seeds import Simulated
from fedcore.task.measured import Measured
from fedcore.task.metrics import ACCURACY
from fedcore.task.model import FullModel
from fedcore.updates.messages import (
    ARRAYS,
    CONFIG,
    DECLINED,
    MODEL,
    REFUSED,
    Update,
    update_content,
)
from fedcore.updates.pack import Vector, unpack
from server.rounds.federation import Federation
from server.rounds.inbound import Tally
from server.rounds.loop import Federated, run_rounds
from server.rounds.quorum import check_quorum
from server.rounds.strategies.flower import make_strategy

NODES = range(10, 15)
Answer = Callable[[int, int, Vector], RecordDict | Error]


def adds(node: int, number: int, weights: Vector) -> RecordDict:
    return update_content(Update(weights + np.float32(1), 10, {}))


def spent(node: int, number: int, weights: Vector) -> Error:
    return Error(DECLINED, f"client 'n{node}' has spent epsilon 7.9 of 8.")


def broken(node: int, number: int, weights: Vector) -> Error:
    return Error(REFUSED, "it broke")


def silent(node: int, number: int, weights: Vector) -> Error:
    time.sleep(0.4)
    return broken(node, number, weights)


def run(
    late: dict[int, Answer],
    *,
    after: int = 3,
    strategy: str = "FedAvg",
    deadline_s: float = 30.0,
    unit: str = "example",
) -> tuple[Federated, list[str]]:
    """Ten rounds, in which some nodes answer otherwise from some round on; the second is best."""
    assume_identity(1)
    notes: list[str] = []
    scores = iter([0.5, 0.8, *[0.7] * 8])

    def handle(message: Message) -> Message:
        node = message.metadata.dst_node_id
        number = int(str(message.content.config_records[CONFIG]["server-round"]))
        weights = message.content.array_records[ARRAYS][MODEL].numpy()
        answer = late.get(node, adds) if number > after else adds
        return Message(answer(node, number, weights), reply_to=message)

    federation = Federation(
        run=RunConfig.model_validate(
            {
                "name": "run",
                "task": "task.py",
                "federation": {"rounds": 10, "deadline_s": deadline_s},
                "privacy": {"unit": unit},
            }
        ),
        grid=InProcessGrid(1, NODES, handle),
        chosen=make_strategy(strategy, {}, cohort=5, size=3),
        cohort=5,
        metrics=(ACCURACY,),
        randomness=Simulated(0),
        evaluate_on_cloud=lambda model: Measured(1, values={"accuracy": next(scores)}),
        on_round=lambda record: None,
        on_note=notes.append,
    )
    model = nn.Linear(2, 1)
    unpack(np.zeros(3, np.float32), model)
    return run_rounds(federation, FullModel(nn.Identity(), model)), notes


@pytest.mark.parametrize("strategy", ["FedAvg", "FedMedian"])
@pytest.mark.parametrize("last", [broken, silent])
def test_no_round_fails_where_budgets_have_taken_the_quorum(strategy: str, last: Answer) -> None:
    """Three of five have spent their budgets, and of the two that are left one does not answer."""
    late = dict.fromkeys((10, 11, 12), spent) | {14: last}
    deadline_s = 2.0 if last is silent else 30.0
    done, notes = run(late, strategy=strategy, deadline_s=deadline_s)
    assert (len(done.rounds), done.best_round) == (3, 2)
    assert done.weights.tolist() == [2.0, 2.0, 2.0]
    assert notes[-1] == "Ended before round 4: the privacy budget of 3 of 5 clients asked is spent."


def test_rounds_go_on_with_those_whose_budget_is_left() -> None:
    done, _ = run({10: spent})
    assert [(one.updates, one.declined) for one in done.rounds] == [(5, 0)] * 3 + [(4, 1)] * 7


def test_a_failure_that_budgets_do_not_explain_fails_the_round() -> None:
    """Four of five would have made the quorum: that three of them broke is no matter of budgets."""
    with pytest.raises(RoundFailed, match="1 of 4 clients sent an update"):
        run({10: spent} | dict.fromkeys((11, 12, 13), broken))


def test_without_privacy_of_examples_nobody_has_a_budget_and_to_decline_is_to_fail() -> None:
    """Or one device could end such a run, for good, by saying so."""
    done, _ = run({10: spent}, unit="none")
    assert [(one.updates, one.declined, one.failed) for one in done.rounds[3:]] == [(4, 0, 1)] * 7
    with pytest.raises(RoundFailed, match="2 of 5 clients sent an update"):
        run(dict.fromkeys((10, 11, 12), spent), unit="none")


def test_in_the_first_round_it_is_a_failure_as_nothing_was_learnt() -> None:
    with pytest.raises(RoundFailed, match="round 1: 0 of 1 client sent an update"):
        run(dict.fromkeys((10, 11, 12, 13), spent) | {14: broken}, after=0)


@pytest.mark.parametrize(
    ("asked", "declined", "updates", "over"),
    [
        (5, 5, 0, True),
        (5, 4, 1, True),
        (5, 4, 0, True),
        (5, 1, 4, False),
        (5, 2, 3, True),
        (5, 2, 2, True),
    ],
)
def test_what_ends_a_run(asked: int, declined: int, updates: int, over: bool) -> None:
    tally = Tally(asked, updates=updates, declined=declined)
    check_quorum(tally, 0.8, 5, 2)
    assert tally.over == over


def test_those_asked_in_addition_leave_a_quorum() -> None:
    """Of ten who are asked for a cohort of five six are left: that half of them broke is told."""
    with pytest.raises(RoundFailed, match="3 of 6 clients"):
        check_quorum(Tally(10, updates=3, declined=4, failed=3), 0.8, 5, 2)
