"""Progress in the cell of a notebook: one output that is kept up to date."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

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


class Cell:
    """What a notebook shows: outputs, each as it was drawn."""

    def __init__(self) -> None:
        self.outputs: list[list[str]] = []

    def display(self, data: dict[str, str], *, raw: bool, display_id: bool) -> Any:
        assert raw
        assert display_id
        self.outputs.append([data["text/plain"]])
        return self

    def update(self, data: dict[str, str], *, raw: bool) -> None:
        assert raw
        self.outputs[-1].append(data["text/plain"])

    @property
    def shown(self) -> list[str]:
        """The lines of the one output."""
        (drawn,) = self.outputs
        return drawn[-1].splitlines()


@pytest.fixture
def cell() -> Cell:
    return Cell()


def test_stages_rounds_and_the_stage_at_hand_are_one_output(
    cell: Cell, finished_round: Round
) -> None:
    with console.in_cell(cell.display) as sink:
        sink(StageStarted("federate", 5))
        assert cell.shown == ["federate: started of 5 steps"]
        for number in range(1, 4):
            sink(finished_round(number))
        assert [line.split()[0] for line in cell.shown] == [
            *("round", "1/5", "2/5", "3/5", "federate:")
        ]
        assert cell.shown[-1] == "federate: round 3/5"
        sink(StageFinished("federate", 2.0, ""))
        sink(StageStarted("compress", None))
        sink(StageAdvanced("compress", 1, "building \x1b[31mfp32"))
        sink(Noted("a note"))
    assert cell.shown[:2] == ["[federate] done in 2.0 s", "note: a note"]
    assert cell.shown[-1].startswith("compress: step 1: building ")
    assert "\x1b" not in cell.shown[-1]
    widths = {len(line) for line in cell.shown[2:6]}
    assert len(widths) == 1  # columns are aligned


def test_short_rounds_do_not_flood_the_cell(cell: Cell, finished_round: Round) -> None:
    now = 0.0
    short = [
        RoundFinished({**finished_round(number).values, "seconds": 0.001})
        for number in range(1, 1001)
    ]
    with console.in_cell(cell.display, clock=lambda: now) as sink:
        for event in short:
            now += 0.001
            sink(event)
    (drawn,) = cell.outputs
    assert len(drawn) < 10
    assert [line.split()[0] for line in cell.shown[1:]] == [
        f"{number}/5" for number in range(993, 1001)
    ]


def test_many_notes_leave_out_the_first(cell: Cell) -> None:
    with console.in_cell(cell.display) as sink:
        for number in range(100):
            sink(Noted(f"note {number}"))
    assert cell.shown[0] == "... 70 lines earlier"
    assert len(cell.shown) == 31
    assert cell.shown[-1] == "note: note 99"


def test_what_was_last_is_drawn_whatever_happens(cell: Cell, finished_round: Round) -> None:
    def run() -> None:
        with console.in_cell(cell.display, clock=lambda: 0.0) as sink:
            sink(RoundFinished({**finished_round(1).values, "seconds": 0.001}))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run()
    assert cell.shown[1].split()[0] == "1/5"


def test_a_training_is_the_stage_at_hand(cell: Cell) -> None:
    with console.in_cell(cell.display) as sink:
        sink(StageStarted("finetune", None))
        sink(TrainingAdvanced("finetuned", 3, 10, 0.5, 0.1, None, None, None, 7.0))
    assert cell.shown == [
        "finetune: fine-tuning: step 3 of 10, loss 0.5000, learning rate 0.1, 7.0 s left"
    ]
