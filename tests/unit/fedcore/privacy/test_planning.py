from __future__ import annotations

import contextlib
import time

import pytest

from fedcore.config.run import ClientConfig, Privacy
from fedcore.errors import PrivacyError
from fedcore.privacy.accounting import Charge, epsilon_of
from fedcore.privacy.planning import PrivatePlan, expected_batch_size, plan, plan_for
from fedcore.task.definition import Examples

PRIVACY = Privacy(unit="example", target_delta=1e-3)


@pytest.mark.parametrize(
    ("count", "batch_size", "epochs", "rate", "steps"),
    [(60, 15, 1, 1 / 4, 4), (61, 15, 2, 1 / 5, 10), (10, 32, 3, 1.0, 3), (1, 1, 1, 1.0, 1)],
)
def test_the_plan_has_as_many_steps_as_batches(
    count: int, batch_size: int, epochs: int, rate: float, steps: int
) -> None:
    settings = ClientConfig(batch_size=batch_size, epochs=epochs)
    fixed = PRIVACY.model_copy(update={"noise_multiplier": 1.5, "clip_norm": 0.7})
    planned = plan_for(count, settings, fixed, round=4, participations=10)
    assert planned == PrivatePlan(Charge(4, 1.5, rate, steps), 0.7)


def test_steps_replace_epochs_in_the_charge_too() -> None:
    asked = {"round": 1, "participations": 3}
    epochs = plan_for(60, ClientConfig(batch_size=15, epochs=2), PRIVACY, **asked)  # type: ignore[arg-type]
    steps = plan_for(60, ClientConfig(batch_size=15, steps=8), PRIVACY, **asked)  # type: ignore[arg-type]
    assert steps == epochs
    fewer = plan_for(60, ClientConfig(batch_size=15, steps=3), PRIVACY, **asked)  # type: ignore[arg-type]
    assert fewer.charge.steps == 3
    assert fewer.charge.noise_multiplier < epochs.charge.noise_multiplier


def test_a_plan_of_examples_is_that_of_their_number() -> None:
    examples: Examples = [(None, None)] * 40  # type: ignore[assignment, list-item]
    asked = {"round": 1, "participations": 5}
    planned = plan(examples, ClientConfig(batch_size=10), PRIVACY, **asked)  # type: ignore[arg-type]
    assert planned == plan_for(40, ClientConfig(batch_size=10), PRIVACY, **asked)  # type: ignore[arg-type]


@pytest.mark.parametrize("accountant", ["prv", "rdp"])
def test_automatic_noise_keeps_all_rounds_within_the_budget(accountant: str) -> None:
    privacy = PRIVACY.model_copy(update={"accountant": accountant})
    large, small = (
        plan_for(count, ClientConfig(batch_size=10), privacy, round=1, participations=20).charge
        for count in (80, 10)
    )
    for charge in (large, small):
        spent = epsilon_of([charge] * 20, target_delta=1e-3, accountant=privacy.accountant)
        assert 0.99 * privacy.max_epsilon < spent <= privacy.max_epsilon
    assert small.noise_multiplier > large.noise_multiplier
    fewer = plan_for(10, ClientConfig(batch_size=10), privacy, round=1, participations=2).charge
    assert fewer.noise_multiplier < small.noise_multiplier


def test_delta_is_at_most_a_tenth_of_one_over_the_examples() -> None:
    asked = {"round": 1, "participations": 1}
    plan_for(100, ClientConfig(), PRIVACY, **asked)  # type: ignore[arg-type]
    with pytest.raises(
        PrivacyError,
        match=r"target_delta = 0\.001 on a client of 101 examples is above 0\.1/101 = 0\.00099.*"
        "or raise max_delta_share in the owner's file",
    ):
        plan_for(101, ClientConfig(), PRIVACY, **asked)  # type: ignore[arg-type]
    plan_for(101, ClientConfig(), PRIVACY, max_delta_share=0.2, **asked)  # type: ignore[arg-type]
    with pytest.raises(PrivacyError, match=r"above 0\.01/100"):
        plan_for(100, ClientConfig(), PRIVACY, max_delta_share=0.01, **asked)  # type: ignore[arg-type]


@pytest.mark.parametrize("count", [0, -1])
def test_a_client_without_examples_is_refused(count: int) -> None:
    with pytest.raises(PrivacyError, match=f"has {count} examples"):
        plan_for(count, ClientConfig(), PRIVACY, round=1, participations=1)


def test_a_batch_is_never_divided_by_nothing() -> None:
    planned = plan_for(1, ClientConfig(), PRIVACY, round=1, participations=1)
    assert expected_batch_size(0, planned) == 1
    assert expected_batch_size(64, PrivatePlan(Charge(1, 1.0, 1 / 4, 4), 1.0)) == 16


def test_the_extremes_of_the_run_file_are_planned_or_refused_in_reasonable_time() -> None:
    for noise in ("auto", 0.1, 1e6):
        for delta in (1e-12, 1e-3):
            privacy = Privacy(
                max_epsilon=0.01, target_delta=delta, noise_multiplier=noise,  # type: ignore[arg-type]
                participations=1_000_000,
            )  # fmt: skip
            started = time.process_time()
            client = ClientConfig(epochs=10_000, batch_size=1_000_000)
            with contextlib.suppress(PrivacyError):
                planned = plan_for(50, client, privacy, round=1, participations=1_000_000)
                epsilon_of([planned.charge] * 3, target_delta=delta, accountant=privacy.accountant)
            assert time.process_time() - started < 5.0
