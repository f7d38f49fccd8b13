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
    values = dict(by_dotted_name(run.model_dump(mode="json")))
    changed = dict(by_dotted_name(run.model_dump(mode="json", exclude_defaults=True)))
    names = [name for name in _MAIN if name in values]
    names += [name for name in changed if name not in names and not name.startswith(_ELSEWHERE)]
    return {name: values[name] for name in names if name in values}


def by_dotted_name(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the values of nested tables by names such as ``client.epochs``."""
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from by_dotted_name(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
