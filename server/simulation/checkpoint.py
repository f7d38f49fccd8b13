"""Checkpoint file of a simulation's federated part: written atomically, verified when read.

`write_checkpoint` stores a `Checkpoint` as safetensors; `read_checkpoint` returns it.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from fedcore.errors import DataError
from fedcore.files import read_bytes, write_atomic
from fedcore.observability.events import Noted, RoundFinished
from fedcore.privacy.accounting import Charge
from fedcore.privacy.ledger import Ledger
from server.records import RoundRecord, VirtualRecord
from server.rounds.checkpointing import Progress, Start
from server.rounds.protection import noise_of, protection_doc, protection_of
from server.rounds.strategies.state import StrategyState
from server.simulation.virtual.state import Choice, SimulationState

MAX_BYTES = 64 << 30  # 64 GiB: two models of 8 GiB and six vectors of a strategy
_FORMAT = 2
_DIGEST, _STATE, _EVENTS, _STRATEGY = "sha256", "state", "events", "strategy"
_NOISE, _PROTECTION = "noise", "protection"
Told = Noted | RoundFinished
Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Checkpoint:
    """Everything that the federated part needs to resume and give the same bits."""

    identity: Mapping[str, Any]
    """Identity of the run, see `server.rounds.run_identity`."""
    progress: Progress
    told: Sequence[Told]
    """Events that rounds emitted, in order."""
    state: SimulationState
    elapsed_s: float
    """Duration of the rounds so far, over all processes."""

    @property
    def start(self) -> Start:
        """State from which the rounds resume."""
        rounds = (event for event in self.told if isinstance(event, RoundFinished))
        return Start(self.progress, tuple(_record(event.values) for event in rounds))


def write_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Writes a checkpoint with a digest of its content; atomically replaces an earlier one.

    Raises:
        DiskFull: there is not enough space; an earlier checkpoint is unchanged.
    """
    progress = checkpoint.progress
    arrays: Arrays = {
        "weights": progress.weights,
        "best": progress.best,
        "preprocess": np.frombuffer(progress.preprocess, np.uint8),
        _STATE: _json(_state(checkpoint)),
        _EVENTS: _json([_told(event) for event in checkpoint.told]),
        **{f"{_STRATEGY}/{n}": array for n, array in enumerate(progress.strategy.arrays)},
        **{f"{_NOISE}/{n}": array for n, array in enumerate(noise_of(progress.protection))},
    }
    arrays[_DIGEST] = _digest(arrays)
    write_atomic(path, save(arrays))


def read_checkpoint(path: Path) -> Checkpoint:
    """Reads a checkpoint and verifies its digest.

    Raises:
        DataError: the file does not exist, is damaged or has another format.
    """
    raw = read_bytes(path, max_bytes=MAX_BYTES, what="the checkpoint")
    try:
        arrays = load(raw)
        if not np.array_equal(arrays.pop(_DIGEST), _digest(arrays)):
            raise DataError(
                f"{path}: the checkpoint's bytes do not match their digest: it is damaged. "
                "Nothing was run; start the run over with --fresh."
            )
        return _checkpoint(arrays)
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{path}: this version of fedcore cannot read this checkpoint "
            f"({type(error).__name__}: {error}). Nothing was run; start the run over with "
            "--fresh."
        ) from None


def _digest(arrays: Arrays) -> NDArray[np.uint8]:
    found = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        found.update(json.dumps([name, array.dtype.str, array.shape]).encode())
        found.update(np.ascontiguousarray(array).data)
    return np.frombuffer(found.digest(), np.uint8)


def _json(value: Any) -> NDArray[np.uint8]:
    """Returns a value as JSON bytes; Python's JSON preserves NaN and every bit of a float."""
    return np.frombuffer(json.dumps(value).encode(), np.uint8)


def _state(checkpoint: Checkpoint) -> dict[str, Any]:
    progress, state = checkpoint.progress, checkpoint.state
    return {
        "format": _FORMAT,
        "identity": checkpoint.identity,
        "elapsed_s": checkpoint.elapsed_s,
        "round": progress.round,
        "over": progress.over,
        "best_round": progress.best_round,
        "most_failed": progress.most_failed,
        _STRATEGY: progress.strategy.tree,
        _PROTECTION: protection_doc(progress.protection),
        "ledgers": {
            name: [astuple(charge) for charge in ledger.charges]
            for name, ledger in state.ledgers.items()
        },
        "rounds": state.rounds,
        "clock_s": state.clock_s,
        "choice": state.choice and asdict(state.choice),
    }


def _told(event: Told) -> Any:
    return event.text if isinstance(event, Noted) else event.values


def _checkpoint(arrays: Arrays) -> Checkpoint:
    held = json.loads(arrays[_STATE].tobytes())
    if held["format"] != _FORMAT:
        raise ValueError(f"format {held['format']}, expected {_FORMAT}")
    told = json.loads(arrays[_EVENTS].tobytes())
    return Checkpoint(
        identity=held["identity"],
        progress=Progress(
            round=held["round"],
            over=held["over"],
            weights=arrays["weights"].copy(),  # arrays that were read are read-only
            best=arrays["best"].copy(),
            best_round=held["best_round"],
            most_failed=held["most_failed"],
            strategy=StrategyState(held[_STRATEGY], _numbered(arrays, _STRATEGY)),
            preprocess=arrays["preprocess"].tobytes(),
            protection=protection_of(held[_PROTECTION], _numbered(arrays, _NOISE)),
        ),
        told=[Noted(one) if isinstance(one, str) else RoundFinished(one) for one in told],
        state=SimulationState(
            ledgers={name: _ledger(charges) for name, charges in held["ledgers"].items()},
            rounds=Counter(held["rounds"]),
            clock_s=held["clock_s"],
            choice=held["choice"] and Choice(**held["choice"]),
        ),
        elapsed_s=held["elapsed_s"],
    )


def _numbered(arrays: Arrays, kind: str) -> tuple[NDArray[Any], ...]:
    """Returns the arrays whose names start with ``kind``, in order."""
    count = sum(name.startswith(f"{kind}/") for name in arrays)
    return tuple(arrays[f"{kind}/{n}"] for n in range(count))


def _ledger(charges: Iterable[Sequence[Any]]) -> Ledger:
    return Ledger(tuple(Charge(*charge) for charge in charges))


def _record(values: Mapping[str, Any]) -> RoundRecord:
    # Fields added later have a default, and older checkpoints do not have them.
    own = {field.name: values[field.name] for field in fields(RoundRecord) if field.name in values}
    virtual = own.get("virtual") and VirtualRecord(**own["virtual"])
    return RoundRecord(**{**own, "virtual": virtual})
