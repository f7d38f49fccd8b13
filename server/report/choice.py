"""The choice among compression candidates in one sentence, for the report and the summary."""

from __future__ import annotations

from collections.abc import Sequence

from fedcore.observability.words import bytes_text, counted, figure
from server.records import CandidateRecord

_FP32 = "fp32"
_SHOWN = 4
"""Most smaller candidates that are named."""


def why_chosen(
    candidates: Sequence[CandidateRecord], chosen: str | None, *, primary: str
) -> str | None:
    """Explains the choice: among how many, what it gains, and what ruled smaller ones out.

    Args:
        candidates: The candidates with their verdicts.
        chosen: The name of the chosen one.
        primary: The name of the primary metric.

    Returns:
        One sentence; None if none was chosen.
    """
    best = next((each for each in candidates if each.name == chosen), None)
    if best is None:
        return None
    built = [each for each in candidates if each.bytes]
    admitted = [each for each in built if each.admitted]
    if len(built) == 1:
        place = "is the only candidate that was built"
    elif len(admitted) == 1:
        place = f"is the only one of {counted(len(built), 'candidate')} that keeps every limit"
    else:
        place = (
            f"is the smallest of the {len(admitted)} that keep every limit, of "
            f"{counted(len(built), 'candidate')}"
        )
    size = f"{best.name} ({bytes_text(best.bytes)}, {figure(best.p50_us, 3)} us)"
    return f"{size} {place}{_gain(best, built, primary)}{_smaller(best, built)}."


def _gain(best: CandidateRecord, built: Sequence[CandidateRecord], primary: str) -> str:
    """Compares the chosen candidate with fp32; empty if it is fp32."""
    base = next((each for each in built if each.name == _FP32), best)
    if base is best:
        return ""
    return (
        f", with {best.bytes / base.bytes:.0%} of the bytes and {best.p50_us / base.p50_us:.0%} of "
        f"the time of fp32, and {primary} {figure(best.metric)} after {figure(base.metric)} on "
        "held-out data"
    )


def _smaller(best: CandidateRecord, built: Sequence[CandidateRecord]) -> str:
    """Names the smaller candidates, with the limits that they miss; empty without any."""
    smaller = sorted(
        (each for each in built if each.bytes < best.bytes), key=lambda each: each.bytes
    )
    if not smaller:
        return ""
    named = [f"{each.name} misses {_limits(each)}" for each in smaller[:_SHOWN]]
    more = len(smaller) - len(named)
    named += [f"{more} more miss others"] if more else []
    return f"; smaller ones were refused: {', '.join(named)}"


def _limits(refused: CandidateRecord) -> str:
    return " and ".join(refused.missed) or "a limit"  # records of earlier versions name none
