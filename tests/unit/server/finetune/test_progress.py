"""Progress of a training: events of its steps, and how they reach the process that shows them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from torch import nn

from fedcore.errors import DiskFull
from fedcore.observability.events import Event, TrainingAdvanced, json_line
from fedcore.task.definition import Examples, Task
from server.finetune.control import Exchanged
from server.finetune.curve import Curve
from server.finetune.progress import Extent, TrainingProgress, appended_to, followed
from tests.unit.server.finetune.conftest import make_run, trained_here


def part(first: int, *losses: float, seconds: float = 0.6) -> Exchanged:
    return Exchanged(first, losses, 8 * len(losses), seconds, (0.1, 0.1), (1000, 500), 0.1, False)


def events_of(*parts: Exchanged, extent: Extent, later: int = 0) -> list[TrainingAdvanced]:
    events: list[Event] = []
    progress = TrainingProgress(events.append, "finetuned", later)
    for one in parts:
        progress(one, extent)
    return [one for one in events if isinstance(one, TrainingAdvanced)]


def test_figures_are_of_the_steps_since_the_last_event() -> None:
    short = [part(n, float(n), seconds=0.2) for n in range(4)]
    (first,) = events_of(*short, extent=Extent(100, None))
    assert (first.done, first.steps, first.loss) == (3, 100, 1.0)
    assert first.examples_per_s == pytest.approx(24 / 0.6)
    assert (first.memory_bytes, first.learning_rate, first.tokens_per_s) == (1500, 0.1, None)


def test_the_last_step_is_always_told_and_text_counts_in_tokens() -> None:
    (last,) = events_of(part(0, 1.0, 3.0, seconds=0.1), extent=Extent(2, 16))
    assert (last.done, last.loss, last.remaining_s) == (2, 2.0, 0.0)
    assert last.tokens_per_s == pytest.approx(16 * 160)


def test_the_remaining_time_counts_later_trainings_and_forgets_set_up() -> None:
    slow, quick = part(0, 1.0, seconds=30.0), part(1, 1.0, seconds=1.0)
    first, second = events_of(slow, quick, extent=Extent(10, None), later=1)
    assert first.remaining_s == pytest.approx(19 * 30.0)
    assert second.remaining_s == pytest.approx(18 * 1.0)


def test_steps_that_a_rollback_undid_do_not_count() -> None:
    parts = (part(4, 9.0, seconds=0.2), part(2, 1.0, seconds=0.2), part(3, 1.0))
    (told,) = events_of(*parts, extent=Extent(100, None))
    assert (told.done, told.loss) == (4, 1.0)


def test_a_loss_that_is_not_finite_is_told_as_unknown() -> None:
    (told,) = events_of(part(0, float("nan")), extent=Extent(1, None))
    assert told.loss is None
    assert json.loads(json_line(told))["loss"] is None


def test_a_training_tells_its_steps_and_learning_rate() -> None:
    events: list[Event] = []
    progress = TrainingProgress(events.append, "finetuned")
    _, curve = trained_here(make_run(schedule="cosine"), on_part=progress)
    last = events[-1]
    assert isinstance(last, TrainingAdvanced)
    assert last.done == last.steps == len(curve.losses) == 18
    assert 0 < last.learning_rate < 0.001  # near the end of the cosine
    assert last.memory_bytes is not None
    assert last.memory_bytes > 1 << 20


class _Texts:
    def __len__(self) -> int:
        return 44

    def __getitem__(self, row: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.full((6,), row % 5), torch.full((6,), row % 5)


def test_tokens_are_counted_where_they_are_predicted(monkeypatch: pytest.MonkeyPatch) -> None:
    texts: Examples = _Texts()  # type: ignore[assignment]
    monkeypatch.setattr("tests.unit.server.finetune.conftest.make_examples", lambda: texts)
    task = Task(
        name="text",
        kind="next_token",
        model=lambda: nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5)),
        clients=lambda folder: ["anna"],
        client_data=lambda client, folder: texts,
        example_input=torch.zeros(6, dtype=torch.int64),
    )
    events: list[Event] = []
    trained_here(make_run(epochs=1), task, on_part=TrainingProgress(events.append, "finetuned"))
    last = events[-1]
    assert isinstance(last, TrainingAdvanced)
    assert last.examples_per_s is not None
    assert last.tokens_per_s == pytest.approx(6 * last.examples_per_s)


def test_events_of_another_process_are_passed_on_whole_and_in_order(tmp_path: Path) -> None:
    path, events = tmp_path / "progress.jsonl", list[Event]()
    (sent,) = events_of(part(0, 1.0), extent=Extent(1, None))
    line = json_line(sent) + "\n"
    with followed(path, events.append):
        child = os.fork()
        if child == 0:
            write = appended_to(path)
            for _ in range(3):
                write(sent)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        with path.open("a") as stream:
            stream.write("not an event\n" + line + line[:20])  # killed while it wrote
    assert events == [sent] * 4


def test_what_a_sink_raises_is_raised_when_the_processes_have_ended(tmp_path: Path) -> None:
    path = tmp_path / "progress.jsonl"
    (sent,) = events_of(part(0, 1.0), extent=Extent(1, None))

    def full(event: Event) -> None:
        raise DiskFull("the disk has no room.")

    with pytest.raises(DiskFull, match="no room"), followed(path, full):
        appended_to(path)(sent)


def test_nothing_is_written_where_nothing_happened(tmp_path: Path) -> None:
    with followed(tmp_path / "none.jsonl", print):
        pass
    assert not list(tmp_path.iterdir())


def test_a_course_of_an_earlier_version_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "curve.jsonl"
    Curve(path).rewind(0)
    Curve(path).append(part(0, 1.0))
    with path.open("a") as stream:
        stream.write('{"first_step": 1, "losses": [2.0], "examples": 8, "seconds": 1.0}\n')
        stream.write('[1, 2]\n"text"\n')
    assert Curve(path).losses == (1.0,)
