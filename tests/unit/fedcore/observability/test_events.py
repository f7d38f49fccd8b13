from __future__ import annotations

import json
import math

import pytest

from fedcore.observability.events import (
    Event,
    Noted,
    RoundFinished,
    StageAdvanced,
    StageFinished,
    StageStarted,
    TrainingAdvanced,
    batched,
    json_line,
    tee,
)


@pytest.mark.parametrize(
    ("event", "expected"),
    [
        (StageStarted("data", None), {"event": "stage_started", "stage": "data", "steps": None}),
        (
            StageAdvanced("data", 2, "two\nlines"),
            {"event": "stage_advanced", "stage": "data", "done": 2, "note": "two\nlines"},
        ),
        (
            StageFinished("data", 0.5, ""),
            {"event": "stage_finished", "stage": "data", "seconds": 0.5, "note": ""},
        ),
        (
            RoundFinished({"round": 1, "metrics": {"accuracy": 0.5}}),
            {"event": "round_finished", "round": 1, "metrics": {"accuracy": 0.5}},
        ),
        (
            TrainingAdvanced("finetuned", 3, 9, 0.5, 0.1, 80.0, None, 1000, 2.5),
            {
                "event": "training_advanced",
                "model": "finetuned",
                "done": 3,
                "steps": 9,
                "loss": 0.5,
                "learning_rate": 0.1,
                "examples_per_s": 80.0,
                "tokens_per_s": None,
                "memory_bytes": 1000,
                "remaining_s": 2.5,
            },
        ),
        (Noted('"quoted"'), {"event": "noted", "text": '"quoted"'}),
    ],
)
def test_an_event_is_one_line_of_json(event: Event, expected: dict[str, object]) -> None:
    line = json_line(event)
    assert "\n" not in line
    assert json.loads(line) == expected


def test_what_json_cannot_say_becomes_null() -> None:
    line = json_line(RoundFinished({"train_loss": math.nan, "metrics": {"rmse": math.inf}}))
    assert json.loads(line) == {
        "event": "round_finished",
        "train_loss": None,
        "metrics": {"rmse": None},
    }


def test_tee_hands_each_event_to_every_sink_in_order() -> None:
    seen: list[tuple[str, Event]] = []
    sink = tee(lambda event: seen.append(("a", event)), lambda event: seen.append(("b", event)))
    sink(Noted("one"))
    sink(Noted("two"))
    assert seen == [(name, Noted(text)) for text in ("one", "two") for name in "ab"]


def test_short_rounds_are_handed_on_together_and_anything_else_at_once() -> None:
    seen: list[Event] = []
    now = [0.0]
    short = [RoundFinished({"round": n, "seconds": 0.001}) for n in range(4)]
    long, note = RoundFinished({"round": 9, "seconds": 1.0}), Noted("something")
    with batched(seen.append, clock=lambda: now[0]) as sink:
        sink(short[0])
        sink(short[1])
        assert seen == []
        now[0] = 0.2
        sink(short[2])
        assert seen == short[:3]
        sink(short[3])
        sink(note)
        assert seen == [*short, note]
        sink(long)
        assert seen == [*short, note, long]
        sink(short[0])
    assert seen == [*short, note, long, short[0]]


def test_what_waits_is_handed_on_when_the_run_fails() -> None:
    seen: list[Event] = []
    event = RoundFinished({"round": 1, "seconds": 0.001})
    with batched(seen.append) as sink:
        sink(event)
        with pytest.raises(KeyError):
            _ = {}["a run that fails"]
        assert seen == []
    assert seen == [event]


@pytest.mark.parametrize(
    "event",
    [
        Noted("\u6771" * 2000),
        Noted("\x1b" * 100_000),
        StageAdvanced("\ud800" * 5000, 2, "y" * 5000),
        RoundFinished({"round": 1, "metrics": {f"{n}" * 50: 1 / 3 for n in range(1000)}}),
        RoundFinished({"round": 1, "metrics": {"m" * 9000: 1.0}}),
    ],
)
def test_no_line_is_longer_than_two_kilobytes(event: Event) -> None:
    line = json_line(event)
    assert len(line) <= 1900
    told = json.loads(line)
    assert told["event"]
    assert "... (cut)" in line or told["left_out"] == "metrics, for the length of this line"


def test_of_what_is_long_much_is_kept() -> None:
    assert len(json.loads(json_line(Noted("x" * 4000)))["text"]) > 900
    metrics = {f"metric {number}": 1 / 3 for number in range(100)}
    told = json.loads(json_line(RoundFinished({"round": 1, "metrics": metrics})))
    assert list(told["metrics"]) == list(metrics)[:50]
