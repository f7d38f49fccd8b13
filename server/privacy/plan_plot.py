"""Plot of a privacy plan: epsilon by round, and the noise under other settings."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from fedcore.files import write_atomic
from fedcore.observability.words import counted, epsilon_text
from server.privacy.plan import ExamplePrivacyPlan, Question
from server.report.svg import BLUE, MUTED, ORANGE

_SIZE_IN, _DOTS_PER_INCH = (11.0, 4.2), 150


def plot(answer: ExamplePrivacyPlan, file: Path) -> None:
    """Writes the plot; the file's extension determines its format.

    Raises:
        DiskFull: the disk is full.
        ResourceError: the file isn't writable.
    """
    figure = Figure(figsize=_SIZE_IN, dpi=_DOTS_PER_INCH, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(1.0, 1.3))
    _epsilons(left, answer, answer.question)
    _noises(right, answer)
    found = answer.forecast
    figure.suptitle(
        f"{counted(found.examples, 'example', ',')}, noise multiplier {found.noise_multiplier:g}, "
        f"{counted(found.steps_per_round, 'step', ',')} a round"
    )
    drawn = BytesIO()
    figure.savefig(drawn, format=file.suffix[1:].lower())
    write_atomic(file, drawn.getvalue())


def _epsilons(axes: Axes, answer: ExamplePrivacyPlan, question: Question) -> None:
    rounds, epsilons = zip(*answer.epsilons, strict=True)
    axes.plot(rounds, epsilons, color=BLUE, marker="o", markersize=3, label="spent")
    budget = question.privacy.max_epsilon
    if max(epsilons) > 0.2 * budget:  # otherwise the budget line would flatten the curve
        axes.axhline(budget, color=ORANGE, linestyle="--", label=f"budget {budget:g}")
    axes.set_ylim(bottom=0)
    axes.set_xlim(left=0)
    axes.set_xlabel("rounds that the client took part in")
    axes.set_ylabel(f"epsilon at delta {question.privacy.target_delta:g}")
    axes.set_title("What is spent")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")


def _noises(axes: Axes, answer: ExamplePrivacyPlan) -> None:
    shown = [("as planned", answer.forecast)]
    shown += [(each.change, each.forecast) for each in answer.what_if if each.forecast]
    names = [name.replace(" (", "\n(") for name, _ in shown][::-1]
    noises = [100 * forecast.run_noise for _, forecast in shown][::-1]
    colours = [MUTED] * (len(shown) - 1) + [BLUE]
    bars = axes.barh(names, noises, color=colours)
    labels = [
        f"{noise:.3g} %  (noise {forecast.noise_multiplier:.3g}, epsilon "
        f"{epsilon_text(forecast.epsilon)})"
        for noise, (_, forecast) in zip(noises, shown[::-1], strict=True)
    ]
    axes.bar_label(bars, labels, padding=4, fontsize=8)
    axes.set_xlim(0, 2.2 * max(noises))
    axes.set_xlabel("noise in the mean gradient over all rounds, % of clip_norm")
    axes.set_title("What would help")
