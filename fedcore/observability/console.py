"""Events on a terminal, through a pipe, or for a machine: one sink for each."""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING, TextIO, assert_never

from fedcore.observability.events import (
    Event,
    Noted,
    RoundFinished,
    Sink,
    StageAdvanced,
    StageFinished,
    StageStarted,
    Value,
    json_line,
)
from fedcore.observability.foreign import bounded_line, foreign
from fedcore.observability.words import (
    NOTHING,
    bytes_text,
    counted,
    epsilon_text,
    figure,
    seconds_text,
)

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_ROWS = 8  # rounds in the live table: the screen keeps room for what was printed before
_ON_DEVICES: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("on devices", "simulated_s", seconds_text),
    ("late", "stragglers", lambda count: f"{count:.0f}"),
    ("lost", "dropped", lambda count: f"{count:.0f}"),
    ("away", "unavailable", lambda count: f"{count:.0f}"),
)
"""Headings of what a virtual clock says, its names, and how they are written."""
_Cells = tuple[tuple[str, str], ...]


def choose(stream: TextIO, *, json: bool) -> AbstractContextManager[Sink]:
    """The sink that suits ``stream``: JSON when asked for, live on a terminal, else plain lines."""
    if json:
        return as_json(stream)
    capable = os.environ.get("TERM") != "dumb" and find_spec("rich") is not None
    if stream.isatty() and capable:
        from rich.console import Console

        return live(Console(file=stream))
    return plain(stream)


@contextmanager
def as_json(stream: TextIO) -> Iterator[Sink]:
    """A sink that writes each event as one JSON object a line."""
    yield _lines(stream, json_line)


@contextmanager
def plain(stream: TextIO) -> Iterator[Sink]:
    """A sink that writes each event as one line of text."""
    yield _lines(stream, _sentence)


def _lines(stream: TextIO, text: Callable[[Event], str]) -> Sink:
    """A line an event, until nobody reads any more: the run goes on, for its results are files."""
    read = True

    def sink(event: Event) -> None:
        nonlocal read
        if read:
            try:
                print(text(event), file=stream, flush=True)
            except BrokenPipeError:
                read = False

    return sink


def _sentence(event: Event) -> str:
    match event:
        case StageStarted(stage, steps):
            text = f"[{stage}] started" + (f", {counted(steps, 'step')}" if steps else "")
        case StageAdvanced(stage, done, note):
            text = f"[{stage}] step {done}" + (f": {note}" if note else "")
        case StageFinished(stage, seconds, note):
            text = f"[{stage}] done in {seconds_text(seconds)}" + (f": {note}" if note else "")
        case RoundFinished(values):
            (_, number), *cells = _round_cells(values)
            text = f"round {number}: " + ", ".join(
                f"{name} {cell}" for name, cell in cells if cell != NOTHING
            )
            text += "".join(f", {part}" for part in _pace(values))
        case Noted(note):
            text = f"note: {note}"
        case _:
            assert_never(event)
    return bounded_line(text)


def _round_cells(values: Mapping[str, Value]) -> _Cells:
    """What a row on a round shows: pairs of heading and text, the round's number first."""
    metrics = values.get("metrics")
    first = next(iter(metrics.items()), None) if isinstance(metrics, dict) else None
    name, metric = first or ("metric", None)
    virtual = values.get("virtual")
    on_devices = virtual if isinstance(virtual, dict) else {}
    return (
        ("round", f"{values.get('round')}/{values.get('rounds')}"),
        (name, figure(metric)),
        ("epsilon", _epsilon(values)),
        ("clients", f"{values.get('updates')}/{values.get('cohort')}"),
        ("loss", figure(_number(values, "train_loss"))),
        ("time", seconds_text(_number(values, "seconds"))),
        *(
            (heading, text(on_devices[name]))
            for heading, name, text in _ON_DEVICES
            if name in on_devices
        ),
    )


def _epsilon(values: Mapping[str, Value]) -> str:
    """The most that was spent, with whose it is, but where examples alone are protected."""
    of_examples, of_clients = _number(values, "epsilon_max"), _number(values, "client_epsilon")
    if of_clients is None:
        return epsilon_text(of_examples)
    both = ((of_examples, "examples"), (of_clients, "clients"))
    return ", ".join(f"{epsilon_text(one)} ({unit})" for one, unit in both if one is not None)


def _pace(values: Mapping[str, Value]) -> list[str]:
    """How fast rounds go, in how much memory, and how long they will still take; what is known."""
    shown = (
        ("clients_per_s", lambda rate: f"{figure(rate, 3)} clients/s"),
        ("memory_bytes", bytes_text),
        ("remaining_s", lambda left: f"{seconds_text(left)} left"),
    )
    numbers = ((_number(values, name), text) for name, text in shown)
    return [text(number) for number, text in numbers if number is not None]


def _number(values: Mapping[str, Value], name: str) -> float | None:
    value = values.get(name)
    return float(value) if isinstance(value, int | float) else None


@contextmanager
def live(console: Console) -> Iterator[Sink]:
    """A sink that redraws the last rounds and a progress bar with the time remaining.

    Finished stages and notes scroll by above. However the block is left, the display is taken
    down and the cursor is shown again.
    """
    from rich import progress as bars
    from rich.console import Group
    from rich.live import Live
    from rich.text import Text

    progress = bars.Progress(
        bars.SpinnerColumn(),
        bars.TextColumn("{task.description}", markup=False, style="bold"),
        bars.BarColumn(bar_width=24),
        bars.MofNCompleteColumn(),
        bars.TimeElapsedColumn(),
        bars.TextColumn("left"),
        bars.TimeRemainingColumn(),
        console=console,
    )
    rows: deque[_Cells] = deque(maxlen=_ROWS)
    step = Text(style="dim", no_wrap=True, overflow="ellipsis")
    display = Live(
        Group(progress, step),
        console=console,
        refresh_per_second=5,
        # What is printed meanwhile appears above the display, unless it goes to a file.
        redirect_stdout=sys.stdout.isatty(),
        redirect_stderr=sys.stderr.isatty(),
    )

    def start(stage: str, steps: int | None) -> None:
        finish()
        progress.add_task(foreign(stage), total=steps)

    def advance(done: int, note: str) -> None:
        step.plain = foreign(note)
        for task in progress.task_ids:
            progress.update(task, completed=done)

    def finish() -> None:
        step.plain = ""
        for task in progress.task_ids:
            progress.remove_task(task)

    def sink(event: Event) -> None:
        match event:
            case StageStarted(stage, steps):
                start(stage, steps)
            case StageAdvanced(_, done, note):
                advance(done, note)
            case RoundFinished(values):
                advance(int(_number(values, "round") or 0), ", ".join(_pace(values)))
                rows.append(_round_cells(values))
                display.update(Group(_rounds_table(rows), progress, step))
            case StageFinished():
                finish()
                console.print(Text(_sentence(event), style="green"))
            case Noted():
                console.print(Text(_sentence(event), style="yellow"))
            case _:
                assert_never(event)

    with display:
        yield sink


def _rounds_table(rows: Iterable[_Cells]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, header_style="bold", pad_edge=False)
    for cells in rows:
        if not table.columns:
            for name, _ in cells:
                table.add_column(Text(foreign(name, 100)), justify="right")
        table.add_row(*(Text(cell) for _, cell in cells))
    return table
