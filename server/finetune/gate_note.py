"""The gate's verdict on a fine-tuned model, in words."""

from __future__ import annotations

from fedcore.observability.words import counted
from fedcore.task.metrics import Metric
from server.finetune.launch import Finetuned


def gate_note(tuned: Finetuned, primary: Metric) -> str:
    """Describes the gate's measurements of the fine-tuned model, and its verdict."""
    verdict = "kept" if tuned.kept else "not kept"
    cloud = f"on held-out cloud data {tuned.before:.4g} before, {tuned.after:.4g} after"
    if tuned.unjudged:
        return f"{primary.name} {cloud}; no client evaluated it ({tuned.unjudged}): {verdict}"
    if (asked := tuned.clients) is None:
        return f"{primary.name} {cloud}: {verdict}"
    return (
        f"{primary.name} on held-out data of {counted(asked.clients, 'client')} "
        f"{asked.before:.4g} before, {asked.after:.4g} after (to {asked.margin:.2g}); {cloud}: "
        f"{verdict}"
    )
