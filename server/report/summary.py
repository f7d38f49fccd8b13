"""The figures of a run as ``summary.json``, for comparing runs."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from fedcore.finite import finite_or_none
from server.records import RunRecord
from server.report.choice import why_chosen

MODELS = {
    "federated": "federated",
    "cloud_alone": "cloud alone",
    "finetuned": "fine-tuned",
    "released": "released",
}
"""Models with scores on the final test split, with their display names, in order."""


def summary(
    record: RunRecord,
    *,
    target_delta: float | None,
    torch_p50_us: float | None,
    seconds: float,
) -> dict[str, Any]:
    """Builds the content of ``summary.json``, as nested objects.

    Scores are those of the final test split, one object per metric under its name. Values that a
    run doesn't have (privacy, a release, a candidate) are null, never omitted; so are non-finite
    values, which JSON doesn't support. A metric whose name clashes with another entry, such as
    ``bytes``, is stored as ``bytes_metric``.

    Args:
        record: The run.
        target_delta: The privacy parameter delta; None without example-level privacy.
        torch_p50_us: Median time in microseconds of one inference in torch, before export; None if
            not timed.
        seconds: Duration of the whole run.
    """
    sizes = {candidate.name: candidate.bytes for candidate in record.candidates}
    p50_us = {candidate.name: candidate.p50_us for candidate in record.candidates}
    chosen, manifest = record.chosen or "", record.manifest
    choice = next((each for each in record.candidates if each.name == chosen), None)
    fixed: dict[str, Any] = {
        "task": {"name": record.task, "kind": record.kind, "sha256": record.task_sha256},
        "rounds": len(record.rounds),
        "epsilon": {"max": record.epsilon},
        "initial": record.initial_sha256
        and {"sha256": record.initial_sha256, "spent_before": record.spent_before},
        "target_delta": target_delta,
        "client_privacy": record.client_privacy and record.client_privacy.model_dump(mode="json"),
        "bytes": {
            "up": sum(each.bytes_up for each in record.rounds),
            "down": sum(each.bytes_down for each in record.rounds),
        },
        "model": {"fp32_bytes": sizes.get("fp32"), "released_bytes": sizes.get(chosen)},
        "candidate": {
            "name": record.chosen,
            "reason": choice and choice.reason,
            "why": why_chosen(record.candidates, record.chosen, primary=record.primary),
            "agreement": choice and choice.agreement,
            "drop_bound": choice and choice.drop_bound,
        },
        "latency": {
            "torch_p50_us": torch_p50_us,
            "fp32_p50_us": p50_us.get("fp32"),
            "released_p50_us": p50_us.get(chosen),
        },
        "release": {
            "version": manifest.version if manifest else None,
            "digest": manifest.onnx.sha256 if manifest else None,
            "withheld": record.withheld or None,
            "failed": record.unreleased or None,
            "untrained": record.untrained or None,
        },
        "test": _test(record),
        "evaluation": _evaluation(record),
        "settings": record.settings,
        "finetune": {
            "auto": record.finetune_trials,
            "privacy": record.cloud_privacy and record.cloud_privacy.model_dump(),
        },
        "best_round": record.best_round if record.judged else None,
        "seconds": {**record.stages, "total": seconds},
        "training": asdict(record.training) if record.training else None,
        "virtual": virtual_total(record),
        "clients": [asdict(each) for each in record.clients],
    }
    scores: dict[str, Any] = {
        f"{metric}_metric" if metric in fixed else metric: {
            model: record.scores.get(metric, {}).get(model) for model in MODELS
        }
        for metric in {record.primary: None, **record.scores}
    }
    return {name: finite_or_none(value) for name, value in {**scores, **fixed}.items()}


def _test(record: RunRecord) -> dict[str, Any] | None:
    """Returns the final test's statement, warning and results by client; None without a test."""
    if record.tested is None:
        return None
    return {
        **record.tested.model_dump(mode="json"),
        "warning": record.test_warning or None,
        "by_client": [asdict(each) for each in record.client_tests],
        "details": asdict(record.details) if record.details else None,
    }


def _evaluation(record: RunRecord) -> dict[str, Any] | None:
    """Returns the clients behind each metric of the kept round; None if no client evaluated it."""
    kept = next((each for each in record.rounds if each.round == record.best_round), None)
    if kept is None or not kept.sources:
        return None
    return {
        "mean_of_clients": [name for name, each in kept.sources.items() if each.averaged],
        "metrics": kept.metrics,
        "sources": {name: asdict(each) for name, each in kept.sources.items()},
    }


def virtual_total(record: RunRecord) -> dict[str, float] | None:
    """Sums the rounds' figures on the virtual clock; None without a virtual clock."""
    rounds = [asdict(each.virtual) for each in record.rounds if each.virtual]
    return {name: sum(each[name] for each in rounds) for name in rounds[0]} if rounds else None
