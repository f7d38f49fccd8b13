"""The keys of a release repository: made once, kept in two folders, never shown.

``offline/`` holds the keys that say who may sign what (root, targets); they are needed once a year
and belong on storage that is not connected. ``online/`` holds those that publish. ``root.json`` is
public: what every device starts its trust from.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from securesystemslib.signer import (  # type: ignore[attr-defined]  # re-exported unsaid
    CryptoSigner,
    SSlibKey,
)

from fedcore.errors import DataError, ReleaseError
from fedcore.files import read_bytes, write_atomic

OFFLINE = ("root", "targets")
ONLINE = ("releases", "snapshot", "timestamp")
TRUSTED_ROOT = "root.json"
MAX_METADATA_BYTES = 5_000_000  # bytes: python-tuf's updater reads no more of one file on a device
_MAX_KEY_BYTES = 4096  # bytes: an Ed25519 key as PKCS#8 PEM has 119


@dataclass(frozen=True)
class Keys:
    """Signing keys by role; printing them shows roles and key ids alone."""

    signers: Mapping[str, CryptoSigner] = field(repr=False)

    def __repr__(self) -> str:
        ids = (f"{role}={self.public(role).keyid[:12]}" for role in sorted(self.signers))
        return f"Keys({', '.join(ids)}, private parts hidden)"

    def public(self, role: str) -> SSlibKey:
        """The public part of a role's key."""
        return self.signers[role].public_key


def generate_keys() -> Keys:
    """A fresh Ed25519 key for each role, from the operating system's randomness."""
    return Keys({role: CryptoSigner.generate_ed25519() for role in (*OFFLINE, *ONLINE)})


def refuse_existing(folder: Path) -> None:
    """Raises `ReleaseError` when ``folder`` already holds a key: none is ever overwritten."""
    found = [path for role in (*OFFLINE, *ONLINE) if (path := _path(folder, role)).exists()]
    if found or (folder / TRUSTED_ROOT).exists():
        raise ReleaseError(
            f"{folder}: keys already exist there ({(found or [folder / TRUSTED_ROOT])[0].name}). "
            "Nothing was written: overwriting them would lock out every device that trusts them. "
            "Choose another folder, or use these keys."
        )


def write_keys(keys: Keys, folder: Path) -> None:
    """Writes each key as PKCS#8 PEM, readable by its owner alone.

    Raises:
        ReleaseError: a key exists there already; nothing was written.
        DiskFull: there was no room.
    """
    refuse_existing(folder)
    for role, signer in keys.signers.items():
        path = _path(folder, role)
        for parent in (folder, path.parent):
            parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            parent.chmod(0o700)  # it may have stood there, open to others, before
        write_atomic(path, signer.private_bytes, mode=0o600)


def remove_keys(folder: Path) -> None:
    """Takes back what `write_keys` wrote, when making a repository failed."""
    for path in (*(_path(folder, role) for role in (*OFFLINE, *ONLINE)), folder / TRUSTED_ROOT):
        path.unlink(missing_ok=True)


def read_keys(folder: Path, roles: Iterable[str]) -> Keys:
    """Reads the keys of some roles.

    Raises:
        ReleaseError: a key is missing, unreadable, or no Ed25519 key.
    """
    return Keys({role: _read(_path(folder, role), role) for role in roles})


def read_trusted_root(folder: Path) -> bytes:
    """The root metadata that was made together with the keys.

    Raises:
        ReleaseError: it is missing.
    """
    try:
        return read_bytes(
            folder / TRUSTED_ROOT, max_bytes=MAX_METADATA_BYTES, what="the trusted root"
        )
    except DataError as error:
        raise ReleaseError(
            f"{error} Nothing was published; name the folder that `fedcore release init` made."
        ) from None


def _path(folder: Path, role: str) -> Path:
    return folder / ("offline" if role in OFFLINE else "online") / f"{role}.pem"


def _read(path: Path, role: str) -> CryptoSigner:
    try:
        raw = read_bytes(path, max_bytes=_MAX_KEY_BYTES, what=f"the private key of role {role!r}")
    except DataError as error:
        hint = (
            "Bring the offline folder back for this step"
            if role in OFFLINE
            else "Name the folder that `fedcore release init` made"
        )
        raise ReleaseError(f"{error} Nothing was published. {hint}.") from None
    try:
        private = load_pem_private_key(raw, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        private = None
    if not isinstance(private, Ed25519PrivateKey):
        raise ReleaseError(
            f"{path}: expected an Ed25519 private key (PKCS#8 PEM, no password) for role "
            f"{role!r}, found something else. Nothing was published; restore the key from its copy."
        )
    return CryptoSigner(private)
