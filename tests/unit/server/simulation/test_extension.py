"""Extension of a complete run: where fine-tuning between rounds would have followed the last."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedcore.config.run import RunConfig
from fedcore.errors import ConfigError
from server.rounds.checkpointing.progress import Progress
from server.simulation.extension import extended


def _extended(finetune: dict[str, Any], *, done: int, before: int, best_round: int) -> Progress:
    settings = {"name": "x", "task": "task.py", "federation": {"rounds": 8}, "finetune": finetune}
    weights = np.zeros(2, "f4")
    progress = Progress(
        round=done,
        over=done == before,
        weights=weights,
        best=weights,
        best_round=best_round,
        most_failed=0,
        strategy={},
        preprocess=b"",
    )
    run = RunConfig.model_validate(settings)
    return extended(Path("checkpoint"), run, progress, before=before)


@pytest.mark.parametrize(
    ("finetune", "best_round"), [({"every": 2}, 4), ({"every": 4}, 1), ({"after_stall": 2}, 2)]
)
def test_a_last_round_that_fine_tuning_would_follow_is_not_extended(
    finetune: dict[str, Any], best_round: int
) -> None:
    with pytest.raises(ConfigError, match=r"fine-tunes the model of round 4 .* Nothing was run"):
        _extended(finetune, done=4, before=4, best_round=best_round)


@pytest.mark.parametrize(
    ("finetune", "done", "before"),
    [({"every": 3}, 4, 4), ({"after_stall": 2}, 4, 4), ({"every": 2}, 4, 6), ({}, 4, 4)],
)
def test_other_runs_are_extended(finetune: dict[str, Any], done: int, before: int) -> None:
    assert not _extended(finetune, done=done, before=before, best_round=3).over
