from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from flwr.app import Array, Error, RecordDict

from fedcore.errors import BudgetExhausted, RoundFailed
from fedcore.task.measured import Measured
from fedcore.task.metrics import ACCURACY, RMSE, Metric
from fedcore.updates.messages import DECLINED, DECLINED_BY_OWNER, REFUSED, Update, update_content
from fedcore.updates.pack import Vector, pack
from server.rounds.checkpointing.progress import Start
from server.rounds.inbound import Tally
from server.rounds.quorum import check_quorum
from tests.unit.server.rounds.stories import BAD, Answer, Story, adds, mixed, scores


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


def test_what_was_spent_never_falls_where_another_client_answers() -> None:
    def answer(node: int, number: int, weights: Vector) -> RecordDict | Error:
        if number == 2 and node != 10:
            return Error(REFUSED, "away")
        return adds(epsilon=number * (1.0 if node == 10 else 3.0))(node, number, weights)

    told = [each.epsilon_max for each in Story(answer, quorum=0.2).run().rounds]
    assert told == [3.0, 3.0, 9.0]


def test_what_was_spent_before_a_restart_still_counts_after_it() -> None:
    story = Story(adds(epsilon=6.0), rounds=1)
    story.run()
    again = Story(adds(epsilon=2.0), rounds=2)
    told = again.run(Start(again.progress(round=1), tuple(story.records))).rounds
    assert [each.epsilon_max for each in told] == [6.0, 6.0]


def test_a_cohort_is_drawn_again_each_round_and_the_same_for_the_same_seed() -> None:
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
        (ACCURACY, (float("nan"),) * 3, 3),
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
    judge = lambda model: Measured(1, values={"rmse": next(errors)})  # noqa: E731
    done = Story(adds(), judge=judge, primary=RMSE).run()
    assert done.best_round == 2


def test_patience_ends_the_run_and_says_so() -> None:
    story = Story(adds(), judge=scores(0.2, 0.6, 0.5, 0.6, 0.9), rounds=5, patience=2)
    done = story.run()
    assert [record.round for record in done.rounds] == [1, 2, 3, 4]
    assert done.best_round == 2
    assert story.notes == [
        "Stopped after round 4: no round improved on round 2 for federation.patience = 2 rounds."
    ]


def test_patience_counts_no_round_without_a_value_as_progress() -> None:
    nan = float("nan")
    story = Story(adds(), judge=scores(0.5, nan, nan, 0.9), rounds=4, patience=2)
    done = story.run()
    assert (len(done.rounds), done.best_round) == (3, 1)
    assert [record.metrics["accuracy"] for record in done.rounds] == [0.5, None, None]
    assert story.notes[0] == (
        "round 2: accuracy is undefined (it is nan). This round cannot be the best while another "
        "has a value."
    )
    assert len(story.notes) == 2


def test_without_patience_every_round_is_run() -> None:
    assert len(Story(adds(), judge=scores(0.9, 0.5, 0.4)).run().rounds) == 3


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
    assert "round 1: 3 of 5 clients sent an update, and federation.quorum = 0.75 needs 4" in said
    assert "(2 failed, 0 silent at the deadline)" in said
    assert said.endswith("First: client 'x': it broke; client 'x': it broke.")
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
    story = Story(
        answer,
        strategy=strategy,
        rounds=1,
        cohort=2,
        over_selection=2.5,
        quorum=1.0,
        unit="example",
    )
    story.run()
    (record,) = story.records
    assert (record.cohort, record.updates, record.failed, record.declined) == (5, 2, 2, 1)


def test_the_quorum_is_of_the_cohort_and_not_of_all_who_are_asked() -> None:
    silent = {f"n{node}": lambda *asked: Error(REFUSED, "no") for node in (10, 11, 12)}
    story = Story(mixed(adds(), **silent), rounds=1, cohort=3, over_selection=1.6, quorum=0.66)
    story.run()
    assert story.records[0].updates == 2
    story = Story(mixed(adds(), **silent), rounds=1, cohort=3, over_selection=1.6, quorum=0.7)
    with pytest.raises(RoundFailed, match=r"2 of 5 clients sent an update, and .* needs 3 "):
        story.run()


def test_fewer_than_are_to_be_asked_are_asked_all() -> None:
    story = Story(adds(), rounds=1, cohort=5, over_selection=3.0)
    story.run()
    assert (story.records[0].cohort, story.records[0].updates) == (5, 5)


def test_clients_whose_budget_is_spent_do_not_count_against_the_quorum() -> None:
    answer = mixed(adds(epsilon=1.0), n14=declines_from(1))
    done = Story(answer, unit="example").run()
    assert [(r.updates, r.declined, r.failed) for r in done.rounds] == [(5, 0, 0), *[(4, 1, 0)] * 2]


def test_a_run_ends_once_those_with_a_budget_cannot_make_up_a_quorum_though_they_answer() -> None:
    story = Story(
        mixed(adds(epsilon=1.0), n13=declines_from(2), n14=declines_from(2)),
        rounds=5,
        unit="example",
    )
    done = story.run()
    assert [each.updates for each in done.rounds] == [5, 5]
    assert done.weights.tolist() == [2.0] * 3
    said = "Ended before round 3: the privacy budget of 2 of 5 clients asked is spent."
    assert story.notes == [said]


def test_devices_whose_budget_is_spent_are_not_drawn_again_while_others_have_one() -> None:
    spent = {f"n{node}": declines_from(0) for node in (10, 11, 12)}
    story = Story(mixed(adds(), **spent), live=True, cohort=2, rounds=12, unit="example")
    done = story.run()
    assert len(done.rounds) == 12
    asked = [node for _, node in story.asked]
    assert all(asked.count(node) <= 1 for node in (10, 11, 12))
    assert sum(each.declined for each in done.rounds) == sum(n in asked for n in (10, 11, 12))


def test_a_run_over_devices_ends_when_too_few_of_all_have_a_budget() -> None:
    spent = {f"n{node}": declines_from(1) for node in (10, 11, 12, 13)}
    story = Story(
        mixed(adds(), **spent), live=True, cohort=2, quorum=1.0, rounds=30, unit="example"
    )
    done = story.run()
    assert len(done.rounds) < 6
    assert story.notes[-1].startswith("Ended before round ")


def test_when_all_budgets_are_spent_the_run_ends_with_the_best_model_so_far() -> None:
    story = Story(declines_from(3), rounds=10, judge=scores(0.5, 0.8, 0.7), unit="example")
    done = story.run()
    assert len(done.rounds) == 3
    assert done.best_round == 2
    assert done.weights.tolist() == [2.0, 2.0, 2.0]
    assert story.notes == [
        "Ended before round 4: the privacy budget of all 5 clients asked is spent."
    ]


def test_a_budget_that_allows_no_round_at_all_is_an_error() -> None:
    with pytest.raises(BudgetExhausted, match=r"round 1: all 5 clients declined\. Nothing was tr"):
        Story(declines_from(0), unit="example").run()


def test_an_owners_budget_is_not_answered_with_advice_on_the_runs() -> None:
    def declined(*asked: object) -> Error:
        return Error(
            DECLINED_BY_OWNER, "client 'x': OwnersBudgetExhausted; the client's log has the details"
        )

    with pytest.raises(BudgetExhausted) as caught:
        Story(declined, unit="example").run()
    assert "have the owners raise their budgets" in str(caught.value)
    assert "raise privacy.max_epsilon" not in str(caught.value)
    done = mixed(adds(), n10=lambda *a: adds()(*a) if a[1] == 1 else declined())
    story = Story(done, quorum=1.0, unit="example")
    story.run()
    assert story.notes == [
        "Ended before round 2: the privacy budget of 1 of 5 clients asked is spent (1 of them: "
        "the owner's budget)."
    ]


def test_a_round_that_fails_names_whole_clients_and_the_next_step() -> None:
    broken = {f"n{node}": lambda *asked: Error(REFUSED, "no") for node in (10, 11)}
    with pytest.raises(
        RoundFailed, match=r"quorum = 0\.7 needs 4 \(.*continue with --resume"
    ) as said:
        Story(mixed(adds(), **broken), quorum=0.7).run()
    assert "3 of 5 clients" in str(said.value)


def test_a_share_that_is_a_whole_number_asks_for_no_client_more() -> None:
    tally = Tally(20, updates=11)
    check_quorum(tally, 0.55, 20, 1)


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


def test_a_fixed_bound_on_updates_holds_in_a_simulation_too() -> None:
    story = Story(mixed(adds(0.1), n11=adds(1e9)), max_update_norm=0.5, rounds=1)
    done = story.run()
    moved = (4 * 0.1 + 0.5 / 3**0.5) / 5
    assert done.weights == pytest.approx([moved] * 3, rel=1e-6)
    assert story.notes[0].startswith(
        "round 1: 1 update longer than federation.max_update_norm = 0.5, clipped to that: node 11"
    )


def grows(node: int, number: int, weights: Vector) -> RecordDict:
    return update_content(Update(weights + np.float32(100.0**number), 10, {}))


def test_updates_that_all_grow_are_clipped_and_a_resume_gives_the_same_bits() -> None:
    story = Story(grows, live=True, rounds=6)
    done = story.run()
    norms = [each.median_norm or 0.0 for each in story.records]
    assert norms == pytest.approx([100 * 3**0.5 * factor for factor in (1, 2, 2, 4, 4, 4)])
    assert any("median of the round, or of rounds so far" in note for note in story.notes)
    whole = Story(grows, live=True, rounds=6)
    half = Story(grows, live=True, rounds=3).run()
    progress = replace(whole.progress(round=3), weights=half.weights)
    resumed = whole.run(Start(progress, half.rounds))
    assert resumed.weights.tobytes() == done.weights.tobytes()
    assert [each.median_norm for each in resumed.rounds] == norms


def test_too_few_to_bound_are_told_of_once() -> None:
    story = Story(adds(0.1), live=True, rounds=3, cohort=2)
    story.run()
    assert [note for note in story.notes if note.startswith("WARNING: round 1: 2 updates, which")]
    assert len(story.notes) == 1
    assert not Story(adds(0.1), live=False, rounds=1, cohort=1).run().rounds[0].median_norm


def test_one_is_not_counted_as_many() -> None:
    with pytest.raises(BudgetExhausted, match=r"round 1: the client declined\. "):
        Story(declines_from(0), cohort=1, unit="example").run()
    with pytest.raises(RoundFailed, match="round 1: 0 of 1 client sent an update"):
        Story(lambda *asked: Error(REFUSED, "no"), cohort=1).run()
    story = Story(declines_from(1), cohort=1, unit="example")
    story.run()
    assert story.notes == ["Ended before round 2: the privacy budget of the client asked is spent."]
    story = Story(adds(), judge=scores(0.9, 0.1), patience=1)
    story.run()
    assert story.notes[-1].endswith("for federation.patience = 1 round.")
