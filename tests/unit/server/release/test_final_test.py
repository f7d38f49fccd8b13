"""Whether the final test lets a model be published."""

from __future__ import annotations

import pytest

from fedcore.artifacts.manifest import TestStatement
from fedcore.config.run import ReleaseConfig, RunConfig
from fedcore.task.metrics import ACCURACY, RMSE, Metric
from server.release.final_test import drop_note, reason_to_withhold


def statement(
    federated: float | None, released: float | None, *, examples: int = 1000
) -> TestStatement:
    return TestStatement(
        metric="accuracy", examples=examples, federated=federated, released=released
    )


def run_of(repository: str | None = "there", **release: float) -> RunConfig:
    keys = "keys" if repository else None
    return RunConfig(
        name="r", task="t", release=ReleaseConfig(repository=repository, keys=keys, **release)
    )


@pytest.mark.parametrize(
    ("metric", "before", "after", "examples", "held"),
    [
        (ACCURACY, 0.90, 0.90, 1000, False),
        (ACCURACY, 0.90, 0.95, 1000, False),
        (ACCURACY, 0.90, 0.89, 1000, False),  # as much as is allowed
        (ACCURACY, 0.90, 0.8899, 1000, True),
        (ACCURACY, 0.90, 0.89, 10, False),
        (ACCURACY, 0.90, 0.80, 10, False),  # one example of ten
        (ACCURACY, 0.90, 0.70, 10, True),
        (RMSE, 10.0, 10.1, 1000, False),
        (RMSE, 10.0, 10.2, 1000, True),
        (ACCURACY, 0.90, None, 1000, True),
        (ACCURACY, None, 0.5, 1000, False),
        (ACCURACY, None, None, 1000, False),
    ],
)
def test_what_is_worse_by_more_than_is_allowed_isreason_to_withhold(
    metric: Metric, before: float | None, after: float | None, examples: int, held: bool
) -> None:
    said = reason_to_withhold(run_of(), metric, statement(before, after, examples=examples))
    assert bool(said) is held
    if held:
        assert "release.max_test_drop = 0.01" in said
    assert not reason_to_withhold(run_of(None), metric, statement(before, after, examples=examples))
    assert not reason_to_withhold(run_of(max_test_drop=1e9), metric, statement(before, 0.0))


def test_any_drop_is_told() -> None:
    assert drop_note(ACCURACY, statement(0.9, 0.9)) == ""
    assert drop_note(ACCURACY, statement(0.9, 0.91)) == ""
    said = drop_note(ACCURACY, statement(0.9, 0.895))
    assert "accuracy 0.9 before, 0.895 after, over 1000 examples" in said
    assert "no number after" in drop_note(ACCURACY, statement(0.9, None))
