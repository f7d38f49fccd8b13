"""What ``finetune.auto`` tried, as a table of a report."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from fedcore.observability.words import NOTHING, bytes_text, figure, seconds_text
from server.report.parts import Table


def settings_text(settings: Mapping[str, Any]) -> str:
    """Returns settings as in a run's file.

    >>> settings_text({"processes": 2, "fused": True}), settings_text({})
    ('processes = 2, fused = true', 'as set')
    """
    return (
        ", ".join(f"{name} = {json.dumps(value)}" for name, value in settings.items()) or "as set"
    )


def trials_table(tried: Mapping[str, Any] | None) -> Table | None:
    """Returns the table of all trials, with the chosen one highlighted; None without trials.

    Args:
        tried: ``settings``, the chosen ones, and ``trials``, see `server.finetune.auto.AutoChoice`.
    """
    if tried is None:
        return None
    rows = [
        [
            settings_text(trial["settings"]),
            trial["problem"] or "measured",
            figure(trial["examples_per_s"]),
            NOTHING if trial["peak_bytes"] is None else bytes_text(trial["peak_bytes"]),
            seconds_text(trial["seconds"]),
        ]
        for trial in tried["trials"]
    ]
    return Table(
        ["settings", "outcome", "examples/s", "memory", "trial"],
        rows,
        prose="outcome",
        highlighted=settings_text(tried["settings"]),
    )
