"""Choice among measured candidates: limits filter, and the smallest admitted file wins."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

from fedcore.config.run import Compression
from fedcore.errors import CompressionError
from server.records import CandidateRecord

# A drop from 0.90 to 0.89 is 0.010000000000000009 in floating point, and meets a limit of 0.01.
_ROUNDING = 1e-9


def choose(
    records: Sequence[CandidateRecord], limits: Compression, *, unjudged: Collection[str] = ()
) -> tuple[tuple[CandidateRecord, ...], str]:
    """Applies the limits and picks the candidate with the fewest bytes.

    Args:
        records: The measured candidates, fp32 among them; ``admitted`` and ``reason`` are ignored.
        limits: ``max_accuracy_drop``, ``max_bytes``, ``max_p50_us``.
        unjudged: Candidates that were trained on the cloud's data where clients judge such models,
            and that no client has judged; they are refused.

    Returns:
        The records in order, each with its verdict, and the name of the chosen candidate. Ties in
        size go to the faster candidate, then to the first.

    Raises:
        CompressionError: no candidate meets every limit.
    """
    missed = {
        record.name: [*_missed(record, limits), *([_UNJUDGED] if record.name in unjudged else [])]
        for record in records
    }
    admitted = [record for record in records if not missed[record.name]]
    if not admitted:
        verdicts = "; ".join(f"{name}: {' and '.join(why)}" for name, why in missed.items())
        keys = [
            key for key in _LIMITS if any(key in line for why in missed.values() for line in why)
        ]
        raise CompressionError(
            f"no candidate meets the limits of [compression]: {verdicts}. Nothing was released; "
            f"relax {' or '.join(keys)}, or train a smaller model."
        )
    best = min(admitted, key=lambda record: (record.bytes, record.p50_us))
    return tuple(_judged(record, best, missed[record.name]) for record in records), best.name


_UNJUDGED = (
    "was trained on the cloud's data, which clients judge, and devices run no file before it is "
    "signed (finetune.judge = 'cloud' lets the cloud judge)"
)
_LIMITS = ("max_accuracy_drop", "max_bytes", "max_p50_us")


def _missed(record: CandidateRecord, limits: Compression) -> list[str]:
    """Describes each limit that a candidate misses, and by how much."""
    found = []
    if not record.drop <= limits.max_accuracy_drop + _ROUNDING:  # `not <=` also rejects NaN
        found.append(
            f"drops {record.drop:.4g}, {record.drop - limits.max_accuracy_drop:.2g} more than "
            f"max_accuracy_drop = {limits.max_accuracy_drop:g}"
        )
    on_clients = record.clients_drop
    if on_clients is not None and not on_clients <= limits.max_accuracy_drop + _ROUNDING:
        found.append(
            f"may drop {on_clients:.4g} on the clients' held-out data, "
            f"{on_clients - limits.max_accuracy_drop:.2g} more than max_accuracy_drop = "
            f"{limits.max_accuracy_drop:g}"
        )
    if limits.max_bytes is not None and record.bytes > limits.max_bytes:
        found.append(
            f"takes {record.bytes} bytes, {record.bytes - limits.max_bytes} more than max_bytes = "
            f"{limits.max_bytes}"
        )
    if limits.max_p50_us is not None and record.p50_us > limits.max_p50_us:
        found.append(
            f"takes {record.p50_us:.1f} us, {record.p50_us - limits.max_p50_us:.1f} more than "
            f"max_p50_us = {limits.max_p50_us:g}"
        )
    return found


def _judged(record: CandidateRecord, best: CandidateRecord, missed: list[str]) -> CandidateRecord:
    if missed:
        return replace(record, admitted=False, reason=f"refused: {' and '.join(missed)}")
    if record is best:
        return replace(record, admitted=True, reason="chosen: the smallest that meets the limits")
    if record.bytes == best.bytes:
        reason = f"as small as {best.name}, but not faster"
    else:
        reason = f"{record.bytes / best.bytes:.3g} times the bytes of {best.name}"
    return replace(record, admitted=True, reason=f"admitted: {reason}")
