"""Reasons in reports of releases."""

from __future__ import annotations

import pytest

from fedcore.rpc.delivery import MAX_REASON, reason_text


@pytest.mark.parametrize(
    "text", ["x" * MAX_REASON, "x" * 10**6, "\x1b" * MAX_REASON, "\ud800" * 600]
)
def test_whatever_a_reason_holds_it_fits_into_a_report(text: str) -> None:
    found = reason_text(text)
    assert 0 < len(found) <= MAX_REASON
    assert found.isascii()
    assert found.isprintable()


def test_a_short_reason_is_kept() -> None:
    assert reason_text("self-test: 0.2 off") == "self-test: 0.2 off"
