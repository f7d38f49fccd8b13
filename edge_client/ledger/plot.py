"""Plot of epsilon by round. Needs matplotlib, which is an optional dependency."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from fedcore.errors import ResourceError
from fedcore.files import check_picture, write_atomic
from fedcore.observability.words import epsilon_text

if TYPE_CHECKING:
    from edge_client.ledger.view import LedgerView

_MAX_RUNS = 8
"""Most runs in a plot with a legend."""


def check_plot(path: Path) -> None:
    """Checks that a plot can be written to ``path``, before the slow composition of charges.

    Raises:
        ConfigError: the path's suffix is not an image format.
        ResourceError: matplotlib is not installed, or the file cannot be written.
        DiskFull: there is no room.
    """
    check_picture(path, option="--plot")
    try:
        import matplotlib.figure  # noqa: F401
    except ModuleNotFoundError:
        raise ResourceError(
            f"{path}: a plot needs matplotlib, which is not installed here. Nothing was drawn; "
            "`pip install matplotlib`, or plot it elsewhere from `fedcore privacy show --json`."
        ) from None


def plot_ledger(view: LedgerView, path: Path) -> None:
    """Draws a curve per run, with the device's epsilon and the owner's budget as lines.

    Args:
        view: The composed ledger.
        path: Image file, which has passed `check_plot`.

    Raises:
        ResourceError: the file cannot be written.
        DiskFull: there is no room.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(8, 4.5), dpi=144, layout="constrained")
    axes = figure.add_subplot()
    for run in view.runs:
        places = [0, *(line.place for line in run.lines)]
        values = [0.0, *(line.epsilon for line in run.lines)]
        axes.plot(
            places,
            values,
            marker="o" if len(places) <= 40 else "",
            markersize=4,
            label=f"run {run.name}, delta {run.target_delta:g}",
        )
    whole = view.totals[0]
    axes.axhline(
        whole.epsilon,
        color="#555555",
        linestyle=":",
        label=f"device, all runs: {epsilon_text(whole.epsilon)} at delta {whole.target_delta:g}",
    )
    if whole.max_epsilon is not None:
        axes.axhline(
            whole.max_epsilon,
            color="#b3261e",
            linestyle="--",
            label=f"owner's budget: {whole.max_epsilon:g}",
        )
    axes.set_xlabel("round of the run that was charged for")
    axes.set_ylabel("epsilon spent")
    axes.set_ylim(bottom=0)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    title = f"Privacy spent, by {view.accountant.upper()} accounting"
    if view.problems:
        title += "; the ledger is damaged: lower bounds"
    axes.set_title(title, loc="left")
    if len(view.runs) <= _MAX_RUNS:
        axes.legend(frameon=False, fontsize="small")
    drawn = BytesIO()
    figure.savefig(drawn, format=path.suffix[1:].lower())
    write_atomic(path, drawn.getvalue())
