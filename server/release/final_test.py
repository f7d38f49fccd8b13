"""Evaluation of the final test split: the manifest's statement, and whether to withhold."""

from __future__ import annotations

import math

from fedcore.artifacts.manifest import TestStatement
from fedcore.config.run import RunConfig
from fedcore.observability.words import counted
from fedcore.task.definition import Task
from fedcore.task.metrics import Metric

Scores = dict[str, dict[str, float]]
"""Scores by metric, then by model."""
_ROUNDING = 1e-9  # tolerance for floating-point differences


def statement_of(task: Task, scores: Scores, examples: int) -> TestStatement:
    """Builds the manifest's statement on the final test; non-finite scores become None."""
    found = {name: scores[task.primary.name][name] for name in ("federated", "released")}
    finite = {name: value if math.isfinite(value) else None for name, value in found.items()}
    return TestStatement(metric=task.primary.name, examples=examples, **finite)


def _drop(primary: Metric, tested: TestStatement) -> float:
    """Returns how much worse the released model is than the federated one; may be infinite."""
    if tested.federated is None:
        return -math.inf
    if tested.released is None:
        return math.inf
    return primary.worsening(tested.federated, tested.released)


def drop_note(primary: Metric, tested: TestStatement) -> str:
    """Describes how much worse the released model is than the federated one; empty if it isn't."""
    if _drop(primary, tested) <= 0:
        return ""
    return (
        f"On the final test split the released model is worse than that of the rounds: "
        f"{primary.name} {_figure(tested.federated)} before, {_figure(tested.released)} after, "
        f"over {counted(tested.examples, 'example')}."
    )


def reason_to_withhold(run: RunConfig, primary: Metric, tested: TestStatement) -> str:
    """Returns the reason to withhold a release; empty if none applies or no repository is named."""
    limit = max(run.release.max_test_drop, 1 / tested.examples) + _ROUNDING
    drop = _drop(primary, tested)
    if run.release.repository is None or drop <= limit:
        return ""
    return (
        f"release: on the final test split {primary.name} is {_figure(tested.federated)} with the "
        f"model of the rounds and {_figure(tested.released)} with the one to release: {drop:.3g} "
        f"worse, and release.max_test_drop = {run.release.max_test_drop:g} is allowed. Nothing was "
        "published, and what was published before stands; the cloud's data, which the gate and "
        "the choice of a candidate ask, may not look like the devices'. Leave out fine-tuning "
        "(finetune.epochs = 0) or pruned candidates, hold out data in the cloud that look like the "
        "devices', or allow more."
    )


def _figure(value: float | None) -> str:
    return "no number" if value is None else f"{value:.4g}"
