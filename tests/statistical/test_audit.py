"""The audit against training that is sound and training that is not, both the real function.

Seeds are fixed: no test here can flicker. `benchmarks.privacy_audit` runs five seeds and twenty
runs of each fault; here are a few of each, with fewer releases.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from benchmarks.privacy_audit import FAULTS, ONE_STEP, audit_once
from fedcore.privacy.accounting import Charge
from fedcore.privacy.planning import PrivatePlan
from fedcore.seeds import Simulated
from server.privacy.audit import USUAL_EFFORT, Effort, Statement, audit
from server.privacy.canaries import private_training

QUICK = Effort(canaries=USUAL_EFFORT.canaries, pilot=20, releases=60, one_run_canaries=300)


def test_one_step_is_audited_below_its_epsilon_and_within_a_factor_of_1_5() -> None:
    train = private_training(ONE_STEP.plan, Simulated(11))
    found = audit(train, ONE_STEP, seeds=[1, 2], effort=replace(USUAL_EFFORT, releases=200))
    assert not found.refuted
    exact = 4.3772  # of the Gaussian mechanism (Balle and Wang 2018, theorem 8)
    assert exact <= found.stated <= 1.01 * exact
    for seed in found.seeds:
        assert found.stated / 1.5 < seed.epsilon < found.stated
        assert 0 < seed.one_run < seed.repeated
        assert seed.measured_noise == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("number", [1, 2, 3])
def test_each_fault_is_caught(fault: str, number: int) -> None:
    assert audit_once(FAULTS[fault], ONE_STEP, number, QUICK).refuted


@pytest.mark.parametrize("number", range(1, 9))
def test_sound_training_is_not_refuted(number: int) -> None:
    assert not audit_once(private_training, ONE_STEP, number, QUICK).refuted


@pytest.mark.parametrize("noise", [0.5, 3.0])
def test_other_noise_is_neither_refuted_nor_far_from_its_epsilon(noise: float) -> None:
    statement = Statement("x", PrivatePlan(Charge(1, noise, 1.0, 1), 0.3), target_delta=1e-6)
    found = audit_once(private_training, statement, 5)
    assert found.stated / 1.5 < found.epsilon < found.stated


def test_steps_add_up() -> None:
    statement = Statement("x", PrivatePlan(Charge(1, 4.0, 1.0, 9), 1.0), target_delta=1e-5)
    found = audit_once(private_training, statement, 6, QUICK)
    one = Statement("x", PrivatePlan(Charge(1, 4.0, 1.0, 1), 1.0), target_delta=1e-5)
    assert one.epsilon < found.epsilon < found.stated


def test_an_example_twice_as_often_in_a_batch_as_stated_is_caught() -> None:
    stated = Statement("x", PrivatePlan(Charge(1, 0.8, 0.1, 1), 1.0), target_delta=1e-5)
    wrong = Charge(1, 0.8, 1.0, 1)

    def make(plan: PrivatePlan, randomness: Simulated) -> object:
        return private_training(PrivatePlan(wrong, plan.clip_norm), randomness)

    assert audit_once(make, stated, 7, QUICK).refuted  # type: ignore[arg-type]
    assert not audit_once(private_training, stated, 7, QUICK).refuted


def test_calls_of_the_audited_function_are_counted() -> None:
    train, seen = private_training(ONE_STEP.plan, Simulated(1)), []
    effort = Effort(canaries=8, pilot=4, releases=6, one_run_canaries=10)
    found = audit(train, ONE_STEP, seeds=[3, 4], effort=effort, done=seen.append)
    assert seen == list(range(1, 2 * effort.trainings + 1))
    assert np.isfinite(found.epsilon)


def test_many_steps_are_audited_with_fewer_releases() -> None:
    few = USUAL_EFFORT.within(50)
    assert few.trainings * 50 <= 4200
    assert USUAL_EFFORT.within(1) == USUAL_EFFORT
    assert 30 <= USUAL_EFFORT.within(100_000).releases < 40
