"""What a device keeps on its own disk: each run's state, and replies that were not yet sent."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from flwr.app import ConfigRecord, RecordDict
from pydantic import Field, ValidationError

from fedcore.config.run import Section
from fedcore.errors import DataError, DeviceError
from fedcore.files import (
    disk_errors,
    held_alone,
    is_there,
    read_bytes,
    read_if_there,
    remove,
    sha256_hex,
    write_atomic,
)
from fedcore.flower.records import read_record, record_bytes

log = logging.getLogger("fedcore.device")

_MAX_STATE_BYTES = 64 * 2**20
_MAX_REPLY_BYTES = 8 * 2**30
_ANSWERED, _KEYS, _DIGESTS = "fedcore.answered", "keys", "sha256"
_SPOOLED = 4
"""Replies that are kept; a server asks again for the last one of a run, or for none."""
IDENTITY = "identity.json"
_MAX_IDENTITY_BYTES = 1 << 10
_UNREADABLE = "unreadable"


class _Identity(Section):
    """``identity.json``: whose folder this is, from when the server first let it in.

    One more lies in ``spool``: whose replies those are.
    """

    format: Literal["fedcore.device/1"] = "fedcore.device/1"
    key_sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


@dataclass(frozen=True)
class DeviceFolder:
    """A folder that one process at a time owns (see `own`)."""

    path: Path

    def let_in_before(self, public: bytes) -> bool:
        """Whether a server has let the identity with the key ``public`` in, out of this folder.

        A folder with states of runs that does not say whose it is dates from before that was
        written down, and is taken for this identity's.

        Raises:
            DeviceError: the folder is another identity's: its replies would be sent, and what it
                has spent be counted, as this one's.
        """
        if not self.belongs_to(public, so="Nothing was started"):
            return bool(self.runs()) and _holder(self._replies_of) in (None, sha256_hex(public))
        return True

    def belongs_to(self, public: bytes, *, so: str) -> bool:
        """Whether this is noted as the folder of the identity with the key ``public``.

        Args:
            public: The key.
            so: What follows where it is another's, for the error.

        Returns:
            False where it is nobody's yet.

        Raises:
            DeviceError: it is another identity's.
        """
        path, own_sha256 = self.path / IDENTITY, sha256_hex(public)
        found = _holder(path)
        if found in (None, own_sha256):
            return found is not None
        whose = "an identity that cannot be read"
        if found != _UNREADABLE:
            whose = f"the identity whose key has the SHA-256 {found[:16]}"
        raise DeviceError(
            f"{path}: this folder keeps the replies and the ledger of {whose}, and this device's "
            f"has {own_sha256[:16]}. {so}; name this device's own folder with --state, or the kit "
            f"that this one belongs to with --kit. Only if this device has enrolled again with a "
            f"new key, remove {IDENTITY}, and no other file: the replies are dropped then, and "
            "what was spent stays in the ledger and counts."
        )

    def note_let_in(self, public: bytes) -> None:
        """Makes this the folder of the identity with the key ``public``, if it is nobody's yet.

        Replies that another key is known to have answered for, this one may not sign. Their own
        note outlives the folder's, which is removed to take a folder over.

        Raises:
            DiskFull: there is no room.
        """
        own_sha256 = sha256_hex(public)
        raw = _Identity(key_sha256=own_sha256).model_dump_json().encode() + b"\n"
        theirs = _holder(self._replies_of)
        if theirs not in (None, own_sha256):
            with disk_errors(self.path):
                for reply in (self.path / "spool").glob("*.reply"):
                    remove(reply)
        if theirs != own_sha256:
            write_atomic(self._replies_of, raw, mode=0o600)
        if not is_there(self.path / IDENTITY):
            write_atomic(self.path / IDENTITY, raw, mode=0o600)

    def state(self, run: str) -> RecordDict:
        """The state of a run, its ledger in it; empty before the first round."""
        path = self._state_path(run)
        raw = read_if_there(path, max_bytes=_MAX_STATE_BYTES, what="the device's state")
        if raw is None:
            return RecordDict()
        try:
            return read_record(raw, where=str(path))
        except DataError:
            raise DataError(
                f"{path}: this file holds no record of a run, so what it charged is not known. "
                "Nothing was trained; put it back from a backup, or, where there is none, remove "
                "it: its charges are mended from ledger.json, and what it answered is done again."
            ) from None

    def keep(self, run: str, state: RecordDict, key: str, reply: RecordDict) -> None:
        """Writes a reply and the run's state after it, durably: before any of it may leave.

        The reply counts once the state is there: whatever this process dies of, each reply that
        can ever leave was charged.
        """
        raw = record_bytes(reply)
        kept = [(one, digest) for one, digest in _answered(state).items() if one != key]
        kept = [*kept, (key, sha256_hex(raw))][-_SPOOLED:]
        write_atomic(self._reply_path(key), raw, mode=0o600)
        keys, digests = [one for one, _ in kept], [digest for _, digest in kept]
        state[_ANSWERED] = ConfigRecord({_KEYS: keys, _DIGESTS: digests})
        self.keep_state(run, state)
        self._drop_old()

    def keep_state(self, run: str, state: RecordDict) -> None:
        """Writes a run's state, durably, where there is no reply to go with it."""
        write_atomic(self._state_path(run), record_bytes(state), mode=0o600)

    def drop_state(self, run: str) -> None:
        """Forgets a run, and what it answered.

        Raises:
            ResourceError: the file may not be removed.
        """
        with disk_errors(self.path):
            remove(self._state_path(run))

    def runs(self) -> list[str]:
        """The runs that have a state."""
        return sorted(path.stem for path in (self.path / "state").glob("[!.]*.state"))

    def runs_by_age(self) -> list[str]:
        """The runs that have a state, the one that was written longest ago first."""
        return sorted(self.runs(), key=lambda run: self._state_path(run).lstat().st_mtime_ns)

    def reply(self, key: str, state: RecordDict) -> RecordDict | None:
        """The reply that was made to an instruction, with its state; None when none was kept.

        One that is not, to the bit, what the state's charge has paid for is put aside, as
        `spool/*.damaged`: what it answers is to be done again, and charged again.

        Raises:
            ResourceError: it cannot be put aside.
        """
        path, digest = self._reply_path(key), _answered(state).get(key)
        if digest is None:
            return None
        if not is_there(path):
            log.warning(
                "%s: this finished reply is gone; what it answered is done again, and charged "
                "again where there is a budget.",
                path,
            )
            return None
        try:
            raw = read_bytes(path, max_bytes=_MAX_REPLY_BYTES, what="a finished reply")
            if sha256_hex(raw) != digest:
                raise DataError(f"{path}: a finished reply is damaged: its SHA-256 is another.")
            return read_record(raw, where=str(path))
        except DataError as error:
            aside = self._put_aside(path)
            log.warning(
                "%s It was put aside as %s and is not sent; what it answered is done again, and "
                "charged again where there is a budget.",
                error,
                aside.name,
            )
            return None

    def _put_aside(self, path: Path) -> Path:
        """Renames what lies in a reply's place; one such thing is kept, the latest."""
        aside = path.with_suffix(".damaged")
        with disk_errors(path):
            for old in aside.parent.glob("*.damaged"):
                remove(old)
            path.rename(aside)
        return aside

    def _drop_old(self) -> None:
        """Drops all replies but the newest few."""
        spool = self.path / "spool"
        # Of the link itself: one that leads in a circle has a time, too.
        kept = sorted(spool.glob("*.reply"), key=lambda one: one.lstat().st_mtime_ns)
        with disk_errors(spool):
            for old in kept[:-_SPOOLED]:
                remove(old)

    @property
    def _replies_of(self) -> Path:
        return self.path / "spool" / IDENTITY

    def _state_path(self, run: str) -> Path:
        return self.path / "state" / f"{run}.state"

    def _reply_path(self, key: str) -> Path:
        return self.path / "spool" / f"{key}.reply"


def _holder(path: Path) -> str | None:
    """The SHA-256 of the key that a note is about; None where there is no note."""
    raw = read_if_there(path, max_bytes=_MAX_IDENTITY_BYTES, what="whose folder this is")
    if raw is None:
        return None
    try:
        return _Identity.model_validate_json(raw).key_sha256
    except ValidationError:
        return _UNREADABLE


def _answered(state: RecordDict) -> dict[str, str]:
    """The instructions whose cost the state accounts for, the latest last, and what was answered.

    What was answered is told by the SHA-256 of the reply's file. It stands here, not there: a reply
    that was made again must not be taken for the one before, which another charge has paid for.
    """
    record = state.get(_ANSWERED)
    if not isinstance(record, ConfigRecord):
        return {}
    keys, digests = (record.get(name, []) for name in (_KEYS, _DIGESTS))
    if not isinstance(keys, list) or not isinstance(digests, list):
        return {}
    return {str(key): str(digest) for key, digest in zip(keys, digests, strict=False)}


@contextmanager
def own(path: Path) -> Iterator[DeviceFolder]:
    """Keeps other processes out of a device's folder.

    Raises:
        DeviceError: one is at work in it.
    """
    with disk_errors(path):
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
    refused = DeviceError(
        f"{path}: another process of this device is at work in this folder. Nothing was started; "
        "stop that one, or give this one a folder and an identity of its own."
    )
    with held_alone(path, refused):
        with disk_errors(path):
            for name in ("state", "spool"):  # earlier versions left them open to all
                (path / name).mkdir(exist_ok=True, mode=0o700)
                (path / name).chmod(0o700)
        yield DeviceFolder(path)
