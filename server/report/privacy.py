"""The privacy section of a report: the run's guarantees in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedcore.artifacts.manifest import ClientStatement
from fedcore.observability.words import NOTHING, counted, epsilon_text
from server.records import RunRecord
from server.report.markup import Markup, tag


def privacy_card(record: RunRecord, summary: Mapping[str, Any]) -> tuple[str, str, str]:
    """Returns the headline privacy figure: example-level if examples are protected."""
    epsilon, client = summary["epsilon"]["max"], record.client_privacy
    if epsilon is None and client is not None:
        return (
            "Privacy",
            f"epsilon {epsilon_text(client.epsilon)}",
            f"delta {client.target_delta:g}, of each client",
        )
    if epsilon is None:
        return "Differential privacy", "none", "updates were not protected"
    detail = f"delta {_delta(summary)}, of any client"
    if client is not None:
        detail += (
            f"; of each client as a whole {epsilon_text(client.epsilon)} at delta "
            f"{client.target_delta:g}"
        )
    return "Privacy", f"epsilon {epsilon_text(epsilon)}", detail


def privacy(record: RunRecord, summary: Mapping[str, Any]) -> Markup:
    """Renders the run's privacy guarantees, each with its unit and its limits."""
    client = record.client_privacy
    if record.noise == "none":
        words = [
            tag(
                "p",
                "This run trained without differential privacy: updates, and the model, may "
                "reveal examples that clients trained on.",
            )
        ]
    else:
        words = [
            *([_of_examples(record, summary)] if _protects_examples(record, summary) else []),
            *([_of_clients(client)] if client is not None else []),
            tag(
                "p",
                "Data that the cloud trained on is not covered by this statement, nor are figures "
                "by client that a simulation shows.",
            ),
            _noise(record),
        ]
    return tag("section", tag("h2", "Privacy"), *words)


def _protects_examples(record: RunRecord, summary: Mapping[str, Any]) -> bool:
    return record.client_privacy is None or summary["target_delta"] is not None


def _of_examples(record: RunRecord, summary: Mapping[str, Any]) -> Markup:
    epsilon = summary["epsilon"]["max"]
    return tag(
        "p",
        "The unit that is protected is one example of one client: putting a record that counts as "
        "zero in its place changes the probability of any updates that the client sends by at "
        "most a factor of e to the power of epsilon, except with probability delta. How many "
        "examples a client has is public. ",
        "No epsilon was recorded, so nothing is promised."
        if epsilon is None
        else f"Epsilon is at most {epsilon_text(epsilon)} at delta {_delta(summary)} for "
        f"every client, accumulated over {counted(len(record.rounds), 'round')}.",
    )


def _of_clients(client: ClientStatement) -> Markup:
    if client.separation is None:
        drawn = (
            f"The server drew each of {counted(client.clients, 'client')} for a round on its own, "
            f"with probability {client.sample_rate:.3g}, and epsilon counts on nobody learning "
            "whom it drew. "
        )
    else:
        drawn = (
            "Nothing counts on who took part being secret; no client took part twice in "
            f"{counted(client.separation, 'round')} in a row. "
        )
    return tag(
        "p",
        "The unit that is protected is one client with all of its data: leaving its updates out "
        "changes the probability of the models of all rounds together by at most a factor of e to "
        "the power of epsilon, except with probability delta. This holds towards whoever gets the "
        "models; the server itself saw each update. ",
        drawn,
        f"Epsilon is {epsilon_text(client.epsilon)} at delta {client.target_delta:g}, accumulated "
        f"over {counted(client.rounds, 'round')} by {client.accountant.upper()}.",
    )


def _noise(record: RunRecord) -> Markup:
    if record.noise == "simulated":
        return tag(
            "p",
            tag("strong", "Simulated noise."),
            " The noise of this run was drawn from its seed, so that the run can be repeated bit "
            "for bit. Whoever knows the seed can take it away again: this run protects nobody. "
            "The figures are those that the same run would have on devices, which draw noise "
            "from their operating system.",
            class_="warning",
        )
    if record.client_privacy is not None:
        return tag("p", "Whoever added noise drew it from its own operating system.")
    return tag("p", "Each device drew its noise from its own operating system.")


def _delta(summary: Mapping[str, Any]) -> str:
    delta = summary["target_delta"]
    return NOTHING if delta is None else f"{delta:g}"
