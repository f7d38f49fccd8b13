"""A training device's folder on disk: the state of each run, and the latest replies.

::

    identity.json           whose folder this is
    state/RUN.state         Flower's context state of a run, with its privacy charges
    frozen/RUN/ID           parts of the frozen parameters of a run's model
    spool/KEY.reply         finished replies, by a digest of the message they answer
    activity                what a process is doing (`edge_client.agent.ended`)

`edge_client.ledger` keeps further files here.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from flwr.app import ConfigRecord, RecordDict
from pydantic import Field, ValidationError

from fedcore.config.section import Section
from fedcore.errors import DataError, DeviceError
from fedcore.files import (
    disk_errors,
    lock_folder,
    name_exists,
    read_bytes,
    read_if_exists,
    remove,
    remove_unfinished,
    sha256_hex,
    write_atomic,
)
from fedcore.flower.kept_objects import KeptObjects
from fedcore.flower.records import read_record, record_bytes

log = logging.getLogger("fedcore.device")

_MAX_STATE_BYTES = 2**30  # local layers are part of it
_MAX_REPLY_BYTES = 8 * 2**30
_ANSWERED, _KEYS, _DIGESTS = "fedcore.answered", "keys", "sha256"
_SPOOLED = 4
"""Number of replies kept; a server asks again only for the last reply of a run."""
_FROZEN_RUNS = 4
"""Number of runs whose frozen parameters are kept."""
_LOCAL_RUNS = 16
"""Number of runs whose local layers are kept; a server decides which layers these are."""
_LITTLE_BYTES = 1 << 16
"""States up to this size keep them in any case."""
IDENTITY = "identity.json"
_OWN = (IDENTITY, "ledger.json", "ledger.mark", "contents.json")
"""Files in the folder itself, which may also hold files of its user."""
_MAX_IDENTITY_BYTES = 1 << 10
_UNREADABLE = "unreadable"


class _Identity(Section):
    """``identity.json``: whose folder this is, noted when the server first admits the device.

    A second file, in ``spool``, states whose replies are stored.
    """

    format: Literal["fedcore.device/1"] = "fedcore.device/1"
    key_sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


@dataclass(frozen=True)
class DeviceFolder:
    """A device's folder, used by one process at a time (see `lock_device_folder`)."""

    path: Path

    def was_admitted(self, public: bytes) -> bool:
        """Returns whether a server has admitted the identity with the key ``public`` before.

        Versions of fedcore without ``identity.json`` left states of runs and no owner: such a
        folder counts as this identity's, unless its replies belong to another one.

        Args:
            public: The identity's public key, as `fedcore.crypto.keys.public_bytes` gives it.

        Raises:
            DeviceError: the folder belongs to another identity, whose replies and privacy charges
                would pass for this one's.
        """
        if not self.belongs_to(public, so="Nothing was started"):
            return bool(self.runs()) and _owner_key(self._replies_of) in (None, sha256_hex(public))
        return True

    def belongs_to(self, public: bytes, *, so: str) -> bool:
        """Returns whether this folder belongs to the identity with the key ``public``.

        Args:
            public: The identity's public key.
            so: Consequence of a mismatch, for the error.

        Returns:
            False if the folder belongs to no identity yet.

        Raises:
            DeviceError: the folder belongs to another identity.
        """
        path, own_sha256 = self.path / IDENTITY, sha256_hex(public)
        found = _owner_key(path)
        if found in (None, own_sha256):
            return found is not None
        whose = "an unreadable identity"
        if found != _UNREADABLE:
            whose = f"the identity with the key of SHA-256 {found[:16]}"
        raise DeviceError(
            f"{path}: this folder holds the replies and the ledger of {whose}, but this device's "
            f"key has {own_sha256[:16]}. {so}; pass this device's own folder with --state, or "
            "the kit to which this folder belongs with --kit. Only if this device has enrolled "
            f"again with a new key, remove {IDENTITY} and no other file: the replies are then "
            "dropped, and the privacy spent stays in the ledger and counts."
        )

    def record_admission(self, public: bytes) -> None:
        """Assigns the folder to the identity with the key ``public``, if it belongs to none yet.

        Removes stored replies of another identity, which this one must not sign. ``spool`` has an
        ``identity.json`` of its own for that: an owner removes only the folder's to take it over.

        Raises:
            DiskFull: there is no room.
        """
        own_sha256 = sha256_hex(public)
        raw = _Identity(key_sha256=own_sha256).model_dump_json().encode() + b"\n"
        theirs = _owner_key(self._replies_of)
        if theirs not in (None, own_sha256):
            with disk_errors(self.path):
                for reply in (self.path / "spool").glob("*.reply"):
                    remove(reply)
        if theirs != own_sha256:
            write_atomic(self._replies_of, raw, mode=0o600)
        if not name_exists(self.path / IDENTITY):
            write_atomic(self.path / IDENTITY, raw, mode=0o600)

    def state(self, run: str) -> RecordDict:
        """Reads the state of a run, including its privacy charges; empty before the first round.

        Raises:
            DataError: the file is damaged.
        """
        path = self._state_path(run)
        raw = read_if_exists(path, max_bytes=_MAX_STATE_BYTES, what="the device's state")
        if raw is None:
            return RecordDict()
        try:
            return read_record(raw, where=str(path))
        except DataError:
            raise DataError(
                f"{path}: this file does not contain the record of a run, so its charges are "
                "unknown. Nothing was trained; restore it from a backup, or, if there is none, "
                "remove it: its charges are then restored from ledger.json, and its replies are "
                "computed again."
            ) from None

    def store_reply(self, run: str, state: RecordDict, key: str, reply: RecordDict) -> None:
        """Writes a reply and then the run's state durably, before the reply is sent.

        The reply becomes valid only with the state that lists its digest. So every reply that can
        ever be sent has been charged, even if this process dies at any point.

        Args:
            run: Name of the run.
            state: The run's state; the digest of the reply is added to it.
            key: Digest of the message that the reply answers.
            reply: Content of the reply.

        Raises:
            DiskFull: there is no room.
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
        """Writes a run's state durably, without a reply."""
        write_atomic(self._state_path(run), record_bytes(state), mode=0o600)

    def drop_state(self, run: str) -> None:
        """Removes a run's state, which invalidates its stored replies.

        Raises:
            ResourceError: the file may not be removed.
        """
        with disk_errors(self.path):
            remove(self._state_path(run))
        self.kept(run).drop()

    def kept(self, run: str) -> KeptObjects:
        """Returns the store of a run's frozen parameters."""
        return KeptObjects(self.path / "frozen" / run)

    def keep_frozen(self, run: str, content: RecordDict) -> None:
        """Keeps the frozen parameters in a run's message, and those of the latest few other runs.

        A server that opens run after run must not fill the disk. What is dropped is pulled again.

        Raises:
            DiskFull: there is no room.
            ResourceError: a file may not be removed.
        """
        if not self.kept(run).keep(content):
            return
        folder = self.path / "frozen"
        with disk_errors(folder):
            others = [path for path in folder.iterdir() if path.name != run]
            others.sort(key=lambda path: path.lstat().st_mtime_ns)
            for path in others[: 1 - _FROZEN_RUNS]:
                remove(path)

    def drop_local(self, *, before: str) -> None:
        """Drops the local layers of all but the latest runs when another run begins.

        A server that opens run after run must not fill the disk. In a run that goes on later, these
        layers begin again. Its charges and their order stay.

        Args:
            before: The run about to be opened; nothing is dropped if it already has a state.

        Raises:
            DiskFull: there is no room.
        """
        from fedcore.updates.local import drop_local  # imports torch, which training has

        known = self.runs_by_age()
        for run in known[: 1 - _LOCAL_RUNS] if before not in known else ():
            path = self._state_path(run)
            found = path.lstat()
            if found.st_size <= _LITTLE_BYTES:
                continue
            try:
                state = self.state(run)
            except DataError:
                continue  # keep it: it may contain charges
            if drop_local(state):
                self.keep_state(run, state)
                with disk_errors(path):
                    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))
                log.warning(
                    "run %r: its local layers were dropped: newer runs have taken over", run
                )

    def runs(self) -> list[str]:
        """Returns the names of the runs that have a state, sorted."""
        return sorted(path.stem for path in (self.path / "state").glob("[!.]*.state"))

    def runs_by_age(self) -> list[str]:
        """Returns the names of the runs that have a state, least recently written first."""
        return sorted(self.runs(), key=lambda run: self._state_path(run).lstat().st_mtime_ns)

    def reply(self, key: str, state: RecordDict) -> RecordDict | None:
        """Returns the stored reply to a message, or None.

        A reply whose SHA-256 differs from the one in ``state``, where its charge is, is renamed to
        ``spool/*.damaged``. The caller then has to do the work, and charge for it, again.

        Args:
            key: Digest of the message.
            state: The run's state.

        Raises:
            ResourceError: a damaged reply cannot be renamed.
        """
        path, digest = self._reply_path(key), _answered(state).get(key)
        if digest is None:
            return None
        if not name_exists(path):
            log.warning(
                "%s: this finished reply is gone; it is computed again, and charged again if "
                "there is a privacy budget.",
                path,
            )
            return None
        try:
            raw = read_bytes(path, max_bytes=_MAX_REPLY_BYTES, what="a finished reply")
            if sha256_hex(raw) != digest:
                raise DataError(f"{path}: a finished reply is damaged: its SHA-256 does not match.")
            return read_record(raw, where=str(path))
        except DataError as error:
            aside = self._move_aside(path)
            log.warning(
                "%s It was moved aside to %s and is not sent; it is computed again, and charged "
                "again if there is a privacy budget.",
                error,
                aside.name,
            )
            return None

    def _move_aside(self, path: Path) -> Path:
        """Renames a damaged reply, and returns its new path; only the latest one is kept."""
        aside = path.with_suffix(".damaged")
        with disk_errors(path):
            for old in aside.parent.glob("*.damaged"):
                remove(old)
            path.rename(aside)
        return aside

    def _drop_old(self) -> None:
        """Removes all replies except the newest few."""
        spool = self.path / "spool"
        # lstat: a symbolic link, even one in a loop, has a time of its own.
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


def _owner_key(path: Path) -> str | None:
    """Returns the key's SHA-256 in an ``identity.json``; None if no such file exists."""
    raw = read_if_exists(path, max_bytes=_MAX_IDENTITY_BYTES, what="the owner of this folder")
    if raw is None:
        return None
    try:
        return _Identity.model_validate_json(raw).key_sha256
    except ValidationError:
        return _UNREADABLE


def _answered(state: RecordDict) -> dict[str, str]:
    """Returns the SHA-256 of each stored reply by the digest of its message, oldest first.

    The state lists the replies that its charges cover. A reply made again has another charge, so
    its file must not pass for the one before.
    """
    record = state.get(_ANSWERED)
    if not isinstance(record, ConfigRecord):
        return {}
    keys, digests = (record.get(name, []) for name in (_KEYS, _DIGESTS))
    if not isinstance(keys, list) or not isinstance(digests, list):
        return {}
    return {str(key): str(digest) for key, digest in zip(keys, digests, strict=False)}


@contextmanager
def lock_device_folder(path: Path) -> Iterator[DeviceFolder]:
    """Locks a device's folder for this process, and creates it if it is missing.

    Raises:
        DeviceError: another process uses the folder.
    """
    with disk_errors(path):
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
    refused = DeviceError(
        f"{path}: another process of this device is using this folder. Nothing was started; stop "
        "that process, or give this one its own folder and identity."
    )
    with lock_folder(path, refused):
        with disk_errors(path):
            for name in ("state", "spool"):  # earlier versions made them readable for all users
                (path / name).mkdir(exist_ok=True, mode=0o700)
                (path / name).chmod(0o700)
                remove_unfinished(path / name)
            remove_unfinished(path, *_OWN)
        yield DeviceFolder(path)
