"""What operators are told of a run."""

from __future__ import annotations

from fedcore.observability.events import (
    Noted,
    RoundFinished,
    StageAdvanced,
    StageFinished,
    StageStarted,
    TrainingAdvanced,
)
from server.live.operators.recent_events import RecentEvents


def test_what_a_round_waits_for_is_told_until_it_ends() -> None:
    watched = RecentEvents()
    watched.record(StageAdvanced("rounds", 1, "round 2 waits for edge-0"))
    assert watched.waits == "round 2 waits for edge-0"
    watched.record(RoundFinished({"round": 2}))
    assert (watched.waits, watched.rounds[-1]["round"]) == ("", 2)


def test_steps_after_the_rounds_are_not_what_a_round_waits_for() -> None:
    watched = RecentEvents()
    watched.record(StageStarted("finetune", 3))
    watched.record(StageAdvanced("finetune", 1, "epoch 1"))
    watched.record(Noted("kept"))
    assert (watched.stage, watched.waits, [*watched.notes]) == ("fine-tuning", "", ["kept"])


def test_how_far_fine_tuning_has_come_is_told_until_its_stage_ends() -> None:
    watched = RecentEvents()
    watched.record(StageStarted("finetune", None))
    watched.record(TrainingAdvanced("finetuned", 3, 10, 0.5, 0.1, None, None, None, 7.0))
    watched.record(Noted("a note"))
    assert watched.training.startswith("fine-tuning: step 3 of 10, loss 0.5")
    watched.record(StageFinished("finetune", 9.0, ""))
    assert watched.training == ""
