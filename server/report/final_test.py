"""The final test of a report: interval, figures by class, confusion matrix and calibration."""

from __future__ import annotations

from matplotlib.figure import Figure

from fedcore.observability.words import counted, figure
from server.records import FinalTestDetails, RunRecord
from server.report.parts import Table
from server.report.svg import BLUE, HEIGHT_IN, MUTED, ORANGE, draw

_MAX_SHOWN = 20  # classes of a confusion matrix that fits a page


def final_test(record: RunRecord) -> list[str]:
    """Describes the size of the final test, and how sure its figure is."""
    details = record.details
    if details is None:
        return []
    said = f"The test has {counted(details.examples, 'example', ',')}."
    value = record.scores.get(record.primary, {}).get("released")
    if details.interval is not None:
        low, high = details.interval
        said += (
            f" {record.primary} of the released model is {figure(value)}; over examples like these "
            f"it is between {figure(low)} and {figure(high)} with 95 % confidence "
            f"({details.method})."
        )
    if record.tested is not None and record.tested.clients is not None:
        said += (
            f" They are the own test data of {counted(record.tested.clients, 'client')}, taken "
            "together; the interval does not count that clients differ."
        )
    if details.calibration_error is None:
        return [said]
    return [
        said,
        f"Expected calibration error {figure(details.calibration_error, 3)}: by so much the "
        "probability that the released model gives its decisions differs, on average, from the "
        "share of them that are right.",
    ]


def classes_table(details: FinalTestDetails | None) -> Table | None:
    """Returns precision, recall and F1 by class, or by label; None without any."""
    if details is None or not details.classes:
        return None
    rows = [
        [each.label, f"{each.support:,}", *map(figure, (each.precision, each.recall, each.f1))]
        for each in details.classes
    ]
    each = "class" if details.confusion else "label"
    return Table([each, "examples", "precision", "recall", "F1"], rows)


def confusion_table(details: FinalTestDetails | None) -> Table | None:
    """Returns how often each class was taken for each; None without any, or for too many."""
    if details is None or not details.confusion or not 0 < len(details.classes) <= _MAX_SHOWN:
        return None
    names = [each.label for each in details.classes]
    rows = [
        [name, *(f"{cell:,}" for cell in row)]
        for name, row in zip(names, details.confusion, strict=True)
    ]
    return Table(["true \\ decided", *names], rows)


def calibration_plot(details: FinalTestDetails | None) -> str | None:
    """Plots accuracy against confidence, above how many decisions have that confidence."""
    if details is None or not details.calibration:
        return None
    bins = details.calibration

    def paint(on: Figure) -> None:
        above, below = on.subplots(2, 1, sharex=True, height_ratios=[3, 1])
        least = min(0.0, *(each.confidence for each in bins))
        above.plot([least, 1], [least, 1], color=MUTED, linewidth=1, linestyle=(0, (3, 2)))
        above.annotate(
            "as confident as right",
            (0.03, 0.03),
            xytext=(14, -2),
            textcoords="offset points",
            color=MUTED,
            fontsize=8.5,
        )
        places = [each.confidence for each in bins]
        above.plot(places, [each.accuracy for each in bins], color=BLUE, marker="o", markersize=5)
        above.set_ylim(-0.02, 1.02)
        above.set_xlim(-0.02, 1.02)
        above.set_ylabel("share that is right")
        below.bar(places, [each.decisions for each in bins], width=0.04, color=ORANGE)
        below.set_ylabel("decisions")
        below.set_xlabel("confidence of the released model in its decision")

    return draw("calibration", "Accuracy by confidence", paint, 1.2 * HEIGHT_IN)
