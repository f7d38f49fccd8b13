"""Settings that a server sends with a round: used, bounded, and charged for."""

from __future__ import annotations

from typing import Any

import pytest
from flwr.app import Message

from fedcore.config.client_settings import ClientSettings, settings_with
from fedcore.config.owner import OwnerPolicy
from fedcore.config.run import ClientConfig, RunConfig
from fedcore.errors import InvalidUpdate
from fedcore.flower.identity import assume_identity
from fedcore.privacy.ledger import Ledger, read_ledger
from fedcore.task.definition import Task
from fedcore.updates.messages import REFUSED
from tests.unit.fedcore.clients import (
    COUNT,
    PRIVATE,
    app_of,
    context,
    instruct,
    make_run,
    make_task,
    update_of,
)


@pytest.fixture(autouse=True)
def _identity() -> None:
    assume_identity(1)


def asking(task: Task, run: RunConfig, **settings: Any) -> Message:
    """An instruction with settings of the round."""
    message = instruct(task, run)
    for name, value in settings.items():
        message.content.config_records["config"][name.replace("_", "-")] = value
    return message


def test_settings_of_a_round_are_those_that_a_client_trains_with() -> None:
    task = make_task()
    asked = {"epochs": 3, "batch_size": 7, "learning_rate": 0.03, "momentum": 0.5}
    asked |= {"steps": 4, "max_grad_norm": 0.5}
    as_asked = make_run(client={**asked, "weight_decay": 0.01})
    expected = update_of(
        app_of(task, as_asked)(instruct(task, as_asked), context()), task, as_asked
    )
    run = make_run()
    message = asking(task, run, **asked, weight_decay=0.01)
    found = update_of(app_of(task, run)(message, context()), task, run)
    assert found.weights.tobytes() == expected.weights.tobytes()


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (
            {"epochs": 0},
            "epochs = 0, expected greater than or equal to 1",
        ),
        ({"epochs": 10**9}, "epochs = 1000000000, expected less than or equal to 10000"),
        ({"batch_size": "8"}, "batch_size = '8', expected a valid integer"),
        ({"learning_rate": float("nan")}, "learning_rate = nan, expected a finite number"),
        ({"momentum": 1.0}, "momentum = 1.0, expected less than 1"),
        ({"steps": 0}, "steps = 0, expected greater than or equal to 1"),
        ({"max_grad_norm": -1.0}, "max_grad_norm = -1.0, expected greater than or equal to"),
    ],
)
def test_settings_out_of_bounds_are_refused(asked: dict[str, Any], said: str) -> None:
    task, run = make_task(), make_run()
    reply = app_of(task, run)(asking(task, run, **asked), context())
    assert reply.error.code == REFUSED + InvalidUpdate.exit_code
    assert (
        f"round 1: {'invalid settings from the server: ' * (not said.startswith('the'))}{said}"
        in str(reply.error.reason)
    )
    assert "Nothing was trained or charged" in str(reply.error.reason)


def test_an_owners_limit_counts_the_steps_that_are_really_asked_for() -> None:
    task, run = make_task(), make_run(client={"batch_size": COUNT})
    app = app_of(task, run, OwnerPolicy(max_round_steps=2))
    assert not app(asking(task, run, epochs=2), context()).has_error()
    reply = app(asking(task, run, epochs=3), context())
    assert "the server asks for 3 steps in this round" in str(reply.error.reason)


def test_epochs_that_a_server_sends_replace_the_runs_steps() -> None:
    run, asked = ClientConfig(steps=5), ClientSettings(epochs=3)
    assert settings_with(run, asked, private=False) == ClientConfig(epochs=3)
    with pytest.raises(ValueError, match="nesterov = true needs client"):
        settings_with(
            ClientConfig(momentum=0.9, nesterov=True), ClientSettings(momentum=0.0), private=False
        )


def test_under_privacy_a_server_cannot_bound_gradients_of_batches() -> None:
    with pytest.raises(ValueError, match="contradicts example-level privacy"):
        settings_with(ClientConfig(), ClientSettings(max_grad_norm=1.0), private=True)
    kept = settings_with(ClientConfig(steps=5), ClientSettings(epochs=1), private=True)
    assert kept.steps == 5  # what was charged for


@pytest.mark.parametrize("asked", [{"epochs": 2}, {"batch_size": 5}, {"steps": 1}])
def test_under_privacy_nothing_that_is_charged_for_changes(asked: dict[str, Any]) -> None:
    task, run, where = make_task(), make_run(privacy=PRIVATE), context()
    reply = app_of(task, run)(asking(task, run, **asked), where)
    assert reply.error.code == REFUSED + InvalidUpdate.exit_code
    assert "the noise and the privacy spent in every round depend on it" in str(reply.error.reason)
    assert read_ledger(where) == Ledger()
    plain, other = context(), context()
    message = asking(task, run, learning_rate=0.01, epochs=run.client.epochs)
    one, two = app_of(task, run)(instruct(task, run), plain), app_of(task, run)(message, other)
    assert read_ledger(plain) == read_ledger(other) != Ledger()
    assert (
        update_of(one, task, run).weights.tobytes() != update_of(two, task, run).weights.tobytes()
    )


def test_a_client_trains_with_the_schedules_value_and_what_a_server_sends_wins() -> None:
    task = make_task()
    run = make_run(client={"schedule": {"learning_rate": [0.03, 0.5], "epochs": [3, 1]}})
    plain = make_run(client={"learning_rate": 0.03, "epochs": 3})
    found = update_of(app_of(task, run)(instruct(task, run), context()), task, run)
    same = update_of(app_of(task, plain)(instruct(task, plain), context()), task, plain)
    assert found.weights.tobytes() == same.weights.tobytes()
    message = asking(task, run, learning_rate=0.2)
    sent = update_of(app_of(task, run)(message, context()), task, run)
    other = make_run(client={"learning_rate": 0.2, "epochs": 3})
    expected = update_of(app_of(task, other)(instruct(task, other), context()), task, other)
    assert sent.weights.tobytes() == expected.weights.tobytes()


def test_under_privacy_scheduled_epochs_are_charged_and_a_clip_norm_costs_nothing() -> None:
    def ledger(**settings: Any) -> Ledger:
        run, where = make_run(privacy=PRIVATE, **settings), context()
        assert not app_of(make_task(), run)(instruct(make_task(), run), where).has_error()
        return read_ledger(where)

    usual = ledger(client={"batch_size": 10})
    clipped = ledger(client={"batch_size": 10, "schedule": {"clip_norm": [0.3, 0.1]}})
    assert clipped == usual
    (rated,) = ledger(client={"batch_size": 10, "schedule": {"learning_rate": "cosine"}}).charges
    assert (rated,) == usual.charges
    (more,) = ledger(client={"batch_size": 10, "schedule": {"epochs": [3, 1]}}).charges
    assert more.steps == 3 * rated.steps
    assert more.noise_multiplier > rated.noise_multiplier  # planned for what all rounds train


def test_scheduled_epochs_spend_the_budget_and_no_more() -> None:
    federation = {"rounds": 4}
    client = {"batch_size": 10, "schedule": {"epochs": [1, 4, 2, 1]}}
    run = make_run(privacy=PRIVATE, federation=federation, client=client)
    task, where = make_task(), context()
    app = app_of(task, run)
    for number in range(1, 5):
        assert not app(instruct(task, run, number=number), where).has_error()
    ledger = read_ledger(where)
    assert [each.steps for each in ledger.charges] == [4, 16, 8, 4]
    assert len({each.noise_multiplier for each in ledger.charges}) == 1
    assert 0.99 * run.privacy.max_epsilon < ledger.epsilon(run.privacy) <= run.privacy.max_epsilon
