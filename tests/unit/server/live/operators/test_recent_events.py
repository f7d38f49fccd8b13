"""What operators are told of a run."""

from __future__ import annotations

from fedcore.observability.events import Noted, RoundFinished, StageAdvanced, StageStarted
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
