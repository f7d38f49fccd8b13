from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fedcore
from fedcore.config.run import ClientConfig, Privacy
from fedcore.errors import ConfigError, PrivacyError, ResourceError
from fedcore.privacy.accounting import Accountant, Charge, epsilon_of
from server.privacy.plan import MAX_ROUNDS, Question, answer
from server.privacy.plan_command import plan

MNIST = Question(
    examples=6000,
    participations=30,
    client=ClientConfig(batch_size=64),
    privacy=Privacy(max_epsilon=3.0, target_delta=1e-5),
)
ASKED = [
    *("--examples", "6000", "--batch", "64", "--rounds", "30", "--epsilon", "3"),
    *("--delta", "1e-5"),
]


def ask(*words: str) -> int:
    parser = argparse.ArgumentParser()
    plan.arguments(parser)
    return plan.run(parser.parse_args(words))


def test_the_plan_is_what_a_ledger_would_count() -> None:
    found = answer(MNIST)
    forecast = found.forecast
    assert forecast.noise_multiplier == pytest.approx(1.057, abs=0.002)
    assert (forecast.steps_per_round, forecast.steps) == (94, 2820)
    rounds = [Charge(n, forecast.noise_multiplier, 1 / 94, 94) for n in range(1, 31)]
    for number, epsilon in found.epsilons:
        counted = epsilon_of(rounds[:number], target_delta=1e-5, accountant="prv")
        assert epsilon == pytest.approx(counted, rel=1e-9)
    assert 2.98 < found.epsilons[-1][1] == forecast.epsilon <= 3.0
    assert [number for number, _ in found.epsilons] == list(range(1, 31))
    assert found.lasts == 30


def test_a_plan_is_one_call_with_a_runs_settings(tmp_path: Path) -> None:
    sections = {
        "client": {"batch_size": 64},
        "privacy": {"max_epsilon": 3.0},
        "federation": {"rounds": 30},
    }
    found = fedcore.plan_example_privacy(6000, **sections)
    assert found == answer(MNIST)
    assert "example-level" not in repr(found)
    assert str(found).startswith("Example-level privacy")
    run = fedcore.RunConfig(name="x", task="t.py", **sections)
    assert fedcore.plan_example_privacy(6000, run).forecast == found.forecast
    found.plot(tmp_path / "plan.svg")
    assert "<svg" in (tmp_path / "plan.svg").read_text()
    with pytest.raises(ConfigError, match="Did you mean"):
        fedcore.plan_example_privacy(6000, privacy={"max_epsilom": 3.0})
    with pytest.raises(ConfigError, match="plan_client_privacy"):
        fedcore.plan_example_privacy(6000, privacy={"unit": "client"})


def test_noise_is_stated_against_the_clipped_signal() -> None:
    forecast = answer(MNIST).forecast
    batch = 6000 / 94
    assert forecast.batch_size == pytest.approx(batch)
    assert forecast.step_noise == pytest.approx(forecast.noise_multiplier / batch)
    assert forecast.run_noise == pytest.approx(forecast.step_noise / math.sqrt(2820))


def test_more_data_helps_and_less_does_not() -> None:
    found = answer(MNIST)
    by_change = {each.change.split(" (")[0]: each.forecast for each in found.what_if}
    assert set(by_change) == {
        *("twice the examples", "half the examples", "twice the rounds", "half the rounds"),
        *("twice the batch", "half the batch"),
    }
    noise = {change: each.run_noise for change, each in by_change.items() if each}
    assert len(noise) == 6
    assert noise["twice the examples"] < found.forecast.run_noise < noise["half the examples"]
    assert noise["twice the batch"] < found.forecast.run_noise < noise["half the batch"]
    assert by_change["twice the rounds"].noise_multiplier > found.forecast.noise_multiplier  # type: ignore[union-attr]


def test_twice_the_examples_take_the_delta_that_they_need() -> None:
    (change,) = [each for each in answer(MNIST).what_if if each.change.startswith("twice the ex")]
    assert change.change == "twice the examples (delta 8.3e-06)"


def test_a_change_that_is_refused_says_why() -> None:
    """The most rounds that a noise of a million allows: twice as many are refused."""
    small = Privacy(max_epsilon=0.01, target_delta=1e-9)
    rounds = 4_000_000
    found = answer(Question(1, rounds, ClientConfig(batch_size=1), small))
    assert found.forecast.noise_multiplier < 1e6
    (refused,) = [each for each in found.what_if if each.change == "twice the rounds"]
    assert refused.forecast is None
    assert "with any noise multiplier up to 1e+06" in refused.refused
    (line,) = [row for row in str(found).splitlines() if row.startswith("twice the rounds")]
    assert "refused: privacy.max_epsilon = 0.01" in line


def test_the_share_of_delta_that_an_owner_allows_is_kept() -> None:
    privacy = Privacy(max_epsilon=3.0)
    with pytest.raises(PrivacyError, match=r"above 0\.1/20000"):
        answer(Question(20_000, 1, ClientConfig(batch_size=999), privacy))
    assert answer(Question(20_000, 1, ClientConfig(batch_size=999), privacy, max_delta_share=0.5))


def test_many_rounds_are_shown_at_some_points_and_the_last() -> None:
    found = answer(Question(60, 1001, ClientConfig(), Privacy(target_delta=1e-3)))
    rounds = [number for number, _ in found.epsilons]
    assert len(rounds) <= 42
    assert (rounds[0], rounds[-1]) == (1, 1001)


def test_a_given_noise_says_how_long_the_budget_lasts(capsys: pytest.CaptureFixture[str]) -> None:
    assert ask("--examples", "60", "--noise", "2", "--delta", "1e-3", "--rounds", "100") == 0
    printed = capsys.readouterr().out
    assert "(given, by prv)" in printed
    lasts = answer(
        Question(60, 100, ClientConfig(), Privacy(noise_multiplier=2.0, target_delta=1e-3))
    ).lasts
    assert f"budget lasts          {lasts} rounds; then the client declines" in printed


@settings(max_examples=25, deadline=None)
@given(
    examples=st.integers(1, 2000),
    batch_size=st.integers(1, 300),
    planned=st.integers(1, 60),
    noise=st.floats(0.3, 20),
    accountant=st.sampled_from(["prv", "rdp"]),
    budget=st.one_of(st.floats(0.01, 60), st.integers(1, 80)),
)
def test_the_budget_lasts_for_the_rounds_that_the_accountant_counts_within_it(
    examples: int,
    batch_size: int,
    planned: int,
    noise: float,
    accountant: Accountant,
    budget: float,
) -> None:
    """An integer stands for the epsilon after so many rounds, which is then exactly the budget."""
    client, delta = ClientConfig(batch_size=batch_size), 1e-5
    whole = Privacy(noise_multiplier=noise, target_delta=delta, accountant=accountant)
    step = answer(Question(examples, planned, client, whole)).forecast
    one = Charge(1, step.noise_multiplier, step.sample_rate, step.steps_per_round)

    def spent(rounds: int) -> float:
        charges = [replace(one, round=number) for number in range(rounds)]
        return epsilon_of(charges, target_delta=delta, accountant=accountant)

    limit = spent(budget) if isinstance(budget, int) else budget
    limit = min(1e6, max(0.01, limit))
    privacy = whole.model_copy(update={"max_epsilon": limit})
    lasts = answer(Question(examples, planned, client, privacy)).lasts
    assert lasts == MAX_ROUNDS or spent(lasts) <= limit < spent(lasts + 1)
    near = range(max(1, lasts - 30), min(lasts, MAX_ROUNDS - 30) + 30)
    within = [number for number in near if lasts < 10**4 and spent(number) <= limit]
    assert within == [number for number in near if lasts < 10**4 and number <= lasts]


def test_a_budget_that_lasts_for_all_that_is_looked_at_says_so_much() -> None:
    privacy = Privacy(noise_multiplier=1e6, target_delta=1e-6)
    assert answer(Question(10, 3, ClientConfig(), privacy)).lasts == MAX_ROUNDS


@pytest.mark.parametrize("accountant", ["prv", "rdp"])
@pytest.mark.parametrize("noise", ["auto", 0.1, 1e6])
@pytest.mark.parametrize(
    ("examples", "batch_size", "epochs", "rounds", "max_epsilon"),
    [
        (10**11, 1, 10**4, 10**6, 1e6),
        (10**11, 10**6, 10**4, 10**6, 0.01),
        (1, 1, 1, 10**6, 0.01),
        (10**6, 1, 10**4, 10**6, 1e6),
        (10**15, 1, 1, 1, 8.0),
    ],
)
def test_extremes_are_planned_or_refused_by_name(
    examples: int,
    batch_size: int,
    epochs: int,
    rounds: int,
    max_epsilon: float,
    noise: float | Literal["auto"],
    accountant: Accountant,
) -> None:
    privacy = Privacy(
        max_epsilon=max_epsilon,
        target_delta=1e-12,
        noise_multiplier=noise,
        accountant=accountant,
    )
    question = Question(
        examples, rounds, ClientConfig(batch_size=batch_size, epochs=epochs), privacy
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # numpy's, where a number runs out
        try:
            assert "epsilon" in str(answer(question))
        except PrivacyError as error:
            assert "Nothing was trained" in str(error)  # noqa: PT017 - either will do


def test_where_a_plan_is_drawn_is_made_and_looked_at_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--examples", "1", "--rounds", "1", "--delta", "1e-3", "--plot"]
    file = tmp_path / "new" / "deep" / "plan.png"
    assert ask(*words, str(file)) == 0
    file.write_bytes(b"old")
    assert ask(*words, str(file)) == 0
    assert file.read_bytes().startswith(b"\x89PNG")

    def work(_: object) -> None:
        raise AssertionError("it was planned")

    monkeypatch.setattr("server.privacy.plan.answer", work)
    for where, said in ((file.parent.with_suffix(".pdf"), "a folder"), (file / "x.png", "a file")):
        file.parent.with_suffix(".pdf").mkdir(exist_ok=True)
        with pytest.raises(ResourceError, match=said):
            ask(*words, str(where))


def test_the_table_holds_what_json_holds(capsys: pytest.CaptureFixture[str]) -> None:
    assert ask(*ASKED, "--json") == 0
    record = json.loads(capsys.readouterr().out)
    assert record["unit"] == "example"
    assert record["plan"]["noise_multiplier"] == pytest.approx(1.057, abs=0.002)
    assert len(record["epsilon_by_round"]) == 30
    assert ask(*ASKED) == 0
    printed = capsys.readouterr().out
    assert f"noise multiplier      {record['plan']['noise_multiplier']:.4f}" in printed
    for change in record["what_if"]:
        (line,) = [row for row in printed.splitlines() if row.startswith(change["change"])]
        assert f"{change['forecast']['noise_multiplier']:.4f}" in line
    assert "one example, or a null record in its place" in printed
    assert "at delta 1e-05 after 30 rounds" in printed


def test_a_run_file_gives_what_the_options_leave_open(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run.toml"
    run.write_text(
        'name = "x"\ntask = "t.py"\n[federation]\nrounds = 7\n[client]\nbatch_size = 10\n'
        '[privacy]\nunit = "example"\nmax_epsilon = 2.0\ntarget_delta = 1e-4\naccountant = "rdp"\n'
    )
    assert ask(str(run), "--examples", "100", "--json") == 0
    record = json.loads(capsys.readouterr().out)
    assert record["plan"]["participations"] == 7
    assert record["plan"]["steps_per_round"] == 10
    assert (record["max_epsilon"], record["target_delta"]) == (2.0, 1e-4)
    assert record["accountant"] == "rdp"
    assert ask(str(run), "--examples", "100", "--batch", "50", "--rounds", "3", "--json") == 0
    record = json.loads(capsys.readouterr().out)
    assert (record["plan"]["steps_per_round"], record["plan"]["participations"]) == (2, 3)


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        ([*ASKED, "--noise", "1e-160"], ConfigError, r"--noise = 1e-160: .*0\.1"),
        ([*ASKED, "--batch", "0"], ConfigError, "--batch = 0: .*greater than or equal to 1"),
        ([*ASKED, "--rounds", "0"], ConfigError, "--rounds = 0"),
        ([*ASKED, "--epsilon", "nan"], ConfigError, "--epsilon = nan"),
        ([*ASKED, "--delta", "0.2"], PrivacyError, "0.2 on a client of 6000 examples"),
        ([*ASKED, "--examples", "0"], ConfigError, "--examples = 0: expected at least 1"),
        ([*ASKED, "--examples", "-5"], ConfigError, "--examples = -5: expected at least 1"),
        ([*ASKED, "--plot", "plan.nosuch"], ConfigError, r"plan\.nosuch.*\.png"),
        ([*ASKED, "--plot", "/dev/null/plan.png"], ResourceError, "/dev/null is a file"),
        ([*ASKED, "--plot", "/proc/plan.png"], ResourceError, "cannot write into /proc"),
        ([*ASKED, "--examples", "1" + "0" * 400], PrivacyError, "more than 1e.15 examples"),
        (["/no/such/run.toml", "--examples", "5"], ConfigError, "/no/such/run.toml"),
    ],
)
def test_what_cannot_be_planned_is_a_typed_error(
    words: list[str], error: type[Exception], message: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=message):
        ask(*words)
    assert not list(tmp_path.iterdir())


def test_the_plan_is_drawn(tmp_path: Path) -> None:
    file = tmp_path / "plan.png"
    assert ask(*ASKED, "--plot", str(file)) == 0
    assert file.read_bytes().startswith(b"\x89PNG")
    svg = tmp_path / "plan.svg"
    assert ask("--examples", "1", "--rounds", "1", "--delta", "1e-3", "--plot", str(svg)) == 0
    assert "<svg" in svg.read_text()


def test_the_verb_is_listed_without_torch_or_matplotlib() -> None:
    script = (
        "import sys, server.privacy.plan_command\n"
        "sys.exit(bool({'torch', 'matplotlib', 'opacus'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
