from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Error, Message, MetricRecord, RecordDict
from torch import nn

from fedcore.config import RunConfig
from fedcore.errors import BudgetExhausted, RoundFailed
from fedcore.flower.grid import InProcessGrid
from fedcore.flower.identity import assume_identity
from fedcore.metrics import ACCURACY, RMSE, Metric
from fedcore.model import FullModel
from fedcore.seeds import Simulated
from fedcore.updates.messages import (
    ARRAYS,
    CONFIG,
    DECLINED,
    METRICS,
    MODEL,
    NUM_EXAMPLES,
    REFUSED,
    Update,
    update_content,
)
from fedcore.updates.pack import Vector, pack, unpack
from server.records import RoundRecord
from server.rounds import Federated, Federation, run_rounds
from server.strategies import make_strategy

NODES = list(range(10, 15))
Answer = Callable[[int, int, Vector], RecordDict | Error]
"""What a node answers, given its number, the round and the weights that it was sent."""


def zeros() -> FullModel:
    """Two inputs, one output: three weights, all zero."""
    model = nn.Linear(2, 1)
    unpack(np.zeros(3, np.float32), model)
    return FullModel(nn.Identity(), model)


def adds(step: float = 1.0, *, count: int = 10, **metrics: float) -> Answer:
    return lambda node, number, weights: update_content(
        Update(weights + np.float32(step), count, metrics)
    )


def mixed(usual: Answer, **others: Answer) -> Answer:
    """Some nodes answer otherwise: ``n10=...``."""
    return lambda node, number, weights: others.get(f"n{node}", usual)(node, number, weights)


class Story:
    """A federation over made-up clients, and what it told."""

    def __init__(
        self,
        answer: Answer,
        *,
        judge: Callable[[FullModel], dict[str, float]] | None = None,
        primary: Metric = ACCURACY,
        evaluate: Answer | None = None,
        client_seconds: float = 0.0,
        strategy: str = "FedAvg",
        options: dict[str, Any] | None = None,
        **federation: Any,
    ) -> None:
        assume_identity(1)
        self.records: list[RoundRecord] = []
        self.notes: list[str] = []
        self.asked: list[tuple[int, int]] = []
        run = RunConfig.model_validate(
            {"name": "run", "task": "task.py", "federation": {"rounds": 3} | federation}
        )

        def handle(message: Message) -> Message:
            time.sleep(client_seconds)
            node = message.metadata.dst_node_id
            number = int(str(message.content.config_records[CONFIG]["server-round"]))
            weights = message.content.array_records[ARRAYS][MODEL].numpy()
            if message.metadata.message_type == "train":
                self.asked.append((number, node))
                return Message(answer(node, number, weights), reply_to=message)
            assert evaluate is not None
            return Message(evaluate(node, number, weights), reply_to=message)

        cohort = run.federation.cohort or len(NODES)
        self._federation = Federation(
            run=run,
            grid=InProcessGrid(1, NODES, handle),
            chosen=make_strategy(strategy, options or {}, cohort=cohort, size=3),
            cohort=cohort,
            metrics=(primary,),
            randomness=Simulated(0),
            judge=judge,
            on_round=self.records.append,
            on_note=self.notes.append,
        )
        self.model = zeros()

    def run(self) -> Federated:
        return run_rounds(self._federation, self.model)


def scores(*values: float) -> Callable[[FullModel], dict[str, float]]:
    """A judge that gives these scores, one a round."""
    left = iter(values)
    return lambda model: {"accuracy": next(left), "rmse": 1.0}


def test_rounds_follow_one_another_and_are_recorded() -> None:
    story = Story(adds(train_loss=0.25))
    done = story.run()
    assert done.weights.tolist() == [3.0, 3.0, 3.0]
    assert done.best_round == 3
    assert done.rounds == tuple(story.records)
    first = done.rounds[0]
    assert (first.round, first.rounds, first.cohort, first.updates) == (1, 3, 5, 5)
    assert (first.declined, first.failed) == (0, 0)
    assert first.train_loss == 0.25
    assert first.epsilon_max is None
    assert first.judged_on == "nothing"
    assert first.bytes_up == first.bytes_down == 5 * len(Array(np.zeros(3, np.float32)).data)
    assert story.notes == []


def test_updates_weigh_as_many_examples_as_they_were_trained_on() -> None:
    answer = mixed(adds(0.0, count=10, train_loss=1.0), n12=adds(4.0, count=40, train_loss=3.0))
    done = Story(answer, rounds=1).run()
    assert done.weights.tolist() == [2.0, 2.0, 2.0]
    assert done.rounds[0].train_loss == 2.0


@pytest.mark.parametrize("strategy", ["FedAvg", "FedTrimmedAvg"], ids=["folded", "held"])
def test_uniform_weighting_counts_every_update_alike(strategy: str) -> None:
    answer = mixed(adds(0.0, count=10), n12=adds(5.0, count=10_000))
    options = {"beta": 0.0} if strategy == "FedTrimmedAvg" else {}
    story = Story(answer, rounds=1, weighting="uniform", strategy=strategy, options=options)
    assert story.run().weights.tolist() == [1.0, 1.0, 1.0]


def test_the_most_that_any_client_spent_is_recorded() -> None:
    answer = mixed(adds(epsilon=1.0), n13=adds(epsilon=2.5))
    assert Story(answer, rounds=1).run().rounds[0].epsilon_max == 2.5


def test_a_cohort_is_drawn_anew_each_round_and_the_same_for_the_same_seed() -> None:
    one, again = Story(adds(), cohort=3, rounds=6), Story(adds(), cohort=3, rounds=6)
    one.run()
    again.run()
    assert one.asked == again.asked
    cohorts = {tuple(node for n, node in one.asked if n == number) for number in range(1, 7)}
    assert len(cohorts) > 1
    assert all(len(set(cohort)) == 3 for cohort in cohorts)


@pytest.mark.parametrize(
    ("primary", "judged", "best"),
    [
        (ACCURACY, (0.5, 0.9, 0.7), 2),
        (ACCURACY, (0.5, 0.5, 0.5), 1),
        (ACCURACY, (float("nan"), 0.1, 0.2), 3),
        (ACCURACY, (0.3, float("nan"), 0.2), 1),
    ],
)
def test_the_best_round_is_kept_with_the_weights_of_that_round(
    primary: Metric, judged: tuple[float, ...], best: int
) -> None:
    story = Story(adds(), judge=scores(*judged), primary=primary)
    done = story.run()
    assert done.best_round == best
    assert done.weights.tolist() == [float(best)] * 3
    assert pack(story.model.model).tolist() == [3.0, 3.0, 3.0]
    assert [record.judged_on for record in done.rounds] == ["cloud"] * 3


def test_for_an_error_the_best_round_is_the_lowest() -> None:
    errors = iter((3.0, 1.0, 2.0))
    done = Story(adds(), judge=lambda model: {"rmse": next(errors)}, primary=RMSE).run()
    assert done.best_round == 2


def test_patience_ends_the_run_and_says_so() -> None:
    story = Story(adds(), judge=scores(0.2, 0.6, 0.5, 0.6, 0.9), rounds=5, patience=2)
    done = story.run()
    assert [record.round for record in done.rounds] == [1, 2, 3, 4]
    assert done.best_round == 2
    assert story.notes == [
        "Stopped after round 4: none was better than round 2 for federation.patience = 2 rounds."
    ]


def test_without_patience_every_round_is_run() -> None:
    assert len(Story(adds(), judge=scores(0.9, 0.5, 0.4)).run().rounds) == 3


def records_of(array: np.ndarray[Any, Any], **metrics: Any) -> RecordDict:
    return RecordDict(
        {
            ARRAYS: ArrayRecord({MODEL: Array(array)}),
            METRICS: MetricRecord({NUM_EXAMPLES: 10} | metrics),
        }
    )


BAD: dict[str, Answer] = {
    "NaN": adds(float("nan")),
    "infinite": adds(float("inf")),
    "another shape": lambda *_: records_of(np.zeros(4, np.float32)),
    "another dtype": lambda *_: records_of(np.zeros(3)),
    "no examples": lambda *_: records_of(np.zeros(3, np.float32), **{NUM_EXAMPLES: 0}),
    "a trillion examples": lambda *_: records_of(np.zeros(3, np.float32), **{NUM_EXAMPLES: 10**12}),
    "negative examples": lambda *_: records_of(np.zeros(3, np.float32), **{NUM_EXAMPLES: -9}),
    "a loss that is NaN": adds(train_loss=float("nan")),
    "nothing": lambda *_: RecordDict(),
    "an error": lambda *_: Error(REFUSED, "client 'x': it broke"),
    "an error without a reason": lambda *_: Error(7),
    "a metric that was not asked for": adds(accuracy=1.0),
    "a loss out of its range": adds(train_loss=1e300),
}


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD.keys())
@pytest.mark.parametrize("strategy", ["FedAvg", "FedMedian"], ids=["folded", "held"])
def test_a_bad_update_is_left_out_and_the_round_goes_on(bad: Answer, strategy: str) -> None:
    story = Story(mixed(adds(train_loss=1.0), n12=bad), strategy=strategy, rounds=2)
    done = story.run()
    assert done.weights.tolist() == [2.0, 2.0, 2.0]
    assert [(r.updates, r.failed) for r in done.rounds] == [(4, 1), (4, 1)]
    assert [r.train_loss for r in done.rounds] == [1.0, 1.0]
    assert len(story.notes) == 1  # said once, not every round
    assert story.notes[0].startswith("round 1: 1 of 5 clients failed. First: ")


def test_too_few_updates_fail_the_round_with_a_reason() -> None:
    broken = BAD["an error"]
    story = Story(mixed(adds(), n10=broken, n11=broken))
    with pytest.raises(RoundFailed) as caught:
        story.run()
    said = str(caught.value)
    assert "round 1: 3 of 5 clients sent an update, and federation.quorum = 0.8 needs 4" in said
    assert "(2 failed, 0 silent at the deadline)" in said
    assert said.endswith("First: client 'x': it broke; client 'x': it broke")
    assert story.records == []


def test_a_lower_quorum_lets_the_round_pass() -> None:
    broken = BAD["an error"]
    done = Story(mixed(adds(), n10=broken, n11=broken), quorum=0.6).run()
    assert [record.updates for record in done.rounds] == [3, 3, 3]


def test_clients_that_are_silent_at_the_deadline_count_against_the_quorum() -> None:
    story = Story(adds(), client_seconds=0.08, deadline_s=0.2, rounds=1)
    with pytest.raises(RoundFailed, match=r"\(0 failed, 2 silent at the deadline\)"):
        story.run()
    assert Story(adds(), client_seconds=0.08, deadline_s=0.2, rounds=1, quorum=0.5).run().rounds


def declines_from(last: int) -> Answer:
    def answer(node: int, number: int, weights: Vector) -> RecordDict | Error:
        if number > last:
            return Error(DECLINED, f"client 'n{node}' has spent epsilon 7.9 of 8.")
        return adds(epsilon=float(number))(node, number, weights)

    return answer


@pytest.mark.parametrize("strategy", ["FedAvg", "FedMedian"])
def test_the_first_updates_are_taken_and_nobody_is_waited_for_after_them(strategy: str) -> None:
    story = Story(adds(), strategy=strategy, rounds=1, cohort=3, over_selection=1.6)
    story.run()
    (record,) = story.records
    assert (record.cohort, record.updates, record.failed) == (5, 3, 0)
    assert len(story.asked) == 3, "the others were not even heard: this grid asks one by one"
    assert pack(story.model.model).tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("strategy", ["FedAvg", "FedMedian"])
def test_those_asked_in_addition_stand_in_for_who_fails_or_declines(strategy: str) -> None:
    answer = mixed(
        adds(),
        n10=lambda *asked: Error(REFUSED, "no"),
        n11=lambda *asked: Error(DECLINED, "spent"),
        n12=adds(float("nan")),
    )
    story = Story(answer, strategy=strategy, rounds=1, cohort=2, over_selection=2.5, quorum=1.0)
    story.run()
    (record,) = story.records
    assert (record.cohort, record.updates, record.failed, record.declined) == (5, 2, 2, 1)


def test_the_quorum_is_of_the_cohort_and_not_of_all_who_are_asked() -> None:
    silent = {f"n{node}": lambda *asked: Error(REFUSED, "no") for node in (10, 11, 12)}
    story = Story(mixed(adds(), **silent), rounds=1, cohort=3, over_selection=1.6, quorum=0.66)
    story.run()
    assert story.records[0].updates == 2
    story = Story(mixed(adds(), **silent), rounds=1, cohort=3, over_selection=1.6, quorum=0.7)
    with pytest.raises(RoundFailed, match=r"2 of 5 clients sent an update, and .* needs 2\.1"):
        story.run()


def test_fewer_than_are_to_be_asked_are_asked_all() -> None:
    story = Story(adds(), rounds=1, cohort=5, over_selection=3.0)
    story.run()
    assert (story.records[0].cohort, story.records[0].updates) == (5, 5)


def test_clients_whose_budget_is_spent_do_not_count_against_the_quorum() -> None:
    answer = mixed(declines_from(1), n14=adds(epsilon=1.0))
    done = Story(answer).run()
    assert [(r.updates, r.declined, r.failed) for r in done.rounds] == [(5, 0, 0), *[(1, 4, 0)] * 2]


def test_when_all_budgets_are_spent_the_run_ends_with_the_best_model_so_far() -> None:
    story = Story(declines_from(3), rounds=10, judge=scores(0.5, 0.8, 0.7))
    done = story.run()
    assert len(done.rounds) == 3
    assert done.best_round == 2
    assert done.weights.tolist() == [2.0, 2.0, 2.0]
    assert story.notes == [
        "Ended before round 4: the privacy budget of all 5 clients asked is spent."
    ]


def test_a_budget_that_allows_no_round_at_all_is_an_error() -> None:
    with pytest.raises(BudgetExhausted, match=r"round 1: all 5 clients declined\. Nothing was tr"):
        Story(declines_from(0)).run()


@pytest.mark.filterwarnings("ignore:overflow")
def test_an_aggregate_that_is_not_finite_is_refused() -> None:
    options = {"eta": 1e38, "tau": 1e-3}
    with pytest.raises(RoundFailed, match=r"round \d: aggregate: it holds values that are not fin"):
        Story(adds(1000.0), strategy="FedAdagrad", options=options, rounds=5).run()


def test_a_strategy_that_fails_is_named_with_its_reason() -> None:
    def zero(node: int, number: int, weights: Vector) -> RecordDict:
        return update_content(Update(weights.copy(), 10, {}))

    options = {"noise_multiplier": 0.0, "clipping_norm": 1.0}
    name = "DifferentialPrivacyServerSideFixedClipping"
    with pytest.raises(RoundFailed, match=f"round 1: {name} failed to aggregate 5 updates: ZeroDi"):
        Story(zero, strategy=name, options=options).run()


def told(accuracy: float, count: int = 10) -> Answer:
    return lambda *_: RecordDict(
        {METRICS: MetricRecord({NUM_EXAMPLES: count, "accuracy": accuracy})}
    )


HELD_BACK = {"evaluate_cohort": 5, "holdout": 0.2}


def test_clients_judge_on_what_they_hold_back_weighed_by_its_size() -> None:
    story = Story(
        adds(), evaluate=mixed(told(0.5), n11=told(1.0, 40)), judge=scores(0.0), **HELD_BACK
    )
    done = story.run()
    assert [record.judged_on for record in done.rounds] == ["clients"] * 3
    assert done.rounds[0].metrics == {"accuracy": pytest.approx(0.75)}


@pytest.mark.parametrize(
    "bad",
    [told(float("nan")), told(1.0, -100), told(1.0, 0), BAD["nothing"], BAD["an error"]],
    ids=["NaN", "negative", "no examples", "nothing", "an error"],
)
def test_a_score_that_cannot_be_used_is_left_out(bad: Answer) -> None:
    done = Story(adds(), evaluate=mixed(told(0.5), n12=bad), **HELD_BACK).run()
    assert done.rounds[0].metrics == {"accuracy": pytest.approx(0.5)}


def test_a_round_that_nobody_could_judge_fails() -> None:
    with pytest.raises(RoundFailed, match=r"none of 5 clients could be evaluated. First: client"):
        Story(adds(), evaluate=BAD["an error"], **HELD_BACK).run()


def test_scores_are_those_of_the_new_model() -> None:
    def evaluate(node: int, number: int, weights: Vector) -> RecordDict:
        assert weights.tolist() == [float(number)] * 3
        content = told(0.1 * number)(node, number, weights)
        assert isinstance(content, RecordDict)
        return content

    done = Story(adds(), evaluate=evaluate, **HELD_BACK).run()
    assert [round(r.metrics["accuracy"], 3) for r in done.rounds] == [0.1, 0.2, 0.3]


def measured(value: float) -> Answer:
    return lambda *_: RecordDict({METRICS: MetricRecord({NUM_EXAMPLES: 10, "rmse": value})})


@pytest.mark.parametrize("lie", [1e300, 1.7e308, -1.0, 2e18])
def test_a_metric_out_of_its_range_decides_nothing(lie: float) -> None:
    story = Story(
        adds(), primary=RMSE, evaluate=mixed(measured(0.5), n11=measured(lie)), **HELD_BACK
    )
    done = story.run()
    assert [record.metrics for record in done.rounds] == [{"rmse": 0.5}] * 3
    assert "round 1: 1 of 5 clients could not be evaluated. First: metrics from node 11" in "".join(
        story.notes
    )


@pytest.mark.parametrize("lie", [1e17, 50.0])
def test_a_metric_without_a_range_is_without_those_that_are_far_from_all_others(lie: float) -> None:
    story = Story(
        adds(), primary=RMSE, evaluate=mixed(measured(0.5), n11=measured(lie)), **HELD_BACK
    )
    done = story.run()
    assert [record.metrics for record in done.rounds] == [{"rmse": 0.5}] * 3
    assert story.notes[0] == (
        f"round 1: rmse is without node 11 ({lie:.4g}): far from what the other 4 clients measured."
    )


def test_metrics_that_differ_as_those_of_clients_do_are_all_counted() -> None:
    values = {f"n{node}": measured(0.1 * 2 ** (node - 10)) for node in NODES}
    done = Story(adds(), primary=RMSE, evaluate=mixed(measured(0.1), **values), **HELD_BACK).run()
    assert done.rounds[0].metrics == {"rmse": pytest.approx(0.62)}


def test_a_client_that_leaves_a_metric_out_does_not_lower_its_mean() -> None:
    silent = mixed(told(0.8), n11=lambda *_: RecordDict({METRICS: MetricRecord({NUM_EXAMPLES: 9})}))
    assert Story(adds(), evaluate=silent, **HELD_BACK).run().rounds[0].metrics == {
        "accuracy": pytest.approx(0.8)
    }


def test_too_many_metrics_are_refused() -> None:
    many = {f"m{place}": 1.0 for place in range(90_000)}
    noisy = mixed(told(0.8), n11=lambda *_: RecordDict({METRICS: MetricRecord(many)}))
    story = Story(adds(), evaluate=noisy, **HELD_BACK)
    assert story.run().rounds[0].metrics == {"accuracy": pytest.approx(0.8)}
    assert max(map(len, story.notes)) < 500


def test_a_fixed_bound_on_updates_holds_in_a_simulation_too() -> None:
    story = Story(mixed(adds(0.1), n11=adds(1e9)), max_update_norm=0.5, rounds=1)
    done = story.run()
    moved = (4 * 0.1 + 0.5 / 3**0.5) / 5
    assert done.weights == pytest.approx([moved] * 3, rel=1e-6)
    assert story.notes[0].startswith(
        "round 1: 1 update longer than federation.max_update_norm = 0.5, clipped to that: node 11"
    )
