"""How good a round is by what clients measure, some of whom make it up."""

from __future__ import annotations

import math

import pytest
import torch
from flwr.app import MetricRecord, RecordDict

from fedcore.errors import RoundFailed
from fedcore.task.metrics import ACCURACY, RMSE, Metric
from fedcore.task.statistics import Statistics
from fedcore.updates.messages import METRICS, NUM_EXAMPLES
from fedcore.updates.pack import Vector
from server.records import MetricSource
from tests.unit.server.rounds.stories import (
    BAD,
    NODES,
    Answer,
    Story,
    adds,
    measured,
    mixed,
    right,
    scores,
)

HELD_BACK = {"evaluate_cohort": 5, "holdout": 0.2}


def test_clients_judge_on_what_they_hold_back_weighed_by_its_size() -> None:
    story = Story(
        adds(), evaluate=mixed(right(0.5), n11=right(1.0, 40)), judge=scores(0.0), **HELD_BACK
    )
    done = story.run()
    assert [record.judged_on for record in done.rounds] == ["clients"] * 3
    assert done.rounds[0].metrics == {"accuracy": pytest.approx(0.75)}


@pytest.mark.parametrize(
    "bad",
    [
        right(float("nan")),
        right(1.0, -100),
        right(1.0, 0),
        right(1.5),
        measured(accuracy=[9.0, 9.0]),
        measured(accuracy=[10.0]),
        measured(accuracy=1.0),
        measured(accuracy=[10.0, 0.0], auc=[1.0]),
        measured(accuracy=[10.0, 0.0], auc="unasked"),
        BAD["nothing"],
        BAD["an error"],
    ],
    ids=[
        "NaN",
        "negative",
        "no examples",
        "above 1",
        "more than examples",
        "another length",
        "a value for sums",
        "a metric that was not asked for",
        "an undefined one that was not asked for",
        "nothing",
        "an error",
    ],
)
def test_a_score_that_cannot_be_used_is_left_out(bad: Answer) -> None:
    done = Story(adds(), evaluate=mixed(right(0.5), n12=bad), **HELD_BACK).run()
    assert done.rounds[0].metrics == {"accuracy": pytest.approx(0.5)}


def test_a_round_that_nobody_could_judge_fails() -> None:
    with pytest.raises(RoundFailed, match=r"none of 5 clients could be evaluated. First: client"):
        Story(adds(), evaluate=BAD["an error"], **HELD_BACK).run()


def test_scores_are_those_of_the_new_model() -> None:
    def evaluate(node: int, number: int, weights: Vector) -> RecordDict:
        assert weights.tolist() == [float(number)] * 3
        content = right(0.1 * number)(node, number, weights)
        assert isinstance(content, RecordDict)
        return content

    done = Story(adds(), evaluate=evaluate, **HELD_BACK).run()
    assert [round(r.metrics["accuracy"], 3) for r in done.rounds] == [0.1, 0.2, 0.3]


def missed(value: float) -> Answer:
    """An answer of a client whose RMSE this is."""
    return measured(rmse=[10 * value * abs(value), 10.0])


@pytest.mark.parametrize("lie", [1e300, 1.7e308, -1.0, 2e18])
def test_a_metric_out_of_its_range_decides_nothing(lie: float) -> None:
    story = Story(adds(), primary=RMSE, evaluate=mixed(missed(0.5), n11=missed(lie)), **HELD_BACK)
    done = story.run()
    assert [record.metrics for record in done.rounds] == [{"rmse": 0.5}] * 3
    assert "round 1: 1 of 5 clients could not be evaluated. First: metrics from node 11" in "".join(
        story.notes
    )


@pytest.mark.parametrize("lie", [1e17, 50.0])
def test_a_metric_without_a_range_is_without_those_that_are_far_from_all_others(lie: float) -> None:
    story = Story(adds(), primary=RMSE, evaluate=mixed(missed(0.5), n11=missed(lie)), **HELD_BACK)
    done = story.run()
    assert [record.metrics for record in done.rounds] == [{"rmse": 0.5}] * 3
    assert story.notes[0] == (
        f"round 1: rmse excludes node 11 ({lie:.4g}): far from the values of the other 4 clients."
    )


def test_metrics_that_differ_as_those_of_clients_do_are_all_counted() -> None:
    values = {f"n{node}": missed(0.1 * 2 ** (node - 10)) for node in NODES}
    done = Story(adds(), primary=RMSE, evaluate=mixed(missed(0.1), **values), **HELD_BACK).run()
    assert done.rounds[0].metrics == {"rmse": pytest.approx(math.sqrt(0.01 * 341 / 5))}


def test_a_client_that_leaves_a_metric_out_does_not_lower_its_mean() -> None:
    nothing = RecordDict({METRICS: MetricRecord({NUM_EXAMPLES: 9})})
    silent = mixed(right(0.8), n11=lambda *_: nothing)
    assert Story(adds(), evaluate=silent, **HELD_BACK).run().rounds[0].metrics == {
        "accuracy": pytest.approx(0.8)
    }


def test_too_many_metrics_are_refused() -> None:
    many = {f"m{place}": 1.0 for place in range(90_000)}
    noisy = mixed(right(0.8), n11=lambda *_: RecordDict({METRICS: MetricRecord(many)}))
    story = Story(adds(), evaluate=noisy, **HELD_BACK)
    assert story.run().rounds[0].metrics == {"accuracy": pytest.approx(0.8)}
    assert max(map(len, story.notes)) < 500


AUC = Metric("auc", lambda outputs, targets: 0.0, higher_is_better=True, low=0.0, high=1.0)


def test_a_metric_that_one_client_lacks_is_left_out_for_that_client_alone() -> None:
    usual = measured(accuracy=[5.0, 5.0], auc=0.7)
    lacks = measured(accuracy=[10.0, 0.0], auc="one class\x1b[2J only")
    story = Story(adds(), metrics=(AUC, ACCURACY), evaluate=mixed(usual, n11=lacks), **HELD_BACK)
    done = story.run()
    assert done.rounds[0].metrics == {"auc": pytest.approx(0.7), "accuracy": 0.6}
    assert done.rounds[0].sources == {
        "auc": MetricSource(4, 5, 1, averaged=True, reason="one class\\x1b[2J only"),
        "accuracy": MetricSource(5, 5, 0, averaged=False, reason=""),
    }
    assert story.notes == [
        "round 1: auc, mean of clients: 4 of 5 clients (1 undefined: one class\\x1b[2J only)."
    ]


def test_a_metric_that_every_client_lacks_has_no_value_and_the_others_have_theirs() -> None:
    lacks = measured(accuracy=[5.0, 5.0], auc="one class only")
    story = Story(adds(), metrics=(AUC, ACCURACY), evaluate=lacks, **HELD_BACK)
    done = story.run()
    assert done.rounds[0].metrics == {"auc": None, "accuracy": 0.5}
    assert done.best_round == 3  # none is better than another, so the last
    assert [note.split(".")[0] for note in story.notes] == [
        "round 1: auc is undefined (one class only)"
    ]


def test_sums_of_clients_give_the_value_over_all_of_their_examples() -> None:
    """The mean of the clients' values would be 0.75 and 2.0."""
    other = measured(40, accuracy=[10.0, 30.0], rmse=[4000.0, 40.0])
    usual = measured(10, accuracy=[10.0, 0.0], rmse=[0.0, 10.0])
    story = Story(adds(), metrics=(ACCURACY, RMSE), evaluate=mixed(usual, n11=other), **HELD_BACK)
    assert story.run().rounds[0].metrics == {
        "accuracy": 50 / 80,
        "rmse": pytest.approx(math.sqrt(4000 / 80), abs=1e-12),
    }


@pytest.mark.parametrize(
    "lie",
    [[0.0, -1.0], [1e9, 1e-9], [1e30, 0.0], [float("inf"), 10.0], [10.0, 1e6]],
    ids=["negative", "hardly any examples", "no examples", "infinite", "too many values"],
)
def test_a_client_that_lies_in_an_unbounded_sum_does_not_decide(lie: list[float]) -> None:
    story = Story(
        adds(), metrics=(RMSE,), evaluate=mixed(missed(0.5), n11=measured(rmse=lie)), **HELD_BACK
    )
    assert story.run().rounds[0].metrics == {"rmse": 0.5}


def test_a_client_that_lies_in_a_bounded_sum_moves_it_by_its_share() -> None:
    lie = measured(10, accuracy=[10.0, 0.0])
    story = Story(adds(), evaluate=mixed(right(0.5), n11=lie), **HELD_BACK)
    assert story.run().rounds[0].metrics == {"accuracy": 0.6}


RELATIVE = Metric(
    "relative_error",
    Statistics(lambda *_: torch.zeros(2), lambda s: s[0] / s[1], limits=[(0.0, math.inf)] * 2),
    higher_is_better=False,
    low=0.0,
    high=1.0,
)


@pytest.mark.parametrize("size", [1e3, 1e100])
def test_a_client_with_huge_sums_and_a_usual_value_does_not_decide_a_metric(size: float) -> None:
    """Nothing limits the sums, so the ratio of the client's own would be that of all clients."""
    honest = {
        f"n{node}": measured(relative_error=[1.0 + place / 10, 8.0 + place])
        for place, node in enumerate(NODES)
    }
    alone = Story(adds(), primary=RELATIVE, evaluate=mixed(right(0.5), **honest), **HELD_BACK)
    honest["n11"] = measured(relative_error=[0.05 * size, size])
    story = Story(adds(), primary=RELATIVE, evaluate=mixed(right(0.5), **honest), **HELD_BACK)
    (value,), (usual,) = (one.run().rounds[0].metrics.values() for one in (story, alone))
    assert value is not None
    assert usual is not None
    assert abs(value - usual) < 0.01
    assert story.notes[0].startswith("round 1: relative_error excludes node 11 (its sums): far")
    assert alone.notes == []


SHARE = Metric(
    "share",
    Statistics(lambda *_: torch.zeros(2), lambda s: s[0] / s[1], limits=[(0, 1)] * 2),
    higher_is_better=True,
    low=0.0,
    high=1.0,
)


def test_sums_that_no_examples_have_do_not_make_a_metric_undefined_for_all() -> None:
    """More hits than cases: a client could void every round but the one that it prefers."""
    usual, lie = measured(share=[9.0, 10.0]), measured(share=[10.0, 0.0])
    story = Story(adds(), primary=SHARE, evaluate=mixed(usual, n11=lie), **HELD_BACK)
    done = story.run()
    assert done.rounds[0].metrics == {"share": pytest.approx(0.9)}
    assert done.rounds[0].sources["share"] == MetricSource(4, 5, 1, False, "it is inf")


def test_sums_without_a_value_of_their_own_count_where_all_together_have_one() -> None:
    usual, without = measured(share=[9.0, 10.0]), measured(share=[0.0, 0.0])
    story = Story(adds(), primary=SHARE, evaluate=mixed(usual, n11=without), **HELD_BACK)
    assert story.run().rounds[0].sources["share"] == MetricSource(5, 5, 0, False, "")
    nothing = Story(adds(), primary=SHARE, evaluate=without, **HELD_BACK).run().rounds[0]
    assert nothing.metrics == {"share": None}
    assert nothing.sources["share"] == MetricSource(5, 5, 0, False, "")
