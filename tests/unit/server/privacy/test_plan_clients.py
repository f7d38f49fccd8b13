"""The plan of client-level privacy is what a run counts."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

import fedcore
from fedcore.config.run import RunConfig
from fedcore.errors import ConfigError, PrivacyError
from server.privacy.plan_clients import plan_clients
from server.privacy.plan_command import plan
from server.rounds.client_privacy.mechanism import epsilon, protect


def run_of(mechanism: str = "gaussian", **client: object) -> RunConfig:
    return RunConfig.model_validate(
        {
            "name": "run",
            "task": "t.py",
            "federation": {"rounds": 20, "cohort": 50},
            "privacy": {
                "unit": "client",
                "client": {"accountant": "rdp", "mechanism": mechanism, **client},
            },
        }
    )


def ask(*words: str) -> int:
    parser = argparse.ArgumentParser()
    plan.arguments(parser)
    return plan.run(parser.parse_args(words))


@pytest.mark.parametrize("mechanism", ["gaussian", "matrix"])
def test_it_is_what_the_rounds_would_spend(mechanism: str) -> None:
    run = run_of(mechanism)
    found = plan_clients(run, 500)
    protection = protect(run, clients=500, cohort=50)
    assert found.noise_multiplier == protection.plan.noise_multiplier
    assert [number for number, _ in found.epsilons] == [1, 5, 10, 20]
    for number, spent in found.epsilons:
        assert spent == epsilon(run, protection, rounds=number)
    assert found.lasts == 20
    assert (found.separation is None) == (mechanism == "gaussian")


def test_a_plan_is_one_call_with_a_runs_settings() -> None:
    sections = {"rounds": 20, "cohort": 50}, {"client": {"accountant": "rdp"}}
    found = fedcore.plan_client_privacy(500, federation=sections[0], privacy=sections[1])
    assert found == fedcore.plan_client_privacy(500, run_of()) == plan_clients(run_of(), 500)
    assert str(found).startswith("Client-level privacy of 500 clients, 50 a round")
    with pytest.raises(ConfigError, match="plan_example_privacy"):
        fedcore.plan_client_privacy(500, privacy={"unit": "example"})


def test_a_fixed_noise_shows_how_long_the_budget_lasts() -> None:
    run = run_of(noise_multiplier=0.7, max_epsilon=6.0)
    found = plan_clients(run, 500)
    protection = protect(run, clients=500, cohort=50)
    assert 1 <= found.lasts < 20
    assert epsilon(run, protection, rounds=found.lasts) <= 6.0
    assert epsilon(run, protection, rounds=found.lasts + 1) > 6.0


def test_the_command_takes_a_run_or_options(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.toml"
    path.write_text(
        'name = "run"\ntask = "t.py"\n[federation]\nrounds = 20\ncohort = 50\n'
        '[privacy]\nunit = "client"\n[privacy.client]\naccountant = "rdp"\n'
    )
    assert ask(str(path), "--clients", "500", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["unit"], told["clients"], told["cohort"], told["lasts"]) == ("client", 500, 50, 20)
    options = ("--rounds", "20", "--cohort", "50", "--accountant", "rdp")
    assert ask("--clients", "500", *options) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("Client-level privacy of 500 clients, 50 a round")
    assert f"noise_multiplier {told['noise_multiplier']:.4g}" in shown
    with pytest.raises(ConfigError, match="use --clients N"):
        ask(str(path), "--examples", "100")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--clients", "0"), "--clients = 0: expected 1 to"),
        (("--clients", "9", "--batch", "8"), "--batch: it does not apply to privacy of cl"),
        (("--clients", "9", "--plot", "a.png"), "--plot: it does not apply"),
        (("--clients", "9", "--epsilon", "-1"), "--epsilon = -1.0"),
        (
            ("--examples", "9", "--cohort", "3"),
            "--cohort: it does not apply to privacy of examples",
        ),
    ],
)
def test_what_plans_nothing_is_said_so(words: tuple[str, ...], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ask(*words)
    assert said in str(caught.value)


def test_a_run_that_protects_no_clients_is_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text('name = "run"\ntask = "t.py"\n')
    with pytest.raises(ConfigError, match=r"privacy\.unit = 'none' protects no clients"):
        ask(str(path), "--clients", "9")


def test_too_few_clients_for_a_delta_are_refused() -> None:
    with pytest.raises(PrivacyError, match="expected at most"):
        plan_clients(run_of(target_delta=0.01), 60)
