"""The HTML report of a run: one self-contained page without network, scripts or other files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from server.records import RunRecord
from server.report import plots, sections
from server.report.candidates_plot import candidates_plot
from server.report.choice import why_chosen
from server.report.client_plot import clients_plot
from server.report.final_test import (
    calibration_plot,
    classes_table,
    confusion_table,
    final_test,
)
from server.report.pages import render
from server.report.parts import DrawnPlot, drawn
from server.report.privacy import delta_text, protects_examples
from server.report.trials import trials_table


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
    return render(
        "report.html",
        title=record.name,
        record=record,
        summary=summary,
        cards=sections.headline(record, summary),
        scores=sections.scores_table(record),
        client_tests=sections.client_tests_table(record),
        final_test=final_test(record),
        classes=classes_table(record.details),
        confusion=confusion_table(record.details),
        metric_notes=sections.metric_notes(record),
        settings=sections.settings_table(record),
        training=sections.training(record),
        rounds=sections.rounds_table(record),
        candidates=sections.candidates_table(record),
        choice=why_chosen(record.candidates, record.chosen, primary=record.primary),
        trials=trials_table(record.finetune_trials),
        clients=sections.clients_table(record),
        lineage=sections.lineage(record),
        manifest=sections.manifest_table(record),
        stages=sections.stages(record, summary),
        protects_examples=protects_examples(record, summary),
        delta=delta_text(summary),
        **_plots(record),
    )


def _plots(record: RunRecord) -> dict[str, DrawnPlot | None]:
    """Draws the plots; None where there is nothing to plot."""
    primary, higher = record.primary, record.higher_is_better
    scores = plots.scores_plot(
        record.scores.get(primary, {}), primary=primary, higher_is_better=higher
    )
    rounds = plots.rounds_plot(
        record.rounds, primary=primary, higher_is_better=higher, best_round=record.best_round
    )
    candidates = candidates_plot(record.candidates, primary=primary, chosen=record.chosen)
    clients = clients_plot(record.clients, primary=primary, higher_is_better=higher)
    return {
        "calibration_plot": drawn(
            calibration_plot(record.details),
            "How often the released model is right, by its confidence, on the final test split.",
        ),
        "loss_plot": drawn(
            plots.loss_plot(record.rounds),
            "Mean loss of local training by round, on the data that clients train on; it does not "
            "show how good the model is on other data.",
        ),
        "scores_plot": drawn(scores, f"The {primary} of each model on the final test split."),
        "rounds_plot": drawn(rounds, sections.judged(record)),
        "bytes_plot": drawn(
            plots.bytes_plot(record.rounds),
            "Payload between the server and all clients, added up over the rounds.",
        ),
        "candidates_plot": drawn(
            candidates,
            "Bytes of each candidate against the time of one inference, and beside its name the "
            f"{primary} on the cloud's held-out data. The line joins the candidates within the "
            "limits that no other one beats in both; grey ones are beaten, hollow ones were "
            "refused by the limits named.",
        ),
        "clients_plot": drawn(
            clients,
            f"The {primary} of the federated model on all data of each client, most of which it "
            "trained on. A simulation can look at every client; real devices do not release these "
            "figures.",
        ),
    }
