"""Choice among measured candidates: limits filter, and the smallest admitted file wins."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from fedcore.config.run import Compression
from fedcore.errors import CompressionError
from server.records import CandidateRecord

# A drop from 0.90 to 0.89 is 0.010000000000000009 in floating point, and meets a limit of 0.01.
_ROUNDING = 1e-9
_FP32 = "fp32"
_UNNOTED = 0.05
"""A chosen candidate that is slower than fp32 by more than this share is noted."""
_UNJUDGED = (
    "was trained on the cloud's data, which clients judge, and devices run no file before it is "
    "signed (finetune.judge = 'cloud' lets the cloud judge)"
)
_LIMITS = ("max_accuracy_drop", "min_agreement", "max_bytes", "max_p50_us")
_Missed = dict[str, str]
"""What a candidate misses: by the name of the limit, in words."""


def choose(
    records: Sequence[CandidateRecord], limits: Compression, *, unjudged: Collection[str] = ()
) -> tuple[tuple[CandidateRecord, ...], str]:
    """Applies the limits and picks the candidate with the fewest bytes.

    A candidate that is slower than fp32 by more than ``max_slowdown`` is picked only if none of the
    others meets ``max_bytes``.

    Args:
        records: The measured candidates, fp32 among them; their verdicts are ignored.
        limits: ``max_accuracy_drop``, ``min_agreement``, ``max_slowdown``, ``max_bytes``,
            ``max_p50_us``.
        unjudged: Candidates that were trained on the cloud's data where clients judge such models,
            and that no client has judged; they are refused.

    Returns:
        The records in order, each with its verdict, and the name of the chosen candidate. Ties in
        size go to the faster candidate, then to the first.

    Raises:
        CompressionError: no candidate meets every limit.
    """
    missed = {record.name: _missed(record, limits, unjudged) for record in records}
    admitted = [record for record in records if not missed[record.name]]
    if not admitted:
        raise _none_left(missed)
    most = limits.max_slowdown
    slower = {each.name: times for each in records if (times := _slower(each, records, most))}
    fast = [record for record in admitted if record.name not in slower]
    for record in admitted if fast else ():
        if record.name in slower:
            missed[record.name]["max_slowdown"] = (
                f"takes {slower[record.name]}, more than max_slowdown = {most:g}, and no limit on "
                "bytes asks for it"
            )
    best = min(fast or admitted, key=lambda record: (record.bytes, record.p50_us))
    though = slower_note(best, records)
    judged = tuple(_judged(record, best, missed[record.name], though) for record in records)
    return judged, best.name


def keeps_answers(record: CandidateRecord, limits: Compression) -> bool:
    """Returns whether a candidate keeps ``max_accuracy_drop`` and ``min_agreement``."""
    return {"max_accuracy_drop", "min_agreement"}.isdisjoint(_missed(record, limits, ()))


def slower_note(chosen: CandidateRecord, records: Sequence[CandidateRecord]) -> str:
    """Says that a chosen candidate is slower than fp32; empty if it is not, or hardly."""
    times = _slower(chosen, records, _UNNOTED)
    return times and f"though it takes {times}"


def _none_left(missed: Mapping[str, _Missed]) -> CompressionError:
    verdicts = "; ".join(f"{name}: {' and '.join(why.values())}" for name, why in missed.items())
    keys = [key for key in _LIMITS if any(key in why for why in missed.values())]
    return CompressionError(
        f"no candidate meets the limits of [compression]: {verdicts}. Nothing was released; "
        f"relax {' or '.join(keys)}, or train a smaller model."
    )


def _slower(record: CandidateRecord, records: Sequence[CandidateRecord], most: float) -> str:
    """Says how much longer than fp32 a candidate takes; empty if by a share of at most ``most``."""
    base = next((each for each in records if each.name == _FP32), record)
    if not record.p50_us > (1 + most) * base.p50_us:
        return ""
    return (
        f"{record.p50_us:.1f} us, {record.p50_us / base.p50_us - 1:.0%} longer than the "
        f"{base.p50_us:.1f} us of fp32"
    )


def _missed(record: CandidateRecord, limits: Compression, unjudged: Collection[str]) -> _Missed:
    """Describes each limit that a candidate misses, and by how much."""
    most, least = limits.max_accuracy_drop, limits.min_agreement
    found: _Missed = {}
    if dropped := _missed_drop(record, most):
        found["max_accuracy_drop"] = dropped
    if not record.agreement >= least - _ROUNDING:  # `not >=` also rejects NaN
        found["min_agreement"] = (
            f"agrees with fp32 to {record.agreement:.4g} on the cloud's held-out data, less than "
            f"min_agreement = {least:g}"
        )
    if limits.max_bytes is not None and record.bytes > limits.max_bytes:
        found["max_bytes"] = (
            f"takes {record.bytes} bytes, {record.bytes - limits.max_bytes} more than max_bytes = "
            f"{limits.max_bytes}"
        )
    if limits.max_p50_us is not None and record.p50_us > limits.max_p50_us:
        found["max_p50_us"] = (
            f"takes {record.p50_us:.1f} us, {record.p50_us - limits.max_p50_us:.1f} more than "
            f"max_p50_us = {limits.max_p50_us:g}"
        )
    if record.name in unjudged:
        found["finetune.judge"] = _UNJUDGED
    return found


def _missed_drop(record: CandidateRecord, most: float) -> str:
    """Describes a drop beyond the limit: on the cloud's held-out data, on clients', or possible."""
    found = []
    if not record.drop <= most + _ROUNDING:
        found.append(
            f"drops {record.drop:.4g}, {record.drop - most:.2g} more than "
            f"max_accuracy_drop = {most:g}"
        )
    on_clients, bound = record.clients_drop, record.drop_bound
    if on_clients is not None and not on_clients <= most + _ROUNDING:
        found.append(
            f"may drop {on_clients:.4g} on the clients' held-out data, "
            f"{on_clients - most:.2g} more than max_accuracy_drop = {most:g}"
        )
    if not found and bound is not None and not bound <= most + _ROUNDING:
        found.append(
            f"may drop up to {bound:.4g} at 95 % confidence, judged by {record.evidence}, more "
            f"than max_accuracy_drop = {most:g} (more held-out data narrow it: finetune.holdout)"
        )
    return " and ".join(found)


def _judged(
    record: CandidateRecord, best: CandidateRecord, missed: _Missed, though: str
) -> CandidateRecord:
    verdict = replace(record, admitted=not missed, missed=tuple(missed))
    if missed:
        return replace(verdict, reason=f"refused: {' and '.join(missed.values())}")
    if record is best:
        reason = f"chosen: the smallest that meets the limits{though and f', {though}'}"
        return replace(verdict, reason=reason)
    if record.bytes == best.bytes:
        reason = f"as small as {best.name}, but not faster"
    else:
        reason = f"{record.bytes / best.bytes:.3g} times the bytes of {best.name}"
    return replace(verdict, reason=f"admitted: {reason}")
