"""Sinks that show a run's events on a terminal, in a notebook, as plain lines or as JSON."""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, TextIO, assert_never

from fedcore.observability.events import (
    Event,
    Noted,
    RoundFinished,
    Sink,
    StageAdvanced,
    StageFinished,
    StageStarted,
    TrainingAdvanced,
    Value,
    json_line,
    nowhere,
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
    from rich.progress import Progress, TaskID
    from rich.table import Table

_ROWS = 8  # rounds in the live table, which leaves room on the screen for earlier output
_ON_DEVICES: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("on devices", "simulated_s", seconds_text),
    ("late", "stragglers", lambda count: f"{count:.0f}"),
    ("lost", "dropped", lambda count: f"{count:.0f}"),
    ("away", "unavailable", lambda count: f"{count:.0f}"),
)
"""Columns for a virtual clock: heading, name of the value, formatter."""
_LINES = 30  # stages and notes shown in a notebook's cell; the report has all of them
_REDRAWN_S = 0.2  # short rounds pass faster than anybody reads
_FIRST_LINE_S, _NEXT_LINE_S = 2.0, 10.0  # between lines about one training
_TRAININGS = {"finetuned": "fine-tuning", "cloud_alone": "training alone, for comparison"}
_Cells = tuple[tuple[str, str], ...]


def choose(stream: TextIO, *, json: bool) -> AbstractContextManager[Sink]:
    """Returns the sink that suits ``stream``.

    JSON on request, a live display on a terminal or in a notebook's cell, else plain lines.
    """
    if json:
        return as_json(stream)
    if type(stream).__module__.partition(".")[0] == "ipykernel":
        return in_cell(import_module("IPython.display").display)
    capable = os.environ.get("TERM") != "dumb" and find_spec("rich") is not None
    if stream.isatty() and capable:
        from rich.console import Console

        return live(Console(file=stream))
    return plain(stream)


def shown(progress: bool | Sink) -> AbstractContextManager[Sink]:
    """Returns the sink for an API function's ``progress``.

    Standard error or the notebook's cell for True, none for False, and a callback itself.
    """
    if callable(progress):
        return nullcontext(progress)
    return choose(sys.stderr, json=False) if progress else nullcontext(nowhere)


@contextmanager
def as_json(stream: TextIO) -> Iterator[Sink]:
    """Yields a sink that writes each event as one JSON object a line."""
    yield _lines(stream, json_line)


@contextmanager
def plain(stream: TextIO, *, clock: Callable[[], float] = time.monotonic) -> Iterator[Sink]:
    """Yields a sink that writes each event as one line of text.

    Of a training it writes a line every ten seconds, and the last one; none of a short one.

    Args:
        stream: Where lines go.
        clock: Returns seconds.
    """
    write = _lines(stream, _sentence)
    model, due_s, told = "", 0.0, False

    def sink(event: Event) -> None:
        nonlocal model, due_s, told
        if isinstance(event, TrainingAdvanced):
            if event.model != model:
                model, due_s, told = event.model, clock() + _FIRST_LINE_S, False
            last = told and event.done >= event.steps
            if clock() < due_s and not last:
                return
            due_s, told = clock() + _NEXT_LINE_S, True
        write(event)

    yield sink


def _lines(stream: TextIO, text: Callable[[Event], str]) -> Sink:
    """Returns a sink of one line per event; a closed pipe ends the output, but not the run."""
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
        case TrainingAdvanced():
            text = training_text(event)
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


def _training(event: TrainingAdvanced) -> str:
    """Returns what is trained, and how far it has come."""
    what = _TRAININGS.get(event.model, f"fine-tuning after {event.model}")
    return f"{what}: step {event.done:,} of {event.steps:,}"


def _training_figures(event: TrainingAdvanced) -> str:
    """Returns the known figures of a training, as text."""
    rates = ((event.tokens_per_s, "tokens"), (event.examples_per_s, "examples"))
    found = [f"loss {figure(event.loss)}", f"learning rate {event.learning_rate:.3g}"]
    found += [f"{figure(rate, 3)} {unit}/s" for rate, unit in rates if rate is not None][:1]
    if event.memory_bytes is not None:
        found.append(bytes_text(event.memory_bytes))
    return ", ".join([*found, f"{seconds_text(event.remaining_s)} left"])


def training_text(event: TrainingAdvanced) -> str:
    """Returns the progress of a training, in words."""
    return f"{_training(event)}, {_training_figures(event)}"


def _round_cells(values: Mapping[str, Value]) -> _Cells:
    """Returns a round's cells for a table: heading and text, the round's number first."""
    metrics = values.get("metrics")
    first = next(iter(metrics.items()), None) if isinstance(metrics, dict) else None
    name, metric = first or ("metric", None)
    sources = values.get("sources")
    source = sources.get(name) if isinstance(sources, dict) else None
    if isinstance(source, dict) and source.get("averaged"):
        name = f"{name}, mean of clients"
    virtual = values.get("virtual")
    on_devices = virtual if isinstance(virtual, dict) else {}
    return (
        ("round", f"{values.get('round')}/{values.get('rounds')}"),
        (name, "undefined" if first and metric is None else figure(metric)),
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
    """Returns the largest epsilon spent; names the unit if clients are protected."""
    of_examples, of_clients = _number(values, "epsilon_max"), _number(values, "client_epsilon")
    if of_clients is None:
        return epsilon_text(of_examples)
    both = ((of_examples, "examples"), (of_clients, "clients"))
    return ", ".join(f"{epsilon_text(one)} ({unit})" for one, unit in both if one is not None)


def _pace(values: Mapping[str, Value]) -> list[str]:
    """Returns the known ones of rate, memory and remaining time, as text."""
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
    """Yields a sink that redraws the last rounds and a progress bar with the remaining time.

    Finished stages and notes scroll by above. However the block ends, the display is removed and
    the cursor shown again.
    """
    from rich.console import Group
    from rich.live import Live
    from rich.text import Text

    progress = _progress_bars(console)
    rows: deque[_Cells] = deque(maxlen=_ROWS)
    step = Text(style="dim", no_wrap=True, overflow="ellipsis")
    display = Live(
        Group(progress, step),
        console=console,
        refresh_per_second=5,
        # Other output appears above the display, unless it goes to a file.
        redirect_stdout=sys.stdout.isatty(),
        redirect_stderr=sys.stderr.isatty(),
    )
    bar: dict[str, TaskID] = {}  # of the stage, and of a training within it

    def advance(done: int, note: str) -> None:
        finish(but={"stage"})
        step.plain = foreign(note)
        if "stage" in bar:
            progress.update(bar["stage"], completed=done)

    def train(event: TrainingAdvanced) -> None:
        what, _, _ = _training(event).partition(":")
        finish(but={"stage", what})
        if what not in bar:
            bar[what] = progress.add_task(what, total=event.steps)
        progress.update(bar[what], completed=event.done)
        step.plain = _training_figures(event)

    def finish(*, but: Collection[str] = ()) -> None:
        step.plain = ""
        for name in bar.keys() - but:
            progress.remove_task(bar.pop(name))

    def sink(event: Event) -> None:
        match event:
            case StageStarted(stage, steps):
                finish()
                bar["stage"] = progress.add_task(foreign(stage), total=steps)
            case StageAdvanced(_, done, note):
                advance(done, note)
            case TrainingAdvanced():
                train(event)
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


def _progress_bars(console: Console) -> Progress:
    from rich import progress as bars

    return bars.Progress(
        bars.SpinnerColumn(),
        bars.TextColumn("{task.description}", markup=False, style="bold"),
        bars.BarColumn(bar_width=24),
        bars.MofNCompleteColumn(),
        bars.TimeElapsedColumn(),
        bars.TextColumn("left"),
        bars.TimeRemainingColumn(),
        console=console,
    )


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


@contextmanager
def in_cell(
    display: Callable[..., Any], *, clock: Callable[[], float] = time.monotonic
) -> Iterator[Sink]:
    """Yields a sink that updates one output of a notebook's cell, since a kernel has no terminal.

    It shows finished stages and notes, the last rounds, and the current stage.

    Args:
        display: IPython's function ``display``.
        clock: Returns seconds; limits how often short rounds are drawn.
    """
    lines: deque[str] = deque(maxlen=_LINES)
    rows: deque[_Cells] = deque(maxlen=_ROWS)
    left_out, drawn_s = 0, -_REDRAWN_S
    stage, steps, at = "", "", ""
    handle = display({"text/plain": ""}, raw=True, display_id=True)

    def draw() -> None:
        nonlocal drawn_s
        drawn_s = clock()
        earlier = [f"... {counted(left_out, 'line')} earlier"] if left_out else []
        now = [bounded_line(f"{stage}: {at}{steps}")] if stage else []
        text = "\n".join([*earlier, *lines, *_aligned(rows), *now])
        handle.update({"text/plain": text}, raw=True)

    def say(text: str) -> None:
        nonlocal left_out
        left_out += len(lines) == _LINES
        lines.append(text)

    def sink(event: Event) -> None:
        nonlocal stage, steps, at
        match event:
            case StageStarted(stage, count):
                steps, at = (f" of {counted(count, 'step')}" if count else ""), "started"
            case StageAdvanced(_, done, note):
                at, steps = f"step {done}" + (f": {note}" if note else ""), ""
            case TrainingAdvanced():
                at, steps = training_text(event), ""
            case RoundFinished(values):
                rows.append(_round_cells(values))
                at, steps = ", ".join([f"round {rows[-1][0][1]}", *_pace(values)]), ""
                short = (_number(values, "seconds") or 0.0) < _REDRAWN_S
                if short and clock() - drawn_s < _REDRAWN_S:
                    return
            case StageFinished() | Noted():
                stage = "" if isinstance(event, StageFinished) else stage
                say(_sentence(event))
            case _:
                assert_never(event)
        draw()

    try:
        yield sink
    finally:
        draw()


def _aligned(rows: Iterable[_Cells]) -> list[str]:
    """Returns a table of rounds as lines of text, columns aligned to the right."""
    table: list[tuple[str, ...]] = []
    for cells in rows:
        if not table:
            table.append(tuple(foreign(name, 100) for name, _ in cells))
        table.append(tuple(text for _, text in cells))
    widths = [max(map(len, column)) for column in zip(*table, strict=False)]
    return [
        "  ".join(text.rjust(width) for text, width in zip(row, widths, strict=False))
        for row in table
    ]
