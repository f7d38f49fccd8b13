from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import replace

import matplotlib
import pytest

from server.records import RunRecord
from server.report.candidates_plot import candidates_plot
from server.report.client_plot import clients_plot
from server.report.plots import bytes_plot, rounds_plot, scores_plot
from server.report.svg import shortened

SVG = "{http://www.w3.org/2000/svg}"


DRAW: dict[str, Callable[[RunRecord], str | None]] = {
    "rounds": lambda record: rounds_plot(
        record.rounds,
        primary=record.primary,
        higher_is_better=record.higher_is_better,
        best_round=record.best_round,
    ),
    "bytes": lambda record: bytes_plot(record.rounds),
    "candidates": lambda record: candidates_plot(
        record.candidates, primary=record.primary, chosen=record.chosen
    ),
    "clients": lambda record: clients_plot(
        record.clients, primary=record.primary, higher_is_better=record.higher_is_better
    ),
    "scores": lambda record: scores_plot(
        record.scores.get(record.primary, {}),
        primary=record.primary,
        higher_is_better=record.higher_is_better,
    ),
}


def plots_of(record: RunRecord) -> dict[str, str | None]:
    return {name: draw(record) for name, draw in DRAW.items()}


def texts(svg: str | None) -> list[str]:
    assert svg is not None
    return [
        "".join(node.itertext()).strip() for node in ElementTree.fromstring(svg).iter(f"{SVG}text")
    ]


def test_every_plot_is_one_svg_that_scales_and_says_what_it_is(record: RunRecord) -> None:
    for name, svg in plots_of(record).items():
        assert svg is not None, name
        root = ElementTree.fromstring(svg)
        assert root.tag == f"{SVG}svg"
        assert root.get("viewBox")
        assert root.get("width") is None
        assert root.get("role") == "img"
        assert root.get("aria-label")


def test_ids_are_told_apart_by_plot_and_every_reference_is_met(record: RunRecord) -> None:
    seen: set[str] = set()
    for name, svg in plots_of(record).items():
        assert svg is not None
        ids = re.findall(r' id="([^"]*)"', svg)
        assert len(ids) == len(set(ids))
        assert all(each.startswith(f"{name}-") for each in ids)
        references = set(re.findall(r'href="#([^"]*)"|url\(#([^)]*)\)', svg))
        assert {one or other for one, other in references} <= set(ids)
        assert not seen & set(ids)
        seen |= set(ids)


def test_the_same_record_gives_the_same_bytes(record: RunRecord) -> None:
    assert plots_of(record) == plots_of(record)


def test_drawing_leaves_matplotlib_as_it_was(record: RunRecord) -> None:
    before = dict(matplotlib.rcParams)
    plots_of(record)
    assert dict(matplotlib.rcParams) == before


def test_no_plot_holds_an_image_or_an_address(record: RunRecord) -> None:
    for svg in plots_of(record).values():
        assert svg is not None
        assert "<image" not in svg
        assert "data:" not in svg
        assert set(re.findall(r"https?://[^\"< ]*", svg)) == {
            "http://www.w3.org/2000/svg",
            "http://www.w3.org/1999/xlink",
        }


def test_rounds_mark_the_best_and_show_epsilon_only_where_there_is_some(record: RunRecord) -> None:
    shown = texts(DRAW["rounds"](record))
    assert "best: round 3, 0.7500" in shown
    assert "epsilon spent (max)" in shown
    assert "accuracy (higher is better)" in shown
    public = replace(record, rounds=tuple(replace(r, epsilon_max=None) for r in record.rounds))
    assert "epsilon spent (max)" not in texts(DRAW["rounds"](public))


def test_one_round_has_one_tick(record: RunRecord) -> None:
    one = replace(record, rounds=record.rounds[:1], best_round=1, higher_is_better=False)
    shown = texts(DRAW["rounds"](one))
    assert "accuracy (lower is better)" in shown
    assert "1" in shown
    assert "up 1 kB" in texts(DRAW["bytes"](one))


def test_bytes_are_added_up(record: RunRecord) -> None:
    shown = texts(DRAW["bytes"](record))
    assert "up 3 kB" in shown
    assert "down 6 kB" in shown


def test_clients_show_their_median_and_epsilon(record: RunRecord) -> None:
    shown = texts(DRAW["clients"](record))
    assert "median 0.7500" in shown
    assert "epsilon spent" in shown
    public = replace(record, clients=tuple(replace(c, epsilon=None) for c in record.clients))
    assert "epsilon spent" not in texts(DRAW["clients"](public))


def test_scores_name_the_models_and_their_values(record: RunRecord) -> None:
    shown = texts(DRAW["scores"](record))
    for text in ("federated", "cloud alone", "fine-tuned", "released", "0.8600", "0.9500"):
        assert text in shown


def test_nothing_to_see_is_none(record: RunRecord) -> None:
    bare = replace(record, rounds=(), clients=(), candidates=(), scores={})
    assert set(plots_of(bare).values()) == {None}
    silent = tuple(replace(r, metrics={}, epsilon_max=None) for r in record.rounds)
    assert DRAW["rounds"](replace(record, rounds=silent)) is None


@pytest.mark.parametrize(
    "name", [r"$\frac{1}$", '<script>alert(1)</script> id="x"', "a\x00b\x1b", "准确率"]
)
def test_names_are_shown_as_they_are(record: RunRecord, name: str) -> None:
    rounds = tuple(replace(r, metrics={name: 0.5}) for r in record.rounds)
    svg = DRAW["rounds"](replace(record, primary=name, rounds=rounds))
    assert f"{shortened(name, 24)} (higher is better)" in texts(svg)
    assert svg is not None
    assert "<script" not in svg
