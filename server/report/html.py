"""The HTML report of a run: one self-contained page without network, scripts or other files."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files
from string import Template
from typing import Any

from fedcore import __version__
from server.records import RunRecord
from server.report import plots, sections
from server.report.markup import Markup, join, plot, tag
from server.report.privacy import privacy


def report_html(record: RunRecord, summary: Mapping[str, Any]) -> str:
    """Renders the report as an HTML page.

    Parts that a run doesn't have are omitted or described; a run without rounds has a page, too.

    Args:
        record: The run.
        summary: The run's figures, from `server.report.summary.summary`.

    Guarantee:
        All names and notes are escaped, and the page's content policy forbids scripts and requests,
        so that a malicious client name can't harm a reader.
    """
    folder = files("server.report")
    page = Template((folder / "report.html").read_text("utf-8"))
    return page.substitute(
        title=join([f"{record.name} - fedcore"]),
        style=(folder / "report.css").read_text("utf-8"),
        body=join(
            (
                sections.header(record),
                sections.headline(record, summary),
                _results(record),
                _rounds(record),
                _compression(record),
                _clients(record),
                sections.lineage(record),
                privacy(record, summary),
                sections.stages(record, summary),
                sections.notes(record),
                tag("footer", f"Written by fedcore {__version__}."),
            )
        ),
    )


def _results(record: RunRecord) -> Markup:
    if not record.scores:
        return Markup()
    drawn = plots.scores_plot(
        record.scores.get(record.primary, {}),
        primary=record.primary,
        higher_is_better=record.higher_is_better,
    )
    return tag(
        "section",
        tag("h2", "Final test"),
        tag("p", "On a split that no training, choice, pruning or calibration has read."),
        tag(
            "div",
            plot(drawn, f"The {record.primary} of each model on the final test split."),
            tag("div", sections.scores_table(record)),
            class_="plots",
        ),
    )


def _rounds(record: RunRecord) -> Markup:
    if not record.rounds:
        return Markup()
    first = plots.rounds_plot(
        record.rounds,
        primary=record.primary,
        higher_is_better=record.higher_is_better,
        best_round=record.best_round,
    )
    return tag(
        "section",
        tag("h2", "Rounds"),
        tag(
            "div",
            plot(first, sections.judged(record)),
            plot(
                plots.bytes_plot(record.rounds),
                "Payload between the server and all clients, added up over the rounds.",
            ),
            class_="plots",
        ),
        sections.training(record),
        sections.rounds_table(record),
    )


def _compression(record: RunRecord) -> Markup:
    if not record.candidates:
        return Markup()
    drawn = plots.candidates_plot(
        record.candidates,
        primary=record.primary,
        higher_is_better=record.higher_is_better,
        chosen=record.chosen,
    )
    caption = (
        f"The {record.primary} on the cloud's held-out data against the time of one inference. "
        "The larger the marker, the more bytes; hollow ones were refused."
    )
    return tag(
        "section",
        tag("h2", "Compression"),
        tag("div", plot(drawn, caption), class_="plots"),
        sections.candidates_table(record),
    )


def _clients(record: RunRecord) -> Markup:
    if not record.clients:
        return Markup()
    drawn = plots.clients_plot(
        record.clients, primary=record.primary, higher_is_better=record.higher_is_better
    )
    caption = (
        f"The {record.primary} of the federated model on each client's own data. A simulation can "
        "look at every client; from real devices these figures do not leave."
    )
    return tag(
        "section",
        tag("h2", "Clients"),
        tag("div", plot(drawn, caption), class_="plots"),
        sections.clients_table(record),
    )
