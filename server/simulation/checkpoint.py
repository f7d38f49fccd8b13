"""Checkpoint file of a simulation's federated part: written atomically, verified when read.

`write_checkpoint` stores a `Checkpoint` as safetensors; `read_checkpoint` returns it.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass
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
from server.rounds.checkpointing.progress import Progress, Start
from server.rounds.checkpointing.progress_codec import (
    decode_progress,
    decode_record,
    encode_progress,
)
from server.simulation.virtual.state import Choice, SimulationState

MAX_BYTES = 64 << 30  # 64 GiB: two models of 8 GiB and six vectors of a strategy
_FORMAT = 3
_DIGEST, _STATE, _EVENTS, _PROGRESS = "sha256", "state", "events", "progress"
_LOCAL = "local"
StoredEvent = Noted | RoundFinished
Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Checkpoint:
    """Everything that the federated part needs to resume and give the same bits."""

    identity: Mapping[str, Any]
    """Identity of the run, see `server.rounds.checkpointing.run_identity`."""
    progress: Progress
    events: Sequence[StoredEvent]
    """Events that rounds emitted, in order."""
    state: SimulationState
    elapsed_s: float
    """Duration of the rounds so far, over all processes."""

    @property
    def start(self) -> Start:
        """State from which the rounds resume."""
        rounds = (event for event in self.events if isinstance(event, RoundFinished))
        return Start(self.progress, tuple(decode_record(event.values) for event in rounds))


def write_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Writes a checkpoint with a digest of its content; atomically replaces an earlier one.

    Raises:
        DiskFull: there is not enough space; an earlier checkpoint is unchanged.
    """
    progress = encode_progress(checkpoint.progress)
    arrays: Arrays = {
        **progress.arrays,
        _STATE: _json(_state(checkpoint) | {_PROGRESS: progress.doc}),
        **{
            f"{_LOCAL}/{place}": np.frombuffer(raw, np.uint8)
            for place, raw in enumerate(checkpoint.state.locals.values())
        },
        _EVENTS: _json([_encode_event(event) for event in checkpoint.events]),
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
                "Nothing was run; start the run over with --fresh (in Python fresh=True)."
            )
        return _checkpoint(arrays)
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{path}: this version of fedcore cannot read this checkpoint "
            f"({type(error).__name__}: {error}). Nothing was run; start the run over with "
            "--fresh (in Python fresh=True)."
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
    state = checkpoint.state
    return {
        "format": _FORMAT,
        "identity": checkpoint.identity,
        "elapsed_s": checkpoint.elapsed_s,
        "ledgers": {
            name: [astuple(charge) for charge in ledger.charges]
            for name, ledger in state.ledgers.items()
        },
        "locals": [*state.locals],
        "rounds": state.rounds,
        "clock_s": state.clock_s,
        "choice": state.choice and asdict(state.choice),
    }


def _encode_event(event: StoredEvent) -> Any:
    return event.text if isinstance(event, Noted) else event.values


def _checkpoint(arrays: Arrays) -> Checkpoint:
    held = json.loads(arrays[_STATE].tobytes())
    if held["format"] != _FORMAT:
        raise ValueError(f"format {held['format']}, expected {_FORMAT}")
    events = json.loads(arrays[_EVENTS].tobytes())
    return Checkpoint(
        identity=held["identity"],
        progress=decode_progress(held[_PROGRESS], arrays),
        events=[Noted(one) if isinstance(one, str) else RoundFinished(one) for one in events],
        state=SimulationState(
            ledgers={name: _ledger(charges) for name, charges in held["ledgers"].items()},
            rounds=Counter(held["rounds"]),
            locals={
                name: arrays[f"{_LOCAL}/{place}"].tobytes()
                for place, name in enumerate(held.get("locals", ()))
            },
            clock_s=held["clock_s"],
            choice=held["choice"] and Choice(**held["choice"]),
        ),
        elapsed_s=held["elapsed_s"],
    )


def _ledger(charges: Iterable[Sequence[Any]]) -> Ledger:
    return Ledger(tuple(Charge(*charge) for charge in charges))
