from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from benchmarks import inference
from benchmarks.deployment import Found
from benchmarks.figures import at_most
from benchmarks.inference_process import _Asked
from edge_client.live import VersionedOutputs


def test_a_part_keeps_what_the_others_found_and_a_broken_check_is_an_error(
    tmp_path: Path,
) -> None:
    def process(folder: Path, quick: bool, found: Found) -> None:
        found.checks.append(at_most("figure", [2.0], 1.0))

    (tmp_path / "inference.json").write_text('{"parts": {"network": {"rows": []}}}')
    before = inference.PARTS["process"]
    inference.PARTS["process"] = process
    try:
        assert inference.main(["--parts", "process", "--out", str(tmp_path)]) == 1
    finally:
        inference.PARTS["process"] = before
    parts = json.loads((tmp_path / "inference.json").read_text())["parts"]
    assert set(parts) == {"network", "process"}
    assert not parts["process"]["checks"][0]["holds"]


class _Mixed:
    """Answers now and then with the outputs of another version than it names."""

    def __init__(self, asked: _Asked) -> None:
        self.asked, self.calls = asked, 0

    def run(self, inputs: object) -> VersionedOutputs:
        self.calls += 1
        self.asked.stop = self.calls >= 100
        value = 2.0 if self.calls % 10 == 0 else 1.0
        return VersionedOutputs(1, {"y": np.full((1, 3), value)})


def test_an_answer_of_another_version_than_it_names_is_found() -> None:
    asked = _Asked()
    asked.ask(_Mixed(asked), {}, {1: np.ones(3)})  # type: ignore[arg-type]
    assert (asked.count, asked.wrong) == (100, 10)
