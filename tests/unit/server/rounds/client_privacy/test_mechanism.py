"""What the server adds to bounded updates, whom it asks, and what it counts."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fedcore.config.run import RunConfig
from fedcore.errors import BudgetExhausted, PrivacyError, RoundFailed
from fedcore.privacy.accounting import epsilon_of
from fedcore.privacy.draws import SystemDraws
from fedcore.privacy.matrix import participations_of
from fedcore.seeds import Simulated
from fedcore.updates.pack import Vector
from server.rounds.aggregation.exact_mean import ExactMean
from server.rounds.client_privacy.mechanism import (
    allows,
    charge,
    draw,
    draws_of,
    epsilon,
    factor,
    noise_beside_bits,
    protect,
    release,
    statement,
)
from server.rounds.client_privacy.protection import (
    ClientPlan,
    Protection,
    noise_of,
    protection_doc,
    protection_of,
)

SIZE = 2000
START = np.linspace(-1, 1, SIZE).astype(np.float32)


def run_of(rounds: int = 10, **client: Any) -> RunConfig:
    settings = {"target_delta": 1e-4, "accountant": "rdp", **client}
    return RunConfig.model_validate(
        {
            "name": "run",
            "task": "task.py",
            "federation": {"rounds": rounds},
            "privacy": {"unit": "client", "client": settings},
        }
    )


def summed(*updates: Vector) -> ExactMean:
    mean = ExactMean(SIZE)
    for update in updates:
        mean.add(update, 1)
    return mean


def released(run: RunConfig, protection: Protection, mean: ExactMean, **given: Any) -> Vector:
    draws = draws_of(Simulated(0), "client noise", 1)
    asked = {"nodes": (), "unclipped": 0, "draws": draws} | given
    return release(run, protection, START, mean, **asked).weights


def test_with_auto_the_last_round_just_stays_within_the_budget() -> None:
    run = run_of(20, max_epsilon=3.0)
    protection = protect(run, clients=500, cohort=50)
    spent = epsilon(run, protection, rounds=20)
    assert 2.9 < spent <= 3.0
    assert allows(run, protection, rounds=20)
    assert not allows(run, protection, rounds=21)
    assert protection.plan == ClientPlan(500, 50, protection.plan.noise_multiplier, None)
    # Each round is one step of the subsampled Gaussian mechanism.
    one = charge(run, protection, rounds=1)
    assert (one.steps, one.sample_rate) == (1, 0.1)
    assert epsilon_of([one] * 20, target_delta=1e-4, accountant="rdp") == spent
    assert epsilon(run, protection, rounds=0) == 0


def test_a_budget_that_allows_no_round_is_refused_before_any() -> None:
    with pytest.raises(BudgetExhausted, match="round 1: it would spend epsilon"):
        protect(run_of(max_epsilon=0.5, noise_multiplier=0.3), clients=100, cohort=100)


def test_a_delta_that_protects_nobody_is_refused() -> None:
    with pytest.raises(PrivacyError, match=r"target_delta = 0\.0001 with 1001 clients: expected"):
        protect(run_of(), clients=1001, cohort=10)


def test_noise_goes_on_the_sum_and_the_divisor_is_the_expected_number() -> None:
    run = run_of(clip_norm=0.5, noise_multiplier=0.1, max_epsilon=1e5)
    protection = protect(run, clients=1000, cohort=50)
    quiet = released(run, protection, summed())
    one = START + np.float32(0.001)
    moved = released(run, protection, summed(one, one, one))
    # The same draws: what is left is the sum of three differences over 50, not over 3.
    assert moved - quiet == pytest.approx(np.full(SIZE, 3 * 0.001 / 50), abs=2e-7)


def test_system_draws_differ_and_simulated_ones_repeat() -> None:
    run = run_of(noise_multiplier=1.0, max_epsilon=1e5)
    protection = protect(run, clients=1000, cohort=50)
    system = [released(run, protection, summed(), draws=SystemDraws()) for _ in range(2)]
    assert (system[0] != system[1]).mean() > 0.99
    simulated = [released(run, protection, summed()) for _ in range(2)]
    assert (simulated[0] == simulated[1]).all()


def test_nobody_is_drawn_while_too_few_are_there() -> None:
    run = run_of()
    protection = protect(run, clients=200, cohort=20)
    with pytest.raises(
        RoundFailed, match="round 4: 19 clients are available, but the round needs 20"
    ):
        draw(run, protection, range(19), draws_of(Simulated(0), "cohort", 4), number=4)


MATRIX = {"mechanism": "matrix", "clip_norm": 1.0}


def rounds_of(run: RunConfig, protection: Protection, count: int) -> list[tuple[Vector, Any]]:
    found, start = [], np.zeros(SIZE, np.float32)
    for number in range(1, count + 1):
        asked = draw(
            run, protection, range(100), draws_of(Simulated(1), "c", number), number=number
        )
        draws = draws_of(Simulated(1), "client noise", number)
        mean = ExactMean(SIZE)
        done = release(run, protection, start, mean, nodes=asked, unclipped=0, draws=draws)
        assert done.protection is not None
        start, protection = done.weights, done.protection
        found.append((start, (asked, protection)))
    return found


def test_matrix_asks_nobody_twice_within_the_separation() -> None:
    run = run_of(30, separation=6, **MATRIX)
    found = rounds_of(run, protect(run, clients=100, cohort=15), 30)
    asked = [told[0] for _, told in found]
    assert all(len(each) == 15 for each in asked)
    for first in range(30):
        window = [node for each in asked[first : first + 6] for node in each]
        assert len(window) == len(set(window))
    assert len(set(map(tuple, asked))) == 30


def test_matrix_noise_on_the_model_is_what_the_factor_says() -> None:
    run = run_of(16, separation=6, max_epsilon=5.0, **MATRIX)
    protection = protect(run, clients=100, cohort=15)
    matrix = factor(run, 6)
    assert len(matrix.column) > 1
    model = rounds_of(run, protection, 16)[-1][0] * 15
    expected = protection.plan.noise_multiplier * matrix.error(16)
    assert np.std(model) == pytest.approx(expected, rel=0.09)  # as above
    independent = protection.plan.noise_multiplier / matrix.norm * math.sqrt(16)
    assert expected < 0.8 * independent  # of the same epsilon


def test_matrix_counts_the_rounds_that_one_client_can_take_part_in() -> None:
    run = run_of(16, separation=6, max_epsilon=5.0, **MATRIX)
    protection = protect(run, clients=100, cohort=15)
    plan = protection.plan
    assert plan.sample_rate == 1.0
    for rounds, times in ((1, 1), (6, 1), (7, 2), (16, 3)):
        assert participations_of(rounds, 6) == times
        one = charge(run, protection, rounds=rounds)
        moved = math.sqrt(times) * factor(run, 6).norm
        assert (one.steps, one.sample_rate) == (1, 1.0)
        assert one.noise_multiplier == pytest.approx(plan.noise_multiplier / moved)
    assert 4.9 < epsilon(run, protection, rounds=16) <= 5.0


def test_a_separation_that_the_clients_do_not_allow_is_refused() -> None:
    with pytest.raises(PrivacyError, match="separation = 7: with 100 clients and 15"):
        protect(run_of(separation=7, **MATRIX), clients=100, cohort=15)
    assert protect(run_of(**MATRIX), clients=100, cohort=15).plan.separation == 6


def test_what_is_remembered_goes_on_with_the_same_bits() -> None:
    run = run_of(12, separation=6, max_epsilon=5.0, **MATRIX)
    whole = rounds_of(run, protect(run, clients=100, cohort=15), 8)
    kept = whole[4][1][1]
    again = protection_of(protection_doc(kept), [one.copy() for one in noise_of(kept)])
    assert again is not None
    assert again.plan == kept.plan
    draws = draws_of(Simulated(1), "client noise", 6)
    asked = draw(run, again, range(100), draws_of(Simulated(1), "c", 6), number=6)
    done = release(run, again, whole[4][0], ExactMean(SIZE), nodes=asked, unclipped=0, draws=draws)
    assert (done.weights == whole[5][0]).all()
    assert asked == whole[5][1][0]


ADAPTIVE = {"clip_norm": "adaptive", "max_epsilon": 1e4, "noise_multiplier": 1.0}


def adapted(norms: np.ndarray[Any, Any], rounds: int) -> float:
    run = run_of(rounds, **ADAPTIVE)
    cohort = len(norms)
    protection = protect(run, clients=cohort, cohort=cohort)
    for number in range(rounds):
        unclipped = int((norms <= protection.clip_norm).sum())
        mean = summed(*[START] * cohort)
        draws = draws_of(Simulated(0), "client noise", number)
        done = release(
            run, protection, START, mean, nodes=(), unclipped=unclipped, draws=draws
        ).protection
        assert done is not None
        protection = done
    return protection.clip_norm


def test_an_adaptive_bound_goes_to_the_median_of_the_norms() -> None:
    norms = np.random.default_rng(0).lognormal(1.0, 0.5, 100)
    assert adapted(norms, 80) == pytest.approx(float(np.median(norms)), rel=0.15)
    assert adapted(norms / 100, 80) == pytest.approx(float(np.median(norms)) / 100, rel=0.15)


def test_bits_are_paid_for_by_more_noise_on_updates() -> None:
    # Both together are one Gaussian mechanism: 1 / z^2 is shared between them.
    noise, bit = 1.0, 2.5
    beside = noise_beside_bits(noise, bit)
    assert beside**-2 + (0.5 / bit) ** 2 == pytest.approx(noise**-2)
    run = run_of(**ADAPTIVE)
    protection = protect(run, clients=50, cohort=50)
    found = (released(run, protection, summed()) - START) * 50 / 0.1
    assert np.std(found) == pytest.approx(noise_beside_bits(1.0, 2.5), rel=0.09)
    fixed = protect(run_of(**ADAPTIVE | {"clip_norm": 0.1}), clients=50, cohort=50)
    assert epsilon(run, protection, rounds=5) == epsilon(run, fixed, rounds=5)


def test_the_statement_says_what_is_counted_on() -> None:
    run = run_of(20, max_epsilon=3.0)
    protection = protect(run, clients=500, cohort=50)
    told = statement(run, protection, rounds=7)
    assert told.epsilon == epsilon(run, protection, rounds=7)
    assert (told.sample_rate, told.separation, told.clients) == (0.1, None, 500)
    assert (told.mechanism, told.rounds, told.adjacency) == ("gaussian", 7, "zero_out_client")
    assert told.noise_multiplier == protection.plan.noise_multiplier
    rest = statement(
        run_of(**MATRIX), replace(protection, plan=ClientPlan(90, 9, 5.0, 10)), rounds=7
    )
    assert (rest.sample_rate, rest.separation) == (1.0, 10)
