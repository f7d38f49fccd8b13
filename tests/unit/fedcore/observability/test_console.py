from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import StringIO

import pytest
from rich.console import Console

from fedcore.observability import console
from fedcore.observability.events import (
    Noted,
    RoundFinished,
    StageAdvanced,
    StageFinished,
    StageStarted,
    TrainingAdvanced,
)

Round = Callable[[int], RoundFinished]
SHOW_CURSOR = "\x1b[?25h"
HIDE_CURSOR = "\x1b[?25l"


class Terminal(StringIO):
    def isatty(self) -> bool:
        return True


def test_plain_writes_one_line_an_event(finished_round: Round) -> None:
    stream = StringIO()
    with console.plain(stream) as sink:
        sink(StageStarted("rounds", 5))
        sink(finished_round(2))
        sink(StageAdvanced("export", 1, "fp32"))
        sink(StageFinished("rounds", 12.3, "best round 2"))
        sink(Noted("two\nlines \x1b[31m"))
        sink(StageStarted("data", None))
        sink(StageFinished("data", 0.04, ""))
    assert stream.getvalue().splitlines() == [
        "[rounds] started, 5 steps",
        "round 2/5: accuracy 0.7000, epsilon 2.47, clients 19/20, time 0.25 s",
        "[export] step 1: fp32",
        "[rounds] done in 12.3 s: best round 2",
        "note: two lines \\x1b[31m",
        "[data] started",
        "[data] done in 0.04 s",
    ]


PACE = {"clients_per_s": 1234.5, "remaining_s": 754.0, "memory_bytes": 412_000_000}
VIRTUAL: dict[str, float] = {"simulated_s": 90.0, "stragglers": 3, "dropped": 1, "unavailable": 2}


def test_the_pace_and_the_virtual_clock_are_shown_where_they_are_known(
    finished_round: Round,
) -> None:
    event = RoundFinished({**finished_round(2).values, "virtual": VIRTUAL, **PACE})
    stream = StringIO()
    with console.plain(stream) as sink:
        sink(event)
    assert stream.getvalue() == (
        "round 2/5: accuracy 0.7000, epsilon 2.47, clients 19/20, time 0.25 s, on devices 90.0 s, "
        "late 3, lost 1, away 2, 1234 clients/s, 412 MB, 12 min 34 s left\n"
    )
    shown = StringIO()
    with live(shown) as sink:
        sink(StageStarted("federate", 5))
        sink(event)
    last = shown.getvalue().rsplit("round  accuracy", 1)[1].splitlines()
    assert last[0].split()[-5:] == ["on", "devices", "late", "lost", "away"]
    assert last[1].split()[-5:] == ["90.0", "s", "3", "1", "2"]
    assert "1234 clients/s, 412 MB, 12 min 34 s left" in shown.getvalue()


def test_json_is_one_object_a_line(finished_round: Round) -> None:
    stream = StringIO()
    with console.as_json(stream) as sink:
        sink(StageStarted("rounds", 5))
        sink(finished_round(1))
    first, second = (json.loads(line) for line in stream.getvalue().splitlines())
    assert first == {"event": "stage_started", "stage": "rounds", "steps": 5}
    assert second["metrics"] == {"accuracy": 0.6, "top3": 0.9}
    assert second["epsilon_max"] == 1.234


@contextmanager
def live(stream: StringIO, *, width: int = 80) -> Iterator[console.Sink]:
    terminal = Console(file=stream, force_terminal=True, width=width, height=40, color_system=None)
    with console.live(terminal) as sink:
        yield sink


def test_live_shows_stage_rounds_and_time_remaining(finished_round: Round) -> None:
    stream = StringIO()
    with live(stream) as sink:
        sink(StageStarted("rounds", 5))
        for number in range(1, 4):
            sink(finished_round(number))
    # The display is drawn once more when it is taken down.
    last = stream.getvalue().rsplit("round  accuracy", 1)[1].splitlines()
    assert last[0].split() == ["epsilon", "clients", "loss", "time"]
    assert [line.split()[0] for line in last[1:4]] == ["1/5", "2/5", "3/5"]
    assert last[3].split() == ["3/5", "0.8000", "3.71", "19/20", "-", "0.25", "s"]
    assert "rounds" in last[4]
    assert "3/5" in last[4]
    assert "left" in last[4]


def test_live_keeps_only_the_last_rounds(finished_round: Round) -> None:
    stream = StringIO()
    with live(stream) as sink:
        for number in range(1, 13):
            sink(finished_round(number))
    last = stream.getvalue().rsplit("round  accuracy", 1)[1]
    shown = [line.split()[0] for line in last.splitlines()[1:9]]
    assert shown == [f"{number}/5" for number in range(5, 13)]


def test_live_prints_finished_stages_and_notes_above() -> None:
    stream = StringIO()
    with live(stream) as sink:
        sink(StageStarted("[bold]export", None))
        sink(StageAdvanced("[bold]export", 1, "a note [red] " * 30))
        sink(Noted("noise is simulated [green]"))
        sink(StageFinished("[bold]export", 2.0, ""))
    shown = stream.getvalue()
    assert "note: noise is simulated [green]" in shown
    assert "[[bold]export] done in 2.0 s" in shown
    assert "a note [red]" in shown


def test_live_shows_at_most_one_stage() -> None:
    stream = StringIO()
    with live(stream) as sink:
        sink(StageStarted("first", 2))
        sink(StageStarted("second", 2))
    last = stream.getvalue().rsplit("\x1b[2K", 1)[1]
    assert "second" in last
    assert "first" not in last


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_live_gives_the_cursor_back_whatever_happens(error: type[BaseException]) -> None:
    stream = StringIO()

    def run() -> None:
        with live(stream) as sink:
            sink(StageStarted("rounds", 5))
            raise error

    with pytest.raises(error):
        run()
    assert stream.getvalue().index(HIDE_CURSOR) < stream.getvalue().rindex(SHOW_CURSOR)


def test_choose_follows_the_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")

    def written(stream: StringIO, *, as_json: bool) -> str:
        with console.choose(stream, json=as_json) as sink:
            sink(Noted("hello"))
        return stream.getvalue()

    assert written(StringIO(), as_json=False) == "note: hello\n"
    assert json.loads(written(Terminal(), as_json=True))["text"] == "hello"
    assert HIDE_CURSOR in written(Terminal(), as_json=False)
    monkeypatch.setenv("TERM", "dumb")
    assert written(Terminal(), as_json=False) == "note: hello\n"


def test_choose_without_rich_writes_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setattr(console, "find_spec", lambda name: None)
    stream = Terminal()
    with console.choose(stream, json=False) as sink:
        sink(Noted("hello"))
    assert stream.getvalue() == "note: hello\n"


def test_no_color_is_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("NO_COLOR", "1")
    stream = Terminal()
    with console.choose(stream, json=False) as sink:
        sink(Noted("hello"))
    assert "\x1b[33m" not in stream.getvalue()
    monkeypatch.delenv("NO_COLOR")
    coloured = Terminal()
    with console.choose(coloured, json=False) as sink:
        sink(Noted("hello"))
    assert "\x1b[33m" in coloured.getvalue()


def test_importing_the_sinks_loads_neither_torch_nor_rich() -> None:
    code = (
        "import sys, fedcore.observability.console, fedcore.observability.jsonl; "
        "print(sorted({'torch', 'rich', 'flwr'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("told", "shown"),
    [
        ({}, "epsilon 1.24"),
        ({"client_epsilon": 3.2}, "epsilon 1.24 (examples), 3.20 (clients)"),
        ({"client_epsilon": 3.2, "epsilon_max": None}, "epsilon 3.20 (clients)"),
        ({"epsilon_max": None}, ""),
    ],
    ids=["examples", "both", "clients", "neither"],
)
def test_epsilon_names_whose_it_is(
    finished_round: Round, told: dict[str, float | None], shown: str
) -> None:
    stream = StringIO()
    with console.plain(stream) as sink:
        sink(RoundFinished({**finished_round(1).values, **told}))
    said = stream.getvalue()
    assert ("epsilon" in said) == bool(shown)
    assert not shown or f", {shown}, clients 19/20" in said


def test_a_mean_of_clients_is_called_one_and_an_undefined_metric_undefined(
    finished_round: Round,
) -> None:
    values = finished_round(2).values
    source = {"clients": 7, "asked": 10, "undefined": 3, "averaged": True, "reason": "one class"}
    stream = StringIO()
    with console.plain(stream) as sink:
        sink(RoundFinished({**values, "sources": {"accuracy": source}}))
        sink(RoundFinished({**values, "metrics": {"auc": None, "accuracy": 0.5}}))
    one, other = stream.getvalue().splitlines()
    assert one.startswith("round 2/5: accuracy, mean of clients 0.7000, ")
    assert other.startswith("round 2/5: auc undefined, ")


def training(done: int, model: str = "finetuned") -> TrainingAdvanced:
    return TrainingAdvanced(model, done, 1200, 0.4321, 0.05, 8_000.0, None, 412_000_000, 754.0)


TRAINED = "loss 0.4321, learning rate 0.05, 8000 examples/s, 412 MB, 12 min 34 s left"


def test_plain_writes_a_line_of_a_training_every_ten_seconds_and_the_last_one() -> None:
    stream, now = StringIO(), 0.0
    with console.plain(stream, clock=lambda: now) as sink:
        for done in range(1, 31):
            now += 0.5
            sink(training(done))
        sink(training(1200))
        sink(training(1, "cloud_alone"))  # short: nothing is said
        sink(training(1200, "cloud_alone"))
    assert stream.getvalue().splitlines() == [
        f"fine-tuning: step {done} of 1,200, {TRAINED}" for done in ("5", "25", "1,200")
    ]


def test_live_shows_a_training_within_its_stage() -> None:
    stream = StringIO()
    with live(stream, width=120) as sink:
        sink(StageStarted("federate", 5))
        sink(training(300, "round 5"))
    last = stream.getvalue().rsplit("federate", 1)[1]
    assert "fine-tuning after round 5" in last
    assert "300/1200" in last
    assert TRAINED in last
    with live(stream, width=120) as sink:
        sink(StageStarted("finetune", None))
        sink(training(300))
        sink(training(1, "cloud_alone"))
        sink(StageStarted("compress", None))
    last = stream.getvalue().rsplit("\x1b[2K", 1)[1]
    assert "compress" in last
    assert "1200" not in last


def test_tokens_are_shown_in_place_of_examples() -> None:
    text = console.training_text(TrainingAdvanced("x", 1, 2, None, 1.0, 8.0, 512.0, None, 3.0))
    assert text == (
        "fine-tuning after x: step 1 of 2, loss -, learning rate 1, 512 tokens/s, 3.0 s left"
    )
