"""Subcommands ``fedcore runs list`` and ``fedcore runs compare``; neither imports torch."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedcore.cli import Command, group, json_option, show
from fedcore.observability.foreign import foreign
from fedcore.observability.words import NOTHING, figure
from server.report.compared import ComparedRuns, FoundRun, compare_runs, list_runs

_RUNS = Path("runs")
_SHOWN = 40  # characters of a setting's value


def _where(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--runs", type=Path, default=_RUNS, help="parent folder of the results (default: runs)"
    )
    json_option(parser)


def _compare_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("one", help="a run: its name below --runs, or its folder")
    parser.add_argument("other", help="the run to compare it with")
    _where(parser)


def _list(options: argparse.Namespace) -> int:
    found = list_runs(options.runs)
    rows: list[tuple[str, ...]] = [("run", "state", "rounds", "score", "epsilon", "changed")]
    rows += [_row(one) for one in found]
    text = _table(rows) if found else f"{options.runs}: no runs yet."
    return show(options, text, [_record(one) for one in found])


def _record(one: FoundRun) -> dict[str, Any]:
    return {
        "name": one.name,
        "folder": str(one.folder),
        "state": one.state,
        "changed": one.changed,
        "rounds": one.figures.get("rounds"),
        "figures": dict(one.figures),
    }


def _row(one: FoundRun) -> tuple[str, ...]:
    last = {"released", "finetuned", "federated"}
    scores = [
        (name, value)
        for name, value in one.figures.items()
        if value is not None and name.rpartition(".")[2] in last
    ]
    # A summary has the metric that decides first.
    first = [one for one in scores if one[0].rpartition(".")[0] == scores[0][0].rpartition(".")[0]]
    score = f"{first[-1][0]} {figure(first[-1][1])}" if first else NOTHING
    return (
        foreign(one.name),
        one.state,
        _shown(one.figures.get("rounds")),
        score,
        _shown(one.figures.get("epsilon.max")),
        one.changed,
    )


def _compare(options: argparse.Namespace) -> int:
    found = compare_runs(options.one, options.other, runs=options.runs)
    return show(options, _compared(found), _difference(found))


def _difference(found: ComparedRuns) -> dict[str, Any]:
    return {
        "runs": list(found.names),
        "same_task": found.same_task,
        "tasks": [one and dict(one) for one in found.tasks],
        "settings": {key: list(both) for key, both in found.settings.items()},
        "figures": {name: list(both) for name, both in found.figures.items()},
    }


def _compared(found: ComparedRuns) -> str:
    one, other = map(foreign, found.names)
    settings = [("setting", one, other)]
    settings += [(key, _text(a), _text(b)) for key, (a, b) in found.settings.items()]
    figures = [("figure", one, other, "difference")]
    for name, (a, b) in found.figures.items():
        gap = NOTHING if a is None or b is None else f"{b - a:+.4g}"
        figures.append((name, _shown(a), _shown(b), gap))
    parts = [_table(settings) if len(settings) > 1 else "Both runs have the same settings."]
    if found.same_task is False:
        parts.insert(0, _tasks(found))
    parts.append(_table(figures) if len(figures) > 1 else "Neither run is complete.")
    return "\n\n".join(parts)


def _tasks(found: ComparedRuns) -> str:
    """Says that the runs' tasks differ, and how."""
    rows = [("task", *map(foreign, found.names))]
    for key in ("name", "kind", "sha256"):
        values = [(each or {}).get(key) for each in found.tasks]
        if values[0] != values[1]:
            rows.append((key, *(_text(one[:12] if one else None) for one in values)))
    return f"The tasks differ, so figures may mean different things.\n\n{_table(rows)}"


def _text(value: object) -> str:
    return NOTHING if value is None else foreign(json.dumps(value), _SHOWN)


def _shown(value: float | None) -> str:
    return NOTHING if value is None else figure(value) if isinstance(value, float) else str(value)


def _table(rows: Sequence[Sequence[str]]) -> str:
    """Formats rows as columns of text."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


runs = group(
    {
        "list": Command(
            "List the runs in a folder of results, with their state and final figures.",
            _where,
            _list,
            "fedcore runs list --json",
        ),
        "compare": Command(
            "Show which settings of two runs differ, and the final figures of both.",
            _compare_arguments,
            _compare,
            "fedcore runs compare churn churn-2",
        ),
    },
    help="list the runs of a folder, or compare two of them",
)
