"""Sharded checkpoints of unfinished training: safetensors and JSON, written whole or not at all.

In: a `TrainingState` and its `Position`. Out: a folder ``step-N`` in which every process has
written its share, and a description with the digest of each file. Start with `CheckpointFolder`.

Trust: nothing on disk is unpickled. `torch.distributed.checkpoint` plans reads and writes; its
storage of safetensors files replaces the default one, whose files and index are pickles. Processes
of one training exchange pickled plans with each other through their process group, which admits no
one else.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from fedcore.errors import DataError, FedcoreError, TrainingError
from fedcore.files import disk_errors, read_bytes, remove, sync_folder, write_json
from fedcore.observability.foreign import foreign
from server.finetune.control import Group
from server.finetune.order import Position
from server.finetune.state import TrainingState

_NAME = re.compile(r"step-(\d{10})")
_DESCRIPTION = "checkpoint.json"
_PARTIAL = ".partial"
_MAX_DESCRIPTION_BYTES = 16 << 20
_STREAM = "random"


@dataclass(frozen=True)
class CheckpointFolder:
    """The checkpoints of one training, the newest ``keep`` of them."""

    folder: Path
    identity: str
    """Digest of everything that a continuation must share; a checkpoint of another is refused."""
    every: int
    """Steps between two checkpoints."""
    keep: int
    group: Group = field(repr=False)

    def save(self, state: TrainingState, position: Position) -> None:
        """Writes a checkpoint; every process must call this after the same step.

        Guarantee:
            A reader sees the whole checkpoint or none of it, also after a power cut.

        Raises:
            DiskFull: the disk has no room. Earlier checkpoints remain.
            ResourceError: the folder is not writable.
            TrainingError: writing failed in another way.
        """
        place = self.folder / f"step-{position.step:010d}"
        partial = place.with_name(place.name + _PARTIAL)
        if self.group.world > 1:
            for buffer in state.model.buffers():  # of those that differ, any could be saved
                dist.broadcast(buffer, src=0)
        tensors = state.tensors() | _streams(self.group.rank)
        try:
            with _storage_errors(place):
                save(
                    tensors,
                    storage_writer=HuggingFaceStorageWriter(str(partial), save_distributed=True),
                    process_group=self.group.control,
                    no_dist=self.group.world == 1,
                )
            if self.group.rank == 0:
                self._complete(partial, place, state, position)
        except FedcoreError:
            if self.group.rank == 0:
                shutil.rmtree(partial, ignore_errors=True)
            raise
        self.group.agreed(0)  # nobody goes on before the checkpoint exists

    def _complete(
        self, partial: Path, place: Path, state: TrainingState, position: Position
    ) -> None:
        files = {
            path.name: {"bytes": path.stat().st_size, "sha256": _digest(path)}
            for path in sorted(partial.glob("*.safetensors"))
        }
        description = {
            "identity": self.identity,
            "position": asdict(position),
            "scaler": state.scaler.state_dict() if state.scaler else {},
            "files": files,
        }
        write_json(partial / _DESCRIPTION, description)
        with disk_errors(place):
            if place.exists():
                remove(place)
            partial.rename(place)
            sync_folder(self.folder)
            for old in self._complete_ones()[self.keep :]:
                remove(old)

    def newest(self) -> Path | None:
        """Returns the newest complete checkpoint; the same one in every process."""
        found = self._complete_ones() if self.group.rank == 0 else []
        if self.group.rank == 0 and self.folder.is_dir():
            for left in self.folder.glob(f"*{_PARTIAL}"):  # a process was killed while writing
                remove(left)
        step = self.group.agreed(int(found[0].name.removeprefix("step-")) if found else -1)
        return None if step < 0 else self.folder / f"step-{step:010d}"

    def load(self, place: Path, state: TrainingState) -> Position:
        """Loads a checkpoint into the state and the random streams of this process.

        Raises:
            DataError: the checkpoint is corrupt, incomplete or of another training.
        """
        described = _described(place)
        if described["identity"] != self.identity:
            raise DataError(
                f"{place}: this checkpoint belongs to another training: other settings, data or "
                f"starting model. {_USE_ANOTHER}"
            )
        if self.group.rank == 0:
            _verify(place, described["files"])
        self.group.agreed(0)  # nobody reads what is not verified
        with _broken(place):
            reader = HuggingFaceStorageReader(str(place))
            saved: Any = reader.read_metadata().state_dict_metadata
            state.prepare({name: described.size for name, described in saved.items()})
            tensors = state.tensors()
            streams = _streams(self.group.rank)
            streams = {name: each for name, each in streams.items() if name in saved}
            _check_layout(place, tensors, saved)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # one process is what is meant
                load(
                    tensors | streams,
                    storage_reader=reader,
                    process_group=self.group.control,
                    no_dist=self.group.world == 1,
                )
            if state.scaler and described["scaler"]:
                state.scaler.load_state_dict(described["scaler"])
            position = Position(**described["position"])
        _restore(streams, self.group.rank)
        return position

    def _complete_ones(self) -> list[Path]:
        """Returns the complete checkpoints, the newest first."""
        if not self.folder.is_dir():
            return []
        return sorted(
            (path for path in self.folder.iterdir() if _NAME.fullmatch(path.name)), reverse=True
        )


_USE_ANOTHER = (
    "Nothing was trained; remove this folder, and training continues from an earlier checkpoint, "
    "or from the beginning where there is none."
)


def _described(place: Path) -> dict[str, Any]:
    raw = read_bytes(
        place / _DESCRIPTION,
        max_bytes=_MAX_DESCRIPTION_BYTES,
        what="the description of a checkpoint",
        otherwise=_USE_ANOTHER,
    )
    try:
        found = json.loads(raw)
        position = found["position"]
        good = all(isinstance(found[key], dict) for key in ("position", "scaler", "files"))
        good = good and isinstance(found["identity"], str)
        good = good and position.keys() == asdict(Position()).keys()
        good = good and all(
            isinstance(value, int | float) and value >= 0 for value in position.values()
        )
        good = good and all(
            {"bytes", "sha256"} == file.keys() and Path(name).name == name
            for name, file in found["files"].items()
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        good = False
    if not good:
        raise DataError(
            f"{place / _DESCRIPTION}: not the description of a checkpoint. {_USE_ANOTHER}"
        )
    return found  # type: ignore[no-any-return]


def _digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _verify(place: Path, files: dict[str, dict[str, Any]]) -> None:
    """Raises `DataError` unless the files are there with the bytes that were written."""
    there = {path.name for path in place.glob("*.safetensors")}
    if there != files.keys() or not files:
        missing, extra = sorted(files.keys() - there), sorted(there - files.keys())
        raise DataError(
            f"{place}: this checkpoint is incomplete: missing {missing}, unknown "
            f"{[foreign(name) for name in extra]}. {_USE_ANOTHER}"
        )
    for name, file in files.items():
        path = place / name
        if path.stat().st_size != file["bytes"] or _digest(path) != file["sha256"]:
            raise DataError(
                f"{path}: this file is corrupt: its bytes are not those that were written. "
                f"{_USE_ANOTHER}"
            )


def _check_layout(
    place: Path, tensors: dict[str, Tensor], saved: dict[str, TensorStorageMetadata]
) -> None:
    """Raises `DataError` unless a checkpoint has the tensors of this training, no fewer or more."""
    mine = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    theirs = {
        name: tuple(described.size)
        for name, described in saved.items()
        if not name.startswith(f"{_STREAM}.")
    }
    if mine != theirs:
        missing, extra = sorted(mine.keys() - theirs.keys()), sorted(theirs.keys() - mine.keys())
        changed = sorted(name for name in mine.keys() & theirs.keys() if mine[name] != theirs[name])
        raise DataError(
            f"{place}: this checkpoint belongs to another model: missing {missing[:5]}, extra "
            f"{[foreign(name) for name in extra[:5]]}, other shapes {changed[:5]}. {_USE_ANOTHER}"
        )


@contextmanager
def _broken(place: Path) -> Iterator[None]:
    """Turns errors of reading into `DataError`."""
    try:
        yield
    except (SafetensorError, CheckpointException, KeyError, ValueError, TypeError) as error:
        raise DataError(
            f"{place}: this checkpoint cannot be read: {foreign(error)}. {_USE_ANOTHER}"
        ) from error


@contextmanager
def _storage_errors(place: Path) -> Iterator[None]:
    """Turns errors of writing into fedcore's, in whichever process they happened."""
    try:
        with disk_errors(place), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                yield
            except CheckpointException as failed:
                causes = [wrapped[0] for wrapped in failed.failures.values()]
                for cause in causes:
                    if isinstance(cause, OSError):
                        raise cause from failed
                raise
    except (CheckpointException, SafetensorError, RuntimeError) as error:
        if "No space left" in str(error):  # torch's and safetensors' own writers
            with disk_errors(place):
                raise OSError(28, "No space left on device") from error
        raise TrainingError(
            f"{place}: this checkpoint could not be written: {foreign(error)}. Earlier checkpoints "
            "remain; run again to continue from the last one."
        ) from error


def _streams(rank: int) -> dict[str, Tensor]:
    """Returns the states of the process-wide random streams as tensors."""
    _, words, place, *gauss = np.random.get_state()
    version, internal, pending = random.getstate()
    found = {
        "torch": torch.get_rng_state(),
        "numpy": torch.tensor([*map(int, words), int(place)], dtype=torch.int64),
        "numpy_normal": torch.tensor([float(value) for value in gauss], dtype=torch.float64),
        "python": torch.tensor([version, *internal], dtype=torch.int64),
        "python_normal": torch.tensor(
            [0.0 if pending is None else 1.0, pending or 0.0], dtype=torch.float64
        ),
    }
    if torch.cuda.is_available():
        found["cuda"] = torch.cuda.get_rng_state()
    return {f"{_STREAM}.{rank}.{name}": tensor for name, tensor in found.items()}


def _restore(streams: dict[str, Tensor], rank: int) -> None:
    """Sets the process-wide random streams; a process that the checkpoint lacks keeps its own."""
    said = {name.removeprefix(f"{_STREAM}.{rank}."): each for name, each in streams.items()}
    if "torch" not in said:
        return
    torch.set_rng_state(said["torch"])
    words, normal = said["numpy"].tolist(), said["numpy_normal"].tolist()
    kept = np.array(words[:-1], dtype=np.uint32)
    np.random.set_state(("MT19937", kept, words[-1], int(normal[0]), normal[1]))
    version, *internal = said["python"].tolist()
    pending = said["python_normal"].tolist()
    random.setstate((version, tuple(internal), pending[1] if pending[0] else None))
    if "cuda" in said:
        torch.cuda.set_rng_state(said["cuda"])
