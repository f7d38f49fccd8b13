from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace

from server.records import CandidateRecord, RunRecord
from server.report.candidates_plot import candidates_plot, dominated
from server.report.svg import BLUE, ORANGE

_FILL = re.compile(r"fill: (#[0-9a-f]{6}); fill-opacity: 0.9")


def drawn(record: RunRecord, candidates: tuple[CandidateRecord, ...]) -> tuple[str, list[str]]:
    svg = candidates_plot(candidates, primary=record.primary, chosen=record.chosen)
    assert svg is not None
    nodes = ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")
    return svg, ["".join(node.itertext()).strip() for node in nodes]


def test_candidates_say_which_was_chosen_and_why_others_were_refused(record: RunRecord) -> None:
    svg, shown = drawn(record, record.candidates)
    assert "fp32, 0.9600" in shown
    assert shown[shown.index("int8_static, 0.9550") + 1] == "chosen"
    assert shown[shown.index("pruned, 0.9000") + 1] == "refused: max_accuracy_drop"
    assert "100 kB" in shown  # a tick of the axis of sizes
    # beaten: grey; chosen; refused: hollow
    assert _FILL.findall(svg) == ["#aab2bd", ORANGE, "#ffffff"]


def test_what_no_other_beats_is_joined_by_a_line(record: RunRecord) -> None:
    fp32, chosen, pruned = record.candidates
    faster = replace(pruned, admitted=True, missed=())
    svg, _ = drawn(record, (fp32, chosen, faster))
    assert _FILL.findall(svg) == ["#aab2bd", ORANGE, BLUE]
    assert dominated((fp32, chosen, faster)) == {"fp32"}


def test_only_an_admitted_candidate_beats_another(record: RunRecord) -> None:
    fp32, chosen, pruned = record.candidates
    assert dominated((fp32, replace(chosen, admitted=False))) == set()
    assert dominated((fp32, replace(fp32, name="equal"))) == set()
    smaller = replace(fp32, name="smaller", bytes=fp32.bytes - 1)
    assert dominated((fp32, smaller)) == {"fp32"}
    assert dominated((replace(fp32, admitted=False), smaller)) == set()
    assert dominated((pruned,)) == set()


def test_a_candidate_that_was_not_measured_is_left_out(record: RunRecord) -> None:
    fp32, chosen, pruned = record.candidates
    for broken in (
        replace(pruned, metric=math.nan),
        replace(pruned, p50_us=math.nan),
        replace(pruned, bytes=0),
    ):
        _, shown = drawn(record, (fp32, chosen, broken))
        assert not any("pruned" in text for text in shown)


def test_a_refusal_of_which_no_limit_is_known_is_shown(record: RunRecord) -> None:
    fp32, chosen, pruned = record.candidates
    _, shown = drawn(record, (fp32, chosen, replace(pruned, missed=())))
    assert shown[shown.index("pruned, 0.9000") + 1] == "refused"
