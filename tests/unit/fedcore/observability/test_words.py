from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedcore.observability.words import (
    NOTHING,
    bytes_text,
    counted,
    epsilon_text,
    figure,
    seconds_text,
)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.912345, "0.9123"),
        (1.0, "1.000"),
        (12.3456, "12.35"),
        (123456.7, "123457"),
        (-0.5, "-0.5000"),
        (0.0, "0.0000"),
        (0.00012, "0.00012"),
        (1.5e9, "1.5e+09"),
        (math.inf, "inf"),
        (math.nan, NOTHING),
        (None, NOTHING),
    ],
)
def test_figure(value: float | None, text: str) -> None:
    assert figure(value) == text


@given(st.floats(min_value=0, max_value=1e9))
def test_epsilon_is_never_understated(epsilon: float) -> None:
    assert epsilon <= float(epsilon_text(epsilon)) <= epsilon + 0.011


def test_epsilon_at_the_edges() -> None:
    assert epsilon_text(7.42) == "7.42"
    assert epsilon_text(7.421) == "7.43"
    assert epsilon_text(None) == epsilon_text(math.nan) == NOTHING
    assert epsilon_text(math.inf) == "∞"
    assert epsilon_text(1e300) == "over 10^9"


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (181_250, "181 kB"),
        (999_499, "999 kB"),
        (999_999, "1 MB"),
        (2_400_000, "2.4 MB"),
        (5_000_000_000_000, "5000 GB"),
    ],
)
def test_bytes(count: int, text: str) -> None:
    assert bytes_text(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0421, "0.042 s"), (12.34, "12.3 s"), (754.4, "12 min 34 s"), (None, NOTHING)],
)
def test_seconds(seconds: float | None, text: str) -> None:
    assert seconds_text(seconds) == text


def test_counted() -> None:
    assert [counted(n, "round") for n in (0, 1, 2)] == ["0 rounds", "1 round", "2 rounds"]
