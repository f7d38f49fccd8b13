"""Ten thousand inputs of every format that somebody else may write; a campaign reads a million.

What the formats are, and what an input is held to, stands in `tests.fuzz`. One that fails is made
smaller, and written to a file that the failure names.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.fuzz.drive import ACCEPTED, FORMATS, SHARES, fuzz

INPUTS = int(os.environ.get("FEDCORE_FUZZ_INPUTS", "10000"))
"""Of all formats together."""


def test_every_format_has_its_share() -> None:
    assert SHARES.keys() == FORMATS.keys()
    assert sum(SHARES.values()) == pytest.approx(1)


@pytest.mark.parametrize("name", FORMATS)
def test_every_input_gives_a_value_or_an_error_of_ours(name: str, tmp_path: Path) -> None:
    count = round(SHARES[name] * INPUTS)
    told = fuzz(name, count, seed=1, shrinks=True, failing=tmp_path)
    assert not told.failures
    assert told.inputs >= count
    # Neither does the first check stop them all, nor are they all harmless.
    assert told.outcomes[ACCEPTED] > count / 200
    assert count - told.outcomes[ACCEPTED] > count / 20
    assert len(told.reasons) >= 10
