"""Output of an audit: text, JSON, a PNG of reconstructions, and an HTML report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.resources import files
from io import BytesIO
from pathlib import Path
from string import Template
from typing import Any

from matplotlib.figure import Figure

from fedcore import __version__
from fedcore.files import write_atomic
from fedcore.observability.words import counted, epsilon_floor_text, epsilon_text
from server.privacy.audit import Audited
from server.privacy.inversion import Picture
from server.report.markup import Markup, join, plot, table, tag
from server.report.svg import INK, draw

_ROW_IN = 1.6  # height of a row of pictures
_PROVES = (
    "A lower bound above the stated epsilon refutes the statement. One below it proves nothing: "
    "the audit attacks from outside, and a fault that its canaries do not meet stays hidden."
)


def summary(audited: Sequence[Audited], pictures: Sequence[Picture]) -> dict[str, Any]:
    """Returns the findings as a JSON-compatible dict."""
    return {
        "refuted": any(one.refuted for one in audited),
        "statements": [_statement(one) for one in audited],
        "inversion": [
            {f"{guess}_psnr_db": value for guess, value in picture.psnr_db().items()}
            for picture in pictures
        ],
    }


def _statement(one: Audited) -> dict[str, Any]:
    charge = one.statement.plan.charge
    return {
        "name": one.statement.name,
        "noise_multiplier": charge.noise_multiplier,
        "sample_rate": charge.sample_rate,
        "steps": charge.steps,
        "clip_norm": one.statement.plan.clip_norm,
        "target_delta": one.statement.target_delta,
        "stated_epsilon": one.stated,
        "audited_epsilon": one.epsilon,
        "confidence": one.confidence,
        "refuted": one.refuted,
        "seeds": [
            {
                "seed": seed.seed,
                "repeated_epsilon": seed.repeated,
                "one_run_epsilon": seed.one_run,
                "measured_noise": seed.measured_noise,
            }
            for seed in one.seeds
        ],
    }


def text(audited: Sequence[Audited], pictures: Sequence[Picture]) -> str:
    """Returns the findings as text for a terminal."""
    lines = []
    for one in audited:
        lines += [
            f"{one.statement.name}: {_mechanism(one)}",
            f"  stated epsilon {epsilon_text(one.stated)} at delta {one.statement.target_delta:g}; "
            f"audited at least {epsilon_floor_text(one.epsilon)} (confidence {one.confidence:.1%})",
            f"  {'seed':>4}  {'repeated':>8}  {'one run':>8}  {'noise seen':>10}",
        ]
        lines += [f"  {'  '.join(_padded(cells))}" for cells in _cells(one)]
        lines.append(f"  {_verdict(one)}")
    if pictures:
        lines.append(
            "gradient inversion, PSNR in dB (a blind guess is the mean of other pictures):"
        )
        lines += [f"  {line}" for line in _picture_lines(pictures)]
    return "\n".join(lines)


def _padded(cells: Sequence[str]) -> list[str]:
    return [cell.rjust(width) for cell, width in zip(cells, (4, 8, 8, 10), strict=True)]


def _cells(one: Audited) -> list[tuple[str, str, str, str]]:
    return [
        (
            str(s.seed),
            epsilon_floor_text(s.repeated),
            epsilon_floor_text(s.one_run),
            f"{s.measured_noise:.3f}",
        )
        for s in one.seeds
    ]


def _mechanism(one: Audited) -> str:
    charge = one.statement.plan.charge
    return (
        f"noise multiplier {charge.noise_multiplier:g}, {counted(charge.steps, 'step')} at sample "
        f"rate {charge.sample_rate:.3g}, clip norm {one.statement.plan.clip_norm:g}"
    )


def _verdict(one: Audited) -> str:
    if one.refuted:
        return "REFUTED: more can be told from the releases than the statement allows"
    return "not refuted"


def _picture_lines(pictures: Sequence[Picture]) -> list[str]:
    return [
        f"without privacy {psnr['without']:.1f}, with {psnr['private']:.1f}, "
        f"blind guess {psnr['blind']:.1f}"
        for psnr in (picture.psnr_db() for picture in pictures)
    ]


def write_report(folder: Path, audited: Sequence[Audited], pictures: Sequence[Picture]) -> None:
    """Writes a self-contained ``report.html``, and ``inversion.png`` if there are pictures."""
    write_atomic(folder / "report.html", report_html(audited, pictures).encode())
    if pictures:
        write_atomic(folder / "inversion.png", pictures_png(pictures))


def report_html(audited: Sequence[Audited], pictures: Sequence[Picture]) -> str:
    """Returns the findings as one HTML page, in the style of a run's report."""
    folder = files("server.report")
    page = Template((folder / "report.html").read_text("utf-8"))
    return page.substitute(
        title=join(["Privacy audit - fedcore"]),
        style=(folder / "report.css").read_text("utf-8"),
        body=join(
            (
                tag("header", tag("h1", "Privacy audit"), tag("p", _PROVES, class_="sub")),
                *(_section(one) for one in audited),
                _inversion(pictures),
                tag("footer", f"Written by fedcore {__version__}."),
            )
        ),
    )


def _section(one: Audited) -> Markup:
    said = (
        f"{_mechanism(one)}. Stated: epsilon {epsilon_text(one.stated)} at delta "
        f"{one.statement.target_delta:g}. Audited: at least {epsilon_floor_text(one.epsilon)}, at "
        f"a confidence of {one.confidence:.1%} over all seeds and both bounds together."
    )
    return tag(
        "section",
        tag("h2", one.statement.name),
        tag("p", said),
        tag("p", _verdict(one), **({"class_": "warning"} if one.refuted else {})),
        table(("seed", "repeated releases", "one run", "noise seen"), _cells(one)),
    )


def _inversion(pictures: Sequence[Picture]) -> Markup:
    if not pictures:
        return Markup()
    drawn = draw(
        "inversion",
        "digits, and what an attacker made of updates without and with privacy",
        _painter(pictures),
        _ROW_IN * len(pictures),
    )
    return tag(
        "section",
        tag("h2", "Gradient inversion"),
        tag(
            "p",
            "One client's update from one picture, inverted by a server that chose the start "
            "weights and knows the label.",
        ),
        tag("div", plot(drawn, "PSNR against the original. " + _CAPTION), class_="plots"),
    )


_CAPTION = "A blind guess, the mean of all other digits, needs no update at all."


def pictures_png(pictures: Sequence[Picture]) -> bytes:
    """Draws originals and reconstructions side by side, one row per picture."""
    figure = Figure(figsize=(6.0, _ROW_IN * len(pictures)), layout="constrained")
    _painter(pictures)(figure)
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=120, metadata={"Software": None})
    return buffer.getvalue()


def _painter(pictures: Sequence[Picture]) -> Callable[[Figure], None]:
    def paint(on: Figure) -> None:
        grid = on.subplots(len(pictures), 4, squeeze=False)
        for row, picture in zip(grid, pictures, strict=True):
            psnr = picture.psnr_db()
            shown = (
                ("original", picture.original),
                (f"without privacy\n{psnr['without']:.1f} dB", picture.without),
                (f"with privacy\n{psnr['private']:.1f} dB", picture.private),
                (f"blind guess\n{psnr['blind']:.1f} dB", picture.blind),
            )
            for axes, (title, pixels) in zip(row, shown, strict=True):
                # Cells, not an image: the page's content policy forbids even embedded images.
                axes.pcolormesh(pixels.numpy()[::-1], cmap="gray", vmin=0, vmax=1)
                axes.set_title(title, fontsize=8, color=INK)
                axes.set_aspect("equal")
                axes.set_axis_off()

    return paint
