"""One device of four that says what it likes, over live TLS: the round goes on, and it is named."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import fedcore.client_app as client_app
from fedcore.updates.messages import Update
from tests.e2e.live.federation import federate
from tests.e2e.live.test_live_rounds import all_awake, wait_for

NAMES = ("edge-0", "edge-1", "edge-2", "edge-3")
LIAR = NAMES[-1]
Lie = Callable[[Update], Update]
REFUSED: dict[str, tuple[Lie, str]] = {
    "weights that are not finite": (
        lambda one: Update(one.weights * np.float32(np.nan), one.num_examples, one.metrics),
        "it holds values that are not finite",
    ),
    "a loss of 1.7e308": (
        lambda one: Update(one.weights, one.num_examples, {"train_loss": 1.7e308}),
        "train_loss = 1.7e+308, expected -1e+18 to 1e+18",
    ),
    "a metric that nobody asked for": (
        lambda one: Update(one.weights, one.num_examples, {**one.metrics, "more": 1.0}),
        "it contains metric 'more', which was not requested",
    ),
    "a name of control characters": (
        lambda one: Update(one.weights, one.num_examples, {"\x1b[2J": 1.0}),
        "the name of an entry of 'metrics' is",
    ),
    "thousands of metrics": (
        lambda one: Update(one.weights, one.num_examples, {f"m{n}": 1.0 for n in range(5000)}),
        "has 5001 entries, expected at most 256",
    ),
    "another model": (
        lambda one: Update(one.weights[:-1], one.num_examples, one.metrics),
        "got float32",
    ),
}


def told(project: Any, serve: Any, start: Any, monkeypatch: pytest.MonkeyPatch, lie: Lie) -> Any:
    """Two rounds in which one device lies: the records, and the notes."""
    learn, notes = client_app.learn, list[str]()

    def lying(client: Any, name: str, *arguments: Any, **more: Any) -> Update:
        update = learn(client, name, *arguments, **more)
        return lie(update) if name == LIAR else update

    monkeypatch.setattr(client_app, "learn", lying)
    run = project.run(rounds=2, cohort=4, quorum=0.7)
    with serve(run) as served:
        for name in NAMES:
            start(name)
        wait_for(lambda: all_awake(served, len(NAMES)), 20)
        return federate(project, served, run, notes), notes


@pytest.mark.parametrize("name", REFUSED)
def test_what_was_not_asked_for_is_refused_and_its_device_named(
    project: Any, serve: Any, start: Any, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    lie, said = REFUSED[name]
    records, notes = told(project, serve, start, monkeypatch, lie)
    assert [(record.updates, record.failed) for record in records] == [(3, 1), (3, 1)]
    (note,) = notes
    assert "1 of 4 clients failed" in note
    assert LIAR in note
    assert said in note
    assert note.isprintable()


def test_an_update_of_six_times_ten_million_is_clipped_and_its_device_named(
    project: Any, serve: Any, start: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def huge(one: Update) -> Update:
        return Update(np.full_like(one.weights, 6.6e7), one.num_examples, one.metrics)

    records, notes = told(project, serve, start, monkeypatch, huge)
    assert [(record.updates, record.failed) for record in records] == [(4, 0), (4, 0)]
    assert [note.split(":")[0] for note in notes] == ["round 1", "round 2"]
    assert all(f"clipped to that: client '{LIAR}'" in note for note in notes)
    assert all(record.train_loss is not None and record.train_loss < 100 for record in records)
