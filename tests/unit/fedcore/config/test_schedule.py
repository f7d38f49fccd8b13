"""Schedules: values round by round, bounds, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from fedcore.config.in_round import (
    changed_in_round,
    client_in_round,
    planned_epochs,
    privacy_in_round,
)
from fedcore.config.run import RunConfig
from fedcore.config.schedule import NO_SCHEDULE, Schedule
from fedcore.config.settings import load_run, with_settings
from fedcore.errors import ConfigError


def make_run(schedule: dict[str, Any], *, rounds: int = 10, **more: Any) -> RunConfig:
    client = {"schedule": schedule} | more.pop("client", {})
    values = {"name": "x", "task": "t.py", "federation": {"rounds": rounds}, "client": client}
    return RunConfig.model_validate(values | more)


def rates(schedule: Any, *, rounds: int = 10, upto: int | None = None) -> list[float]:
    run = make_run({"learning_rate": schedule}, rounds=rounds)
    return [client_in_round(run, n).learning_rate for n in range(1, (upto or rounds) + 1)]


def test_without_a_schedule_every_round_has_the_runs_settings() -> None:
    run = make_run({})
    assert client_in_round(run, 7) is run.client
    assert privacy_in_round(run, 7) is run.privacy
    assert (planned_epochs(run, 3), changed_in_round(run, 7)) == (None, {})


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.1, 0.1, 0.1, 0.1]),
        ((0.5, 0.2), [0.5, 0.2, 0.2, 0.2]),
        ({"kind": "step", "every": 2, "factor": 0.5}, [0.1, 0.1, 0.05, 0.05]),
        ({"kind": "step", "every": 1, "factor": 0.5, "warmup": 2}, [0.05, 0.1, 0.05, 0.025]),
        ({"warmup": 4}, [0.025, 0.05, 0.075, 0.1]),
        ("cosine", [0.1, 0.0853553, 0.05, 0.0146447]),
        ({"kind": "cosine", "end": 0.1}, [0.1, 0.1, 0.1, 0.1]),
        ({"kind": "cosine", "warmup": 2, "end": 0.02}, [0.05, 0.1, 0.08, 0.04]),
    ],
)
def test_the_values_are_the_fields_usual_ones(schedule: Any, expected: list[float]) -> None:
    assert rates(schedule, rounds=4) == pytest.approx(expected, rel=1e-5)


def test_rounds_after_the_last_have_its_value() -> None:
    assert rates("cosine", rounds=3, upto=6)[2:] == [rates("cosine", rounds=3)[-1]] * 4


def test_epochs_are_whole_and_at_least_one() -> None:
    run = make_run({"epochs": "cosine"}, client={"epochs": 5})
    each = [client_in_round(run, n).epochs for n in range(1, 11)]
    assert each[0] == 5
    assert each[-1] == 1
    assert all(type(one) is int for one in each)
    assert sorted(each, reverse=True) == each


def test_the_clip_norm_is_that_of_batches_or_under_privacy_that_of_examples() -> None:
    plain = make_run({"clip_norm": [2.0, 1.0]}, client={"max_grad_norm": 3.0})
    assert [client_in_round(plain, n).max_grad_norm for n in (1, 2)] == [2.0, 1.0]
    assert privacy_in_round(plain, 2) is plain.privacy
    private = make_run({"clip_norm": [2.0, 1.0]}, privacy={"unit": "example"})
    assert [privacy_in_round(private, n).clip_norm for n in (1, 2)] == [2.0, 1.0]
    assert client_in_round(private, 2).max_grad_norm is None
    assert changed_in_round(plain, 2) == changed_in_round(private, 2) == {"clip_norm": 1.0}


def test_noise_is_planned_for_the_rounds_with_the_most_epochs() -> None:
    run = make_run({"epochs": [1, 5, 2]}, rounds=4)
    assert [planned_epochs(run, n) for n in (1, 2, 4)] == [5, 7, 10]


def test_a_run_survives_being_sent() -> None:
    run = make_run({"learning_rate": (0.5, 0.2), "epochs": {"kind": "cosine", "end": 2}})
    assert RunConfig.model_validate_json(run.model_dump_json()) == run
    assert client_in_round(run, 3).schedule == NO_SCHEDULE
    assert hash(client_in_round(run, 3))  # clients with equal settings train together


@pytest.mark.parametrize(
    ("schedule", "said"),
    [
        ({"learning_rate": {"kind": "step", "every": 2}}, "'step' needs every and factor"),
        ({"learning_rate": "list"}, "'list' needs values"),
        ({"learning_rate": {"end": 0.5}}, "end belongs to kind 'cosine', and this one is"),
        ({"learning_rate": {"kind": "cosine", "every": 2}}, "every belongs to kind 'step'"),
        ({"learning_rate": {"kind": "list", "values": (1,), "warmup": 1}}, "has no warmup"),
        (
            {"learning_rate": (0.1, 0)},
            "learning_rate gives 0 in round 2 of 10, expected greater than or equal to 0.0000",
        ),
        ({"learning_rate": {"kind": "step", "every": 1, "factor": 1e6}}, "in round 10 of 10"),
        ({"epochs": (1, 20_000)}, "gives 20000 in round 2 of 10, expected less than or equal to"),
        ({"clip_norm": "cosine"}, "client.schedule.clip_norm needs client.max_grad_norm"),
    ],
)
def test_what_no_round_could_use_is_refused_before_the_first(
    schedule: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValidationError) as caught:
        make_run(schedule)
    assert said in str(caught.value)


def test_a_schedule_of_epochs_contradicts_steps() -> None:
    with pytest.raises(ValidationError, match=r"contradicts client.steps = 5"):
        make_run({"epochs": [2, 1]}, client={"steps": 5})


def test_a_file_an_override_and_python_say_the_same(tmp_path: Path) -> None:
    path, head = tmp_path / "run.toml", 'name = "x"\ntask = "t.py"\n'
    path.write_text(head + '[client.schedule]\nlearning_rate = "cosine"\nepochs = [3, 1]\n')
    from_file = load_run(path)
    path.write_text(head)
    asked = ["client.schedule.learning_rate=cosine", "client.schedule.epochs=[3, 1]"]
    assert load_run(path, asked) == from_file
    schedule = {"learning_rate": {"kind": "cosine"}, "epochs": [3, 1]}
    assert with_settings(load_run(path), {"client": {"schedule": schedule}}) == from_file
    with pytest.raises(ConfigError, match=r"client.schedule.learning_rate.kind = 'cosin': it shou"):
        load_run(path, ["client.schedule.learning_rate.kind=cosin"])
    with pytest.raises(ConfigError, match=r"unknown key 'client.schedule.momentum'"):
        load_run(path, ["client.schedule.momentum=cosine"])


@given(
    kind=st.sampled_from(["constant", "cosine", "step"]),
    warmup=st.integers(0, 30),
    rounds=st.integers(1, 30),
    end=st.floats(0, 10),
    base=st.floats(0.01, 10),
)
def test_every_value_lies_between_those_of_the_extremes(
    kind: Any, warmup: int, rounds: int, end: float, base: float
) -> None:
    more: dict[str, Any] = {"cosine": {"end": end}, "step": {"every": 3, "factor": 0.7}}
    schedule = Schedule(kind=kind, warmup=warmup, **more.get(kind, {}))
    assert not schedule.problem
    bounds = [schedule.value(base, n, rounds) for n in schedule.extremes(rounds)]
    for number in range(1, rounds + 3):
        value = schedule.value(base, number, rounds)
        assert min(bounds) * (1 - 1e-9) <= value <= max(bounds) * (1 + 1e-9)
