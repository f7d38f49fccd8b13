"""Backup of an authority into one encrypted file, and its restoration."""

from __future__ import annotations

import base64
import binascii
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal, get_args

from cryptography import x509
from pydantic import AwareDatetime, ValidationError

from fedcore.config.section import Section
from fedcore.crypto.certificates import (
    MAX_CERTIFICATE_BYTES,
    check_authority,
    parse_certificate,
    subject_of,
)
from fedcore.crypto.keys import MAX_KEY_BYTES, parse_key, public_bytes
from fedcore.crypto.kit import KIT, MAX_KIT_BYTES, parse_kit_file
from fedcore.crypto.roster import ROSTER, RosterFile, parse_roster
from fedcore.crypto.roster_seen import SEEN, Seen, read_seen, record_lost_version, write_seen
from fedcore.crypto.sealing import decrypt, encrypt, is_encrypted
from fedcore.errors import ConfigError, DataError, FedcoreError, ResourceError, TrustError
from fedcore.files import (
    disk_errors,
    lock_folder,
    name_exists,
    read_bytes,
    sync_folder,
    write_atomic,
)
from server.live.operators.drained import DRAINED
from server.operator_log import AUDIT, MARK
from server.provision.folder import (
    CERTIFICATE,
    MAX_AUDIT_BYTES,
    PRIVATE_KEY,
    ROSTER_KEY,
    SERVER,
    AuthorityState,
    check_pair,
    check_place,
    link_roster,
    locked,
    read_authority,
    record,
)
from server.provision.issue import Act

MAX_BACKUP_BYTES = 96 << 20  # 96 MiB: the largest roster and audit log, in base64

FileName = Literal[
    "authority.pem",
    "authority.key",
    "roster.json",
    "roster.key",
    "audit.jsonl",
    "audit.mark",
    "server/key.pem",
    "server/kit.json",
]
_REQUIRED: tuple[FileName, ...] = ("authority.pem", "authority.key", "roster.json", "audit.jsonl")
_SERVER: tuple[FileName, ...] = ("server/key.pem", "server/kit.json")
_PUBLIC: tuple[FileName, ...] = ("authority.pem", "roster.json", "server/kit.json")
_STAYS = (SEEN, DRAINED, AUDIT, MARK)
"""Files that a server keeps in its folder; backups of the authority don't contain them."""


class Backup(Section):
    """The encrypted content of a backup: the folder's files, in base64."""

    format: Literal["fedcore.backup/1"] = "fedcore.backup/1"
    created: AwareDatetime
    files: dict[FileName, str]


@dataclass(frozen=True)
class Restored:
    """The result of `fedcore.restore_authority`.

    Example::

        done = fedcore.restore_authority("authority.sealed", "authority", passphrase=secret)
        done.members, done.caution
    """

    project: str
    members: int
    roster: Literal["backup", "folder"]
    """Source of the roster in force: the newer one, so that no revocation is undone."""
    before: Path | None
    """New path of the previous folder, if there was one."""
    caution: str | None
    """Warning if revoked members may be active again, with the remedy; None if that is ruled
    out."""


def backup(act: Act, file: Path) -> None:
    """Writes the whole authority to one file, encrypted with the passphrase.

    Raises:
        ConfigError: the file exists already, or the passphrase is missing or too short.
        ResourceError: the file can't be created.
        FedcoreError: the authority is incomplete, so its backup would be useless.
    """
    if file.exists():
        raise ConfigError(f"{file}: this file exists. Nothing was written; choose another name.")
    passphrase = _passphrase(act)
    check_place(file)
    with locked(act.folder):
        record(act.folder, at=act.now, by=act.by, action="backup")
        files = {
            name: read_bytes(act.folder / name, max_bytes=MAX_AUDIT_BYTES, what="a file to back up")
            for name in get_args(FileName)
            if name in _REQUIRED or name_exists(act.folder / name)
        }
    _verify(files, act, where=str(act.folder))
    content = Backup(
        created=act.now,
        files={name: base64.b64encode(raw).decode() for name, raw in files.items()},
    )
    sealed = encrypt(content.model_dump_json().encode(), passphrase)
    write_atomic(file, sealed, mode=0o600)


def restore(act: Act, file: Path, *, replace: bool) -> Restored:
    """Restores the authority from a backup, after verifying all of it.

    Guarantee:
        The old folder stays in place until the new one is complete, and is then kept under another
        name. If both belong to one authority, the newer roster wins, and the server's files are
        kept: rosters seen, drained devices, and the audit log.

    Raises:
        ConfigError: the folder isn't empty and ``replace`` isn't set, or there is no passphrase.
        ResourceError: a server is running with this folder.
        DataError: the file is missing, or exceeds the size limit of a backup.
        TrustError: decryption fails, or the content is inconsistent.
    """
    folder, where = act.folder, str(file)
    occupied = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
    if occupied and not replace:
        raise ConfigError(
            f"{folder}: expected an empty folder, or none. Nothing was restored; choose another, "
            "or pass --replace, which keeps the present folder under another name."
        )
    sealed = read_bytes(
        file,
        max_bytes=MAX_BACKUP_BYTES,
        what="a backup",
        otherwise="Nothing was restored; pass a file written by `fedcore provision backup`.",
    )
    files, created = _decode(decrypt(sealed, _passphrase(act), where=where), where)
    authority = _verify(files, act, where=where)
    with ExitStack() as held:
        if occupied and name_exists(folder / CERTIFICATE):
            held.enter_context(locked(folder))
        if (folder / SERVER).is_dir():
            held.enter_context(lock_folder(folder / SERVER, _running(folder)))
        there = _readable(act) if occupied else None
        newer = (
            there is not None
            and there.certificate == authority.certificate
            and there.roster.version > authority.roster.version
        )
        if there is not None and newer:
            files[ROSTER] = there.roster.to_bytes()
            files[AUDIT] = read_bytes(folder / AUDIT, max_bytes=MAX_AUDIT_BYTES, what="the log")
            for name in (MARK, ROSTER_KEY):  # these belong to the roster and the log
                files.pop(name, None)
                if name_exists(folder / name):
                    files[name] = read_bytes(
                        folder / name,
                        max_bytes=MAX_KEY_BYTES,
                        what="a file that belongs to the roster",
                    )
        stays = _files_to_keep(folder, authority) if occupied else []
        kept = there if there is not None and newer else authority
        blind = created if there is None and kept.members else None
        before = _place(act, files, stays, kept.roster, occupied=occupied, blind=blind)
    return Restored(
        project=authority.project,
        members=len(kept.members),
        roster="folder" if newer else "backup",
        before=before,
        caution=_caution(folder, before, compared=there is not None, blind=blind),
    )


def _passphrase(act: Act) -> str:
    if act.passphrase is None:
        raise ConfigError(
            "a backup is encrypted with a passphrase, but none was given. Nothing was written; "
            "pass a file with --passphrase-file, set FEDCORE_PASSPHRASE, or in Python pass "
            "passphrase=."
        )
    return act.passphrase


def _decode(raw: bytes, where: str) -> tuple[dict[str, bytes], datetime]:
    """Returns the files in a backup, and its time of creation."""
    try:
        content = Backup.model_validate_json(raw)
        files: dict[str, bytes] = {
            name: base64.b64decode(text, validate=True) for name, text in content.files.items()
        }
        return files, content.created
    except (ValidationError, binascii.Error) as error:
        raise TrustError(
            f"{where}: this is not a backup of a known format ({str(error).splitlines()[0]}). "
            "Nothing was restored; use the version of fedcore that wrote it, or another copy."
        ) from None


def _verify(files: Mapping[str, bytes], act: Act, *, where: str) -> AuthorityState:
    """Verifies that the files are consistent: keys and certificates, roster and authority."""
    missing = {*_REQUIRED} - {*files} or ({*_SERVER} - {*files} if {*_SERVER} & {*files} else set())
    if missing:
        raise TrustError(
            f"{where}: {', '.join(sorted(missing))} is missing, so the authority is incomplete. "
            "Nothing was changed; use another backup."
        )
    certificate = parse_certificate(files[CERTIFICATE], where=f"{where}: {CERTIFICATE}")
    project = check_authority(certificate, now=act.now, where=f"{where}: {CERTIFICATE}")
    if not is_encrypted(files[PRIVATE_KEY]):
        key = parse_key(files[PRIVATE_KEY], where=f"{where}: {PRIVATE_KEY}")
        check_pair(key, certificate, where=f"{where}: {PRIVATE_KEY}")
    roster, members = parse_roster(
        files[ROSTER], certificate, where=f"{where}: {ROSTER}", unsigned=True
    )
    if {*_SERVER} <= {*files}:
        _verify_server(files, certificate, where=where)
    return AuthorityState(act.folder, project, certificate, roster, members)


def _verify_server(files: Mapping[str, bytes], authority: x509.Certificate, *, where: str) -> None:
    key_name, kit_name = _SERVER
    kit = parse_kit_file(files[kit_name], where=f"{where}: {kit_name}")
    certificate = parse_certificate(kit.certificate.encode(), where=f"{where}: {kit_name}")
    subject = subject_of(certificate, authority, where=f"{where}: {kit_name}")
    key = parse_key(files[key_name], where=f"{where}: {key_name}")
    if subject.role != "server" or subject.public != public_bytes(key):
        raise TrustError(
            f"{where}: {key_name} and {kit_name} belong to different servers. Nothing was "
            "changed; use another backup, or create the server's identity again."
        )


def _readable(act: Act) -> AuthorityState | None:
    """Returns the authority to replace; None if it is damaged, a likely reason for restoring."""
    try:
        return read_authority(act.folder, now=act.now)
    except FedcoreError:
        return None


def _running(folder: Path) -> ResourceError:
    return ResourceError(
        f"{folder / SERVER}: a server is running with this identity. Nothing was restored; stop it "
        "(`fedcore server stop`), and restore again."
    )


def _files_to_keep(folder: Path, authority: AuthorityState) -> list[Path]:
    """Lists the server's files to keep from the folder, unless it is another authority's.

    The authority's certificate, or else the server's kit, identifies the owner. A folder too
    damaged for both counts as this authority's: keeping its files admits nobody wrongly.
    """
    if _authority_of(folder) not in (authority.certificate, None):
        return []
    found = [folder / SERVER / name for name in _STAYS]
    found = [path for path in found if os.path.lexists(path)]
    for path in found:
        if not path.is_file():
            raise DataError(
                f"{path}: expected a file written by the server, found a folder or another kind "
                "of file. Nothing was restored; inspect it, move it away, and restore again. If "
                f"it was {SEEN}, the record of revoked members is lost: revoke them again."
            )
    return found


def _authority_of(folder: Path) -> x509.Certificate | None:
    """Returns the certificate of the authority that owns a folder; None if unknown."""
    try:
        raw = read_bytes(folder / CERTIFICATE, max_bytes=MAX_CERTIFICATE_BYTES, what="it")
        return parse_certificate(raw, where=CERTIFICATE)
    except FedcoreError:
        pass
    try:
        raw = read_bytes(folder / SERVER / KIT, max_bytes=MAX_KIT_BYTES, what="it")
        return parse_certificate(parse_kit_file(raw, where=KIT).authority.encode(), where=KIT)
    except FedcoreError:
        return None


def _caution(
    folder: Path, before: Path | None, *, compared: bool, blind: datetime | None
) -> str | None:
    try:
        read_seen(folder / SERVER / SEEN)
    except FedcoreError as error:
        return str(error)
    if compared:
        return None
    if before is None:
        if blind is None:
            return None
        return (
            f"this roster dates from {blind:%Y-%m-%d %H:%M} UTC, when the backup was written, "
            "and nothing here records later changes: members revoked since then are in force "
            "again. Revoke them again now; `fedcore doctor` warns until then."
        )
    return (
        "the previous roster cannot be read, so the versions could not be compared: members "
        f"revoked since this backup are in force again. {before / AUDIT} lists each of them; "
        "revoke them again now."
    )


def _place(
    act: Act,
    files: Mapping[str, bytes],
    stays: Iterable[Path],
    roster: RosterFile,
    *,
    occupied: bool,
    blind: datetime | None,
) -> Path | None:
    """Writes a new folder, swaps it in by renaming, and returns the old folder's new path.

    ``blind`` is the backup's time of creation if nothing shows later changes, else None.
    """
    folder = act.folder.absolute()
    with disk_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        new = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))  # mode 0700
    try:
        for name, raw in files.items():
            write_atomic(new / name, raw, mode=0o644 if name in _PUBLIC else 0o600)
        for path in stays:
            _copy(path, new / SERVER / path.name)
        record_lost_version(new / SERVER / SEEN, roster.version)
        if (new / SERVER).exists():
            if blind is not None and not name_exists(new / SERVER / SEEN):
                signer = roster.signer.number if roster.signer is not None else 0
                seen = Seen(version=roster.version, signer=signer, restored=blind)
                write_seen(new / SERVER / SEEN, seen)
            link_roster(new / SERVER)
        record(new, at=act.now, by=act.by, action="restore")
        with disk_errors(folder):
            before = None
            if occupied:
                before = folder.with_name(f"{folder.name}.before-{act.now:%Y%m%dT%H%M%SZ}")
                folder.rename(before)
            new.rename(folder)  # also replaces an empty folder
        sync_folder(folder.parent)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    return before


def _copy(path: Path, copy: Path) -> None:
    """Copies a file with mode 0600 and flushes it to disk; a log may be larger than memory."""
    with disk_errors(copy):
        copy.parent.mkdir(mode=0o700, exist_ok=True)
        shutil.copyfile(path, copy)
        copy.chmod(0o600)
        with copy.open("rb") as stream:
            os.fsync(stream.fileno())
    sync_folder(copy.parent)
