"""A real browser shows the report: nothing to complain about, and nothing wider than a phone."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from matplotlib.image import imread

from server.records import CandidateRecord, ClientRecord, RoundRecord, RunRecord
from server.report.html import report_html
from server.report.summary import summary

PHONE_PX = 400
_BROWSER = next(
    (
        found
        for name in ("chromium", "chromium-browser", "google-chrome")
        if (found := shutil.which(name))
    ),
    None,
)
pytestmark = pytest.mark.skipif(_BROWSER is None, reason="no chromium on PATH")

# Reports the widths of the page that it stands in to the page around it.
_MEASURE = """<script>addEventListener("load", () => parent.postMessage(
  [document.documentElement.scrollWidth, innerWidth, document.querySelectorAll("svg").length]
  .join(" "), "*"))</script>"""
_AROUND = """<!DOCTYPE html><body><output></output><iframe width="{width}" height="3000"
  style="border:0" src="inner.html"></iframe><script>addEventListener("message", (event) => {{
  document.querySelector("output").textContent = event.data }})</script></body>"""


def browse(page: Path, *arguments: str) -> tuple[str, str]:
    """What chromium prints for a page, on its output and on its error stream."""
    assert _BROWSER is not None
    done = subprocess.run(
        [
            _BROWSER,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-quic",
            "--disable-sync",
            "--disable-background-networking",
            "--disable-component-update",
            "--no-first-run",
            "--enable-logging=stderr",
            "--virtual-time-budget=3000",
            f"--user-data-dir={page.parent / 'profile'}",
            *arguments,
            page.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return done.stdout, done.stderr


@pytest.fixture(scope="module")
def page() -> str:
    """A report with long names, which are what makes a page too wide."""
    long = "a-name-without-any-place-to-break-" * 4
    record = RunRecord(
        name=long,
        task=long,
        kind="classification",
        primary="accuracy",
        higher_is_better=True,
        device="cpu",
        noise="simulated",
        rounds=tuple(
            RoundRecord(
                round=number,
                rounds=5,
                seconds=0.5,
                cohort=20,
                updates=20,
                declined=0,
                failed=0,
                train_loss=0.5,
                metrics={"accuracy": 0.15 * number},
                judged_on="cloud",
                epsilon_max=1.0 * number,
                bytes_up=1000,
                bytes_down=2000,
            )
            for number in range(1, 6)
        ),
        best_round=5,
        clients=tuple(ClientRecord(f"{long}{n}", 10 + n, 0.7, 4.0 + n, 5) for n in range(5)),
        candidates=(
            CandidateRecord(
                name="fp32",
                metric=0.9,
                drop=0.0,
                agreement=1.0,
                max_abs_error=0.0,
                bytes=1000,
                sha256="ab" * 32,
                p50_us=9.0,
                p50_min_us=8.0,
                p50_max_us=10.0,
                admitted=True,
                reason=long,
            ),
        ),
        chosen="fp32",
        scores={"accuracy": {"federated": 0.8, "released": 0.9}},
        stages={long: 1.0},
        notes=(long,),
    )
    figures = summary(record, target_delta=1e-3, torch_p50_us=70.0, seconds=5.0)
    return report_html(record, figures)


def test_the_browser_has_nothing_to_complain_about(tmp_path: Path, page: str) -> None:
    (tmp_path / "report.html").write_text(page, "utf-8")
    dom, log = browse(tmp_path / "report.html", "--dump-dom")
    assert "CONSOLE" not in log
    assert dom.count("<svg") == 6


def test_the_console_is_heard(tmp_path: Path, page: str) -> None:
    """The page's own policy refuses a script, and the log says so: silence means something."""
    broken = page.replace("</body>", "<script>1</script></body>")
    (tmp_path / "report.html").write_text(broken, "utf-8")
    _, log = browse(tmp_path / "report.html", "--dump-dom")
    assert "CONSOLE" in log
    assert "Content Security Policy" in log


def test_nothing_is_wider_than_a_phone(tmp_path: Path, page: str) -> None:
    # The script that measures would be refused by the page's policy; the folded parts are opened.
    copy = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page)
    copy = copy.replace("<details>", "<details open>").replace("</body>", f"{_MEASURE}</body>")
    (tmp_path / "inner.html").write_text(copy, "utf-8")
    (tmp_path / "outer.html").write_text(_AROUND.format(width=PHONE_PX), "utf-8")
    dom, _ = browse(tmp_path / "outer.html", "--dump-dom")
    measured = re.search(r"<output>(\d+) (\d+) (\d+)</output>", dom)
    assert measured is not None, dom
    scroll_px, inner_px, plots = (int(number) for number in measured.groups())
    assert inner_px == PHONE_PX
    assert plots == 6
    assert scroll_px <= PHONE_PX


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_can_be_pictured(tmp_path: Path, page: str, scheme: str) -> None:
    (tmp_path / "report.html").write_text(page, "utf-8")
    picture = tmp_path / "page.png"
    dark = ["--blink-settings=preferredColorScheme=0"] if scheme == "dark" else []
    browse(tmp_path / "report.html", f"--screenshot={picture}", "--window-size=1200,3000", *dark)
    assert picture.read_bytes().startswith(b"\x89PNG")
    corner = imread(picture)[5, 5, :3].mean()
    assert (corner > 0.9) if scheme == "light" else (corner < 0.2)
