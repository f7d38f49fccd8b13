"""Encoding of a run's progress and records: a JSON document and named arrays, and back.

A simulation's checkpoint and a deployment's journal both store what `encode_progress` returns, each
in its own file format, and read it back with `decode_progress`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedcore.updates.frozen import NO_FROZEN, FrozenState
from server.records import MetricSource, RoundRecord, VirtualRecord
from server.rounds.checkpointing.progress import Progress
from server.rounds.client_privacy.protection import noise_of, protection_doc, protection_of
from server.rounds.strategies.state import StrategyState

Arrays = Mapping[str, NDArray[Any]]
_WEIGHTS, _BEST, _PREPROCESS = "weights", "best", "preprocess"
_STRATEGY, _NOISE, _FROZEN = "strategy", "noise", "frozen"


@dataclass(frozen=True)
class EncodedProgress:
    """A run's progress, ready to be stored."""

    doc: dict[str, Any]
    """JSON values; Python's JSON preserves NaN and every bit of a float."""
    arrays: Arrays
    """Arrays by name. The latest weights and the best ones may be one object."""


def encode_progress(progress: Progress) -> EncodedProgress:
    """Returns all of ``progress`` that outlives a process; arrays are not copied."""
    noise, state = noise_of(progress.protection), progress.strategy
    frozen = progress.frozen.raw
    return EncodedProgress(
        doc={
            "round": progress.round,
            "over": progress.over,
            "best_round": progress.best_round,
            "most_failed": progress.most_failed,
            "strategy": state.tree,
            "protection": protection_doc(progress.protection),
        },
        arrays={
            _WEIGHTS: progress.weights,
            _BEST: progress.best,
            _PREPROCESS: np.frombuffer(progress.preprocess, np.uint8),
            **({_FROZEN: np.frombuffer(frozen, np.uint8)} if frozen else {}),
            **{f"{_STRATEGY}/{number}": array for number, array in enumerate(state.arrays)},
            **{f"{_NOISE}/{number}": array for number, array in enumerate(noise)},
        },
    )


def decode_progress(doc: Mapping[str, Any], arrays: Arrays) -> Progress:
    """Returns the progress that `encode_progress` was given; arrays are not copied.

    Args:
        doc: The document; further entries are ignored.
        arrays: The arrays; further ones are ignored.

    Raises:
        KeyError: an entry or an array is missing.
        TypeError: an entry has another type.
        ValueError: the numbers or the weights cannot be those of a run.
    """
    weights, best = arrays[_WEIGHTS], arrays[_BEST]
    if not all(_is_vector(one) for one in (weights, best)) or weights.shape != best.shape:
        raise ValueError("its weights are no float32 vectors of one length")
    numbers = tuple(doc[name] for name in ("round", "best_round", "most_failed"))
    if {*map(type, numbers)} != {int}:
        raise TypeError("its numbers of rounds are none")
    number, best_round, most_failed = numbers
    return Progress(
        round=number,
        over=bool(doc["over"]),
        weights=weights,
        best=best,
        best_round=best_round,
        most_failed=most_failed,
        strategy=StrategyState(doc["strategy"], _numbered(arrays, _STRATEGY)),
        preprocess=arrays[_PREPROCESS].tobytes(),
        frozen=FrozenState(arrays[_FROZEN].tobytes()) if _FROZEN in arrays else NO_FROZEN,
        protection=protection_of(doc["protection"], _numbered(arrays, _NOISE)),
    )


def decode_record(values: Mapping[str, Any]) -> RoundRecord:
    """Returns the record whose fields are in ``values``, as `dataclasses.asdict` gives them.

    Other entries are ignored: events of a run have more.

    Raises:
        KeyError: a field is missing.
        TypeError: the virtual time has other fields, or the round's number is none.
    """
    own = {
        field.name: values[field.name]
        for field in fields(RoundRecord)
        if field.name in values or field.default_factory is MISSING  # else: of an earlier version
    }
    virtual = own["virtual"] and VirtualRecord(**own["virtual"])
    # Records of earlier versions have no sources.
    sources = {name: MetricSource(**each) for name, each in values.get("sources", {}).items()}
    record = RoundRecord(**(own | {"virtual": virtual, "sources": sources}))
    if type(record.round) is not int:
        raise TypeError(f"it is of round {record.round!r}")
    return record


def _is_vector(values: NDArray[Any]) -> bool:
    return values.dtype == np.float32 and values.ndim == 1


def _numbered(arrays: Arrays, kind: str) -> tuple[NDArray[Any], ...]:
    """Returns the arrays whose names start with ``kind``, in order."""
    count = sum(name.startswith(f"{kind}/") for name in arrays)
    return tuple(arrays[f"{kind}/{number}"] for number in range(count))
