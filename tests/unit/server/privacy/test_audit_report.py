from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fedcore.privacy.accounting import Charge
from fedcore.privacy.planning import PrivatePlan
from server.privacy.audit import Audited, SeedBounds, Statement
from server.privacy.audit_report import report_html, summary, text, write_report
from server.privacy.inversion import Picture

SEEDS = (SeedBounds(1, 3.999, 1.2, 1.001), SeedBounds(2, 3.5, 1.4, 0.998))


def audited(stated: float = 4.381) -> Audited:
    plan = PrivatePlan(Charge(1, 1.0, 1.0, 1), 0.5)
    return Audited(Statement("one <step>", plan, 1e-5), stated, SEEDS, 0.95)


@pytest.fixture
def picture() -> Picture:
    original = torch.eye(8)
    return Picture(original, original + 0.001, torch.full((8, 8), 0.5), torch.full((8, 8), 0.4))


def test_bounds_are_rounded_down_and_what_is_stated_up(picture: Picture) -> None:
    said = text([audited()], [picture])
    assert "stated epsilon 4.39 at delta 1e-05; audited at least 3.99" in said
    assert "not refuted" in said
    assert "without privacy 60.0, with 6.0, blind guess" in said


def test_a_refuted_statement_says_so_everywhere() -> None:
    one = audited(stated=3.9)
    assert one.refuted
    assert "REFUTED" in text([one], [])
    assert "REFUTED" in report_html([one], [])
    assert summary([audited(), one], [])["refuted"] is True


def test_the_summary_is_json_with_every_seed(picture: Picture) -> None:
    found = json.loads(json.dumps(summary([audited()], [picture]), allow_nan=False))
    (statement,) = found["statements"]
    assert statement["audited_epsilon"] == 3.999
    assert [seed["one_run_epsilon"] for seed in statement["seeds"]] == [1.2, 1.4]
    assert found["inversion"][0]["without_psnr_db"] == pytest.approx(60, abs=0.01)


def test_the_page_needs_nothing_but_itself(tmp_path: Path, picture: Picture) -> None:
    write_report(tmp_path / "new", [audited()], [picture])
    page = (tmp_path / "new" / "report.html").read_text()
    assert "one &lt;step&gt;" in page
    assert "<svg" in page
    assert "<image" not in page  # the page's own policy would not show it
    assert "http://" not in page.replace("http://www.w3.org/", "")
    assert (tmp_path / "new" / "inversion.png").read_bytes().startswith(b"\x89PNG")


def test_without_pictures_no_picture_is_written(tmp_path: Path) -> None:
    write_report(tmp_path, [audited()], [])
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
