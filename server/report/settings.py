"""The settings of a run that a report shows: the main ones, and those that differ from defaults."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from fedcore.config.run import RunConfig

_MAIN = (
    "seed",
    "federation.strategy",
    "federation.rounds",
    "federation.cohort",
    "federation.evaluate_cohort",
    "federation.holdout",
    "client.epochs",
    "client.batch_size",
    "client.optimizer",
    "client.learning_rate",
    "privacy.unit",
    "finetune.epochs",
)
_ELSEWHERE = ("name", "task", "release.")
"""Shown in the page's head or lineage, or paths of the machine."""


def shown_settings(run: RunConfig) -> dict[str, Any]:
    """Returns settings by their names in the run's file: the main ones first, in a fixed order."""
    values = dict(_flat(run.model_dump(mode="json")))
    changed = dict(_flat(run.model_dump(mode="json", exclude_defaults=True)))
    names = [name for name in _MAIN if name in values]
    names += [name for name in changed if name not in names and not name.startswith(_ELSEWHERE)]
    return {name: values[name] for name in names if name in values}


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
