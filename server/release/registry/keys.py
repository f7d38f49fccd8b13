"""The signing keys of a release repository: one file each, in two folders, never printed.

``offline/`` contains the keys that delegate trust (root, targets). They are needed once a year and
belong on disconnected storage. ``online/`` contains the keys that publish. A role may have several
keys, ``root.pem``, ``root-2.pem``, ..., each on separate storage; its threshold sets how many must
sign. ``root.json`` is public: the root of trust of every device.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from securesystemslib.signer import (  # type: ignore[attr-defined]  # implicit re-export
    CryptoSigner,
    SSlibKey,
)

from fedcore.errors import DataError, ReleaseError
from fedcore.files import name_exists, read_bytes, write_atomic
from fedcore.observability.words import counted

OFFLINE = ("root", "targets")
ONLINE = ("releases", "snapshot", "timestamp")
ROLES = (*OFFLINE, *ONLINE)
TRUSTED_ROOT = "root.json"
MAX_KEYS = 16
"""Maximum number of keys of one role."""
MAX_METADATA_BYTES = 5_000_000  # bytes: limit of python-tuf's updater on a device
_MAX_KEY_BYTES = 4096  # bytes: an Ed25519 key as PKCS#8 PEM has 119


@dataclass(frozen=True)
class Quorum:
    """Number of keys of a role, and how many of them must sign."""

    threshold: int = 1
    keys: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.threshold <= self.keys <= MAX_KEYS:
            raise ReleaseError(
                f"{self.threshold} of {counted(self.keys, 'key')}: expected a threshold from 1 to "
                f"the number of keys, and {MAX_KEYS} keys at most. Nothing was written."
            )


@dataclass(frozen=True)
class Keys:
    """Signing keys by role; ``repr`` shows only roles and key ids."""

    signers: Mapping[str, tuple[CryptoSigner, ...]] = field(repr=False)

    def __repr__(self) -> str:
        ids = (
            f"{role}={key.keyid[:12]}" for role in sorted(self.signers) for key in self.public(role)
        )
        return f"Keys({', '.join(ids)}, private parts hidden)"

    def public(self, role: str) -> list[SSlibKey]:
        """Returns the public parts of a role's keys."""
        return [signer.public_key for signer in self.signers[role]]

    def ids(self, role: str) -> list[str]:
        """Returns the ids of a role's keys."""
        return [key.keyid for key in self.public(role)]


def generate_keys(
    roles: Iterable[str] = ROLES, quorums: Mapping[str, Quorum] | None = None
) -> Keys:
    """Generates Ed25519 keys from the operating system's randomness; by default one per role."""
    count = {role: quorum.keys for role, quorum in (quorums or {}).items()}
    return Keys(
        {
            role: tuple(CryptoSigner.generate_ed25519() for _ in range(count.get(role, 1)))
            for role in roles
        }
    )


def refuse_existing(folder: Path) -> None:
    """Raises `ReleaseError` if ``folder`` contains a key already: keys are never overwritten."""
    found = [path for role in ROLES for path in key_files(folder, role)]
    if found or name_exists(folder / TRUSTED_ROOT):
        raise ReleaseError(
            f"{folder}: keys already exist there ({(found or [folder / TRUSTED_ROOT])[0].name}). "
            "Nothing was written: overwriting them would lock out every device that trusts them. "
            "Choose another folder, or use these keys."
        )


def write_keys(keys: Keys, folder: Path) -> None:
    """Writes keys into a folder that has none.

    Raises:
        ReleaseError: a key exists already; nothing was written.
        DiskFull: the disk is full.
    """
    refuse_existing(folder)
    add_keys(keys, folder)


def add_keys(keys: Keys, folder: Path) -> list[Path]:
    """Adds keys to a folder, each as a PKCS#8 PEM file that only its owner can read.

    Returns:
        The new files. If this function raises, they are removed again.

    Raises:
        DiskFull: the disk is full.
    """
    written: list[Path] = []
    try:
        for role, signers in keys.signers.items():
            number = 0
            for signer in signers:
                number += 1
                while name_exists(path := _path(folder, role, number)):
                    number += 1
                for parent in (folder, path.parent):
                    parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                    parent.chmod(0o700)  # an existing folder may have been open to others
                write_atomic(path, signer.private_bytes, mode=0o600)
                written.append(path)
    except BaseException:
        remove_files(written)
        raise
    return written


def remove_keys(folder: Path) -> None:
    """Removes all keys of a folder, after the creation of a repository failed."""
    for role in ROLES:
        remove_files(key_files(folder, role))
    (folder / TRUSTED_ROOT).unlink(missing_ok=True)


def remove_files(paths: Iterable[Path]) -> None:
    """Removes files of private keys that no repository trusts."""
    for path in paths:
        path.unlink(missing_ok=True)


def read_keys(folder: Path, roles: Iterable[str]) -> Keys:
    """Reads all available keys of some roles.

    Raises:
        ReleaseError: a role has no key, or a key is unreadable or not Ed25519.
    """
    return Keys(
        {
            role: tuple(
                read_key(path, role) for path in key_files(folder, role) or [_path(folder, role, 1)]
            )
            for role in roles
        }
    )


def key_files(folder: Path, role: str) -> list[Path]:
    """Returns the existing key files of a role, ordered by number."""
    first = _path(folder, role, 1)
    numbered = {
        int(number): path
        for path in first.parent.glob(f"{role}-*.pem")
        if (number := path.stem.removeprefix(f"{role}-")).isdecimal()
    }
    return ([first] if name_exists(first) else []) + [
        numbered[number] for number in sorted(numbered)
    ]


def read_trusted_root(folder: Path) -> bytes:
    """Reads the trusted root metadata next to the keys.

    Raises:
        ReleaseError: it is missing or unreadable.
    """
    try:
        return read_bytes(
            folder / TRUSTED_ROOT, max_bytes=MAX_METADATA_BYTES, what="the trusted root"
        )
    except DataError as error:
        raise ReleaseError(
            f"{error} Nothing was published; pass the folder created by `fedcore release init`."
        ) from None


def read_key(path: Path, role: str) -> CryptoSigner:
    """Reads one private key.

    Raises:
        ReleaseError: the file is missing, unreadable, or not an Ed25519 key.
    """
    try:
        raw = read_bytes(path, max_bytes=_MAX_KEY_BYTES, what=f"the private key of role {role!r}")
    except DataError as error:
        hint = (
            "Restore the offline folder for this step"
            if role in OFFLINE
            else "Pass the folder created by `fedcore release init`"
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


def _path(folder: Path, role: str, number: int) -> Path:
    name = role if number == 1 else f"{role}-{number}"
    return folder / ("offline" if role in OFFLINE else "online") / f"{name}.pem"
