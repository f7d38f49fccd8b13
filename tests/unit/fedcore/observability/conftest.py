from __future__ import annotations

from collections.abc import Callable

import pytest

from fedcore.observability.events import RoundFinished


@pytest.fixture
def finished_round() -> Callable[[int], RoundFinished]:
    """The event of a round, by its number, of five."""

    def event(number: int) -> RoundFinished:
        return RoundFinished(
            {
                "round": number,
                "rounds": 5,
                "seconds": 0.25,
                "cohort": 20,
                "updates": 19,
                "declined": 0,
                "failed": 1,
                "train_loss": None,
                "metrics": {"accuracy": 0.5 + number / 10, "top3": 0.9},
                "judged_on": "cloud",
                "epsilon_max": 1.234 * number,
                "bytes_up": 1000,
                "bytes_down": 2000,
            }
        )

    return event
