"""The privacy figures of a report; ``templates/privacy.html`` has the guarantees in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedcore.observability.words import NOTHING, epsilon_text
from server.records import RunRecord
from server.report.parts import Card


def privacy_card(record: RunRecord, summary: Mapping[str, Any]) -> Card:
    """Returns the headline privacy figure: example-level if examples are protected."""
    epsilon, client = summary["epsilon"]["max"], record.client_privacy
    more = ", in this run; before it, not known" if record.spent_before == "not known" else ""
    if epsilon is None and client is not None:
        return Card(
            "Privacy",
            f"epsilon {epsilon_text(client.epsilon)}",
            f"delta {client.target_delta:g}, of each client{more}",
        )
    if epsilon is None:
        return Card("Differential privacy", "none", "updates were not protected")
    detail = f"delta {delta_text(summary)}, of any client"
    if client is not None:
        detail += (
            f"; of each client as a whole {epsilon_text(client.epsilon)} at delta "
            f"{client.target_delta:g}"
        )
    return Card("Privacy", f"epsilon {epsilon_text(epsilon)}", f"{detail}{more}")


def protects_examples(record: RunRecord, summary: Mapping[str, Any]) -> bool:
    """Returns whether the run's noise protects single examples."""
    return record.client_privacy is None or summary["target_delta"] is not None


def delta_text(summary: Mapping[str, Any]) -> str:
    """Returns the delta of example-level privacy as text."""
    delta = summary["target_delta"]
    return NOTHING if delta is None else f"{delta:g}"
