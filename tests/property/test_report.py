"""Whatever a run was, its report can be read: by a browser, an XML parser and a JSON parser."""

from __future__ import annotations

import json
import math
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from fedcore.artifacts.manifest import FileEntry, Lineage, Manifest, Parity, PrivacyStatement
from server.records import CandidateRecord, ClientRecord, RoundRecord, RunRecord
from server.report.html import report_html
from server.report.summary import MODELS, summary

NAMES = st.text(max_size=12) | st.sampled_from(
    ["<script>", 'a" onload="b', "$\\frac", "-->", "&lt;"]
)
NUMBERS = st.floats()  # NaN, infinities and numbers no axis can hold among them
COUNTS = st.integers(0, 2**62)
DIGESTS = st.text("0123456789abcdef", min_size=64, max_size=64)
MAYBE = st.none() | NUMBERS
EPSILON = st.none() | st.floats(min_value=0) | st.just(math.nan)

ROUNDS = st.builds(
    RoundRecord,
    round=st.integers(1, 1000),
    rounds=st.integers(1, 1000),
    seconds=NUMBERS,
    cohort=COUNTS,
    updates=COUNTS,
    declined=COUNTS,
    failed=COUNTS,
    train_loss=MAYBE,
    metrics=st.dictionaries(st.just("metric") | NAMES, NUMBERS, max_size=2),
    judged_on=st.sampled_from(["cloud", "clients", "nothing"]),
    epsilon_max=EPSILON,
    bytes_up=COUNTS,
    bytes_down=COUNTS,
)
CLIENTS = st.builds(
    ClientRecord, client=NAMES, examples=COUNTS, metric=NUMBERS, epsilon=EPSILON, rounds=COUNTS
)
CANDIDATES = st.builds(
    CandidateRecord,
    name=st.sampled_from(["fp32", "pruned"]) | NAMES,
    metric=NUMBERS,
    drop=NUMBERS,
    agreement=NUMBERS,
    max_abs_error=NUMBERS,
    bytes=COUNTS,
    sha256=DIGESTS,
    p50_us=NUMBERS,
    p50_min_us=NUMBERS,
    p50_max_us=NUMBERS,
    admitted=st.booleans(),
    reason=NAMES,
)
FILES = st.builds(FileEntry, path=NAMES, sha256=DIGESTS, length=st.integers(1, 2**31))
MANIFESTS = st.builds(
    Manifest,
    format=st.just(1),
    model=NAMES,
    version=st.integers(1, 1000),
    created=NAMES,
    kind=st.just("regression"),
    labels=st.just(()),
    input_shape=st.just((3,)),
    input_dtype=NAMES,
    onnx=FILES,
    golden=FILES,
    golden_tolerance=st.just(0.1),
    lineage=st.builds(
        Lineage,
        run=NAMES,
        round=COUNTS,
        parent_sha256=DIGESTS,
        finetuned=st.booleans(),
        candidate=NAMES,
        config_sha256=DIGESTS,
        seed=COUNTS,
        calibration=NAMES,
        rollback_of=st.none() | COUNTS,
    ),
    privacy=st.just(
        PrivacyStatement(unit="example", epsilon=1.0, target_delta=1e-5, noise="system")
    ),
    parity=st.just(
        Parity(
            max_abs_error=0.1, agreement=1.0, metric="metric", metric_before=0.5, metric_after=0.5
        )
    ),
)
RECORDS = st.builds(
    RunRecord,
    name=NAMES,
    task=NAMES,
    kind=NAMES,
    primary=st.just("metric") | NAMES,
    higher_is_better=st.booleans(),
    device=NAMES,
    noise=st.sampled_from(["none", "simulated", "system"]),
    rounds=st.lists(ROUNDS, max_size=3).map(tuple),
    best_round=st.integers(0, 1000),
    clients=st.lists(CLIENTS, max_size=3).map(tuple),
    candidates=st.lists(CANDIDATES, max_size=3).map(tuple),
    chosen=st.none() | st.sampled_from(["fp32", "pruned"]),
    manifest=st.none() | MANIFESTS,
    scores=st.dictionaries(
        st.just("metric") | NAMES, st.dictionaries(st.sampled_from(sorted(MODELS)), NUMBERS)
    ),
    stages=st.dictionaries(NAMES, NUMBERS, max_size=3),
    notes=st.lists(NAMES, max_size=3).map(tuple),
)


class Balanced(HTMLParser):
    """Follows which elements are open, and keeps every attribute's name."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes |= {name for name, _ in attrs}
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes |= {name for name, _ in attrs}

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


# Drawing takes too long for an example to be shrunk; it is shown as it was found.
@settings(
    max_examples=12,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.too_slow],
)
@given(record=RECORDS, delta=st.none() | st.floats(0, 1), seconds=st.floats(0, 1e6))
def test_every_run_has_a_report(record: RunRecord, delta: float | None, seconds: float) -> None:
    figures = summary(record, target_delta=delta, torch_p50_us=None, seconds=seconds)
    json.dumps(figures, allow_nan=False)
    page = report_html(record, figures)
    page.encode()
    parser = Balanced()
    parser.feed(page)
    parser.close()
    assert parser.open == []
    assert not {name for name in parser.attributes if name.startswith("on")}
    assert "<script" not in page
    for svg in re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL):
        ElementTree.fromstring(svg)
