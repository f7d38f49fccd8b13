"""Formats numbers and names for people, identically on a terminal and in a report."""

from __future__ import annotations

import math
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal

NOTHING = "-"
"""Shown for a missing value."""


def figure(value: float | None, digits: int = 4) -> str:
    """Formats a measured number to ``digits`` digits, with an exponent only where it would be long.

    >>> figure(0.912345), figure(1234.5678), figure(0.00012), figure(None)
    ('0.9123', '1235', '0.00012', '-')
    """
    if value is None or math.isnan(value):
        return NOTHING
    size = abs(value)
    if math.isinf(value) or size >= 1e6 or 0 < size < 10 ** (1 - digits):
        return f"{value:.{digits}g}"
    whole = len(str(int(size))) if size >= 1 else 0
    return f"{value:.{max(0, digits - whole)}f}"


def epsilon_text(epsilon: float | None) -> str:
    """Formats a privacy loss to two decimals, rounded up: never less than was spent.

    >>> epsilon_text(7.421), epsilon_text(None)
    ('7.43', '-')
    """
    if epsilon is None or math.isnan(epsilon):
        return NOTHING
    if epsilon > 1e9:
        return "∞" if math.isinf(epsilon) else "over 10^9"
    return str(Decimal(repr(float(epsilon))).quantize(Decimal("0.01"), ROUND_CEILING))


def epsilon_floor_text(epsilon: float) -> str:
    """Formats the rest of a budget, or a lower bound, to two decimals, rounded down.

    >>> epsilon_floor_text(0.579), epsilon_floor_text(0.004)
    ('0.57', '0.00')
    """
    if not math.isfinite(epsilon):
        return NOTHING if math.isnan(epsilon) else "∞"
    return str(Decimal(repr(float(epsilon))).quantize(Decimal("0.01"), ROUND_FLOOR))


def bytes_text(count: float) -> str:
    """Formats a size in decimal units.

    >>> bytes_text(999), bytes_text(181_250), bytes_text(2_400_000)
    ('999 B', '181 kB', '2.4 MB')
    """
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= 0.9995 * size:  # would round up to 1000 of the smaller unit
            amount = count / size
            return f"{amount:.3g} {unit}" if amount < 999.5 else f"{amount:.0f} {unit}"
    return f"{count:.0f} B"


def seconds_text(seconds: float | None) -> str:
    """Formats a duration, as short as is precise enough; a dash for None.

    >>> seconds_text(0.0421), seconds_text(12.34), seconds_text(754)
    ('0.042 s', '12.3 s', '12 min 34 s')
    """
    if seconds is None or not math.isfinite(seconds):
        return NOTHING
    if seconds >= 120:
        minutes, rest = divmod(round(seconds), 60)
        return f"{minutes} min {rest} s"
    return f"{seconds:.1f} s" if seconds >= 1 else f"{seconds:.2g} s"


def is_or_are(count: int) -> str:
    """Returns the verb for a number of things.

    >>> is_or_are(1), is_or_are(0)
    ('is', 'are')
    """
    return "is" if count == 1 else "are"


def counted(count: int, noun: str, form: str = "") -> str:
    """Formats a number of things, with the number in the format ``form``.

    >>> counted(1, "round"), counted(20, "client"), counted(3000, "step", ",")
    ('1 round', '20 clients', '3,000 steps')
    """
    return f"{count:{form}} {noun}" if count == 1 else f"{count:{form}} {noun}s"


def a_or_an(word: str) -> str:
    """Returns a noun with its article, by its first letter."""
    return f"{'an' if word[:1].lower() in 'aeiou' else 'a'} {word}"
