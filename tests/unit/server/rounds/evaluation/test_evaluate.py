"""How good a round is by what clients measure, some of whom make it up."""

from __future__ import annotations

import pytest
from flwr.app import MetricRecord, RecordDict

from fedcore.errors import RoundFailed
from fedcore.task.metrics import RMSE
from fedcore.updates.messages import METRICS, NUM_EXAMPLES
from fedcore.updates.pack import Vector
from tests.unit.server.rounds.stories import BAD, NODES, Answer, Story, adds, mixed, scores


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
        f"round 1: rmse excludes node 11 ({lie:.4g}): far from the values of the other 4 clients."
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
