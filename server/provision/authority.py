"""A project's authority as an object: `Authority`, `create_authority`, `restore_authority`.

These are part of the Python API; ``fedcore provision`` calls the same. Imports neither torch nor
Flower.
"""

from __future__ import annotations

import getpass
import os
import socket
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from fedcore.crypto.certificates import MAX_CERTIFICATE_BYTES, MemberRole
from fedcore.crypto.issue import MEMBER_VALIDITY, SERVER_VALIDITY, make_request
from fedcore.crypto.keys import new_key, save_key
from fedcore.crypto.kit import KEY, write_kit
from fedcore.crypto.roster import Member
from fedcore.errors import ConfigError
from fedcore.files import read_bytes
from server.provision import backup as backups
from server.provision.folder import SERVER, check_place
from server.provision.issue import (
    SERVER_NAME,
    Act,
    initialise,
    provision_member,
    provision_server,
    renew,
    revoke,
    sign_roster,
)
from server.provision.kits import IssuedKit, Place, clock, free, issued, validity, written
from server.provision.membership import Membership, listing

DEFAULT_PORT = 9092


@dataclass(frozen=True)
class SignedRoster:
    """A member list signed by a new key, from `fedcore.Authority.sign_roster`.

    Example::

        signed = fedcore.Authority("authority", passphrase=secret).sign_roster()
        signed.version, signed.signer
    """

    version: int
    """Version of the member list."""
    signer: int
    """Number of the key that signs it."""


@dataclass(frozen=True)
class Authority:
    """A project's certificate authority in a folder: decides who takes part, and until when.

    Every call reads the folder, checks its signatures and locks it, and writes a line to its audit
    log before it changes anything. `fedcore.create_authority` makes one.

    Example::

        authority = fedcore.create_authority("authority", "orchard")
        authority.add_server(["localhost"])
        kit = authority.add_device("edge-017", "edge-017/request.pem")
        [(member.name, member.role) for member in authority.members().members]

    Attributes:
        folder: The authority's folder.
        passphrase: Decrypts the authority's key, if it is encrypted; never shown.
    """

    folder: Place
    passphrase: str | None = field(default=None, repr=False)

    def add_server(
        self,
        hosts: Iterable[str],
        *,
        port: int = DEFAULT_PORT,
        days: int = SERVER_VALIDITY.days,
        replace: bool = False,
    ) -> IssuedKit:
        """Creates the server's key and certificate, in the subfolder ``server``.

        Args:
            hosts: Names and addresses at which devices reach the server, the preferred first.
            port: Port on which it listens.
            days: Validity of the certificate, 1 to 730 days.
            replace: Replace the server's present key and certificate.

        Raises:
            ConfigError: the server has an identity already, or an argument is not valid.
            FedcoreError: the authority can't be read, or its key can't be decrypted.
        """
        names = (hosts,) if isinstance(hosts, str) else tuple(hosts)
        file = provision_server(
            self._act(), names, port=port, validity=validity(days), again=replace
        )
        return issued(file, Path(self.folder) / SERVER)

    def add_device(
        self,
        name: str,
        request: Place,
        *,
        num_examples: int | None = None,
        days: int = MEMBER_VALIDITY.days,
        out: Place | None = None,
    ) -> IssuedKit:
        """Certifies a device's request, and writes the kit for it.

        Args:
            name: The device's name; its request must have the same.
            request: File that `fedcore.enrol` made on the device.
            num_examples: Fixed weight of its updates; None for the same as other devices.
            days: Validity of the certificate, 1 to 730 days.
            out: File for the kit; ``NAME.kit`` when None.

        Raises:
            ConfigError: the name or key is in use, the kit's file exists, there is no server yet,
                or an argument is not valid. Nothing was issued.
            CertificateRefused: the request is not valid.
            FedcoreError: the authority or the request can't be read, or the authority's key can't
                be decrypted.
        """
        return self._certify(name, "device", request, num_examples, days, out)

    def add_operator(
        self,
        name: str,
        *,
        request: Place | None = None,
        kit: Place | None = None,
        days: int = MEMBER_VALIDITY.days,
        out: Place | None = None,
    ) -> IssuedKit:
        """Certifies a person who may control the server.

        Args:
            name: The person's name, unique in the project.
            request: File that `fedcore.enrol` made on that person's machine.
            kit: In place of a request: a new folder for the key and kit of a person who works on
                this machine.
            days: Validity of the certificate, 1 to 730 days.
            out: File for the kit that answers a request; ``NAME.kit`` when None.

        Raises:
            FedcoreError: as `add_device`; or not exactly one of ``request`` and ``kit`` is given.
        """
        return self._person(name, "operator", request, kit, days, out)

    def add_viewer(
        self,
        name: str,
        *,
        request: Place | None = None,
        kit: Place | None = None,
        days: int = MEMBER_VALIDITY.days,
        out: Place | None = None,
    ) -> IssuedKit:
        """Certifies a person who may only view the server; see `add_operator`."""
        return self._person(name, "viewer", request, kit, days, out)

    def renew(self, name: str, *, days: int | None = None, out: Place | None = None) -> IssuedKit:
        """Issues a new certificate for the same key: a member's, or that of ``server``.

        Args:
            name: Name of a member, or ``server``, whose new certificate is installed at once.
            days: Validity, 1 to 730 days; when None, as for a new certificate.
            out: File for a member's kit; ``NAME.kit`` when None.

        Raises:
            ConfigError: no member in force has this name, or the kit's file exists.
            FedcoreError: the authority can't be read, or its key can't be decrypted.
        """
        if name == SERVER_NAME:
            if out is not None:
                raise ConfigError(
                    f"{name}: its new certificate is installed in the authority's folder, so "
                    "there is no file to write. Nothing was issued; leave out the file's name."
                )
            lasts = validity(SERVER_VALIDITY.days if days is None else days)
            return issued(renew(self._act(), name, validity=lasts), Path(self.folder) / SERVER)
        kit = free(out, name)
        lasts = validity(MEMBER_VALIDITY.days if days is None else days)
        return written(renew(self._act(), name, validity=lasts), kit)

    def revoke(self, name: str) -> Member:
        """Revokes a member's certificate. Needs no passphrase, so that it works in a hurry.

        Raises:
            ConfigError: no member in force has this name.
            FedcoreError: the authority can't be read.
        """
        return revoke(self._act(), name)

    def members(self) -> Membership:
        """Lists the server and everyone who ever had a certificate. Needs no passphrase.

        Raises:
            FedcoreError: the authority can't be read.
        """
        return listing(self._act())

    def sign_roster(self) -> SignedRoster:
        """Creates a new key for the member list, and signs the present list with it.

        Servers that have seen it reject lists signed by the old key, as after its theft.

        Raises:
            SignatureInvalid: the present list's signature is not valid.
            FedcoreError: the authority can't be read, or its key can't be decrypted.
        """
        roster = sign_roster(self._act()).roster
        return SignedRoster(roster.version, roster.signer.number if roster.signer else 0)

    def backup(self, file: Place, *, passphrase: str | None = None) -> Path:
        """Writes the whole authority to one encrypted file.

        Args:
            file: A new file.
            passphrase: Encrypts the file; the authority's own when None.

        Raises:
            ConfigError: the file exists, or the passphrase is missing or too short.
            FedcoreError: the authority is incomplete, or the file can't be written.
        """
        backups.backup(self._act(passphrase), Path(file))
        return Path(file)

    def _act(self, passphrase: str | None = None) -> Act:
        return Act(Path(self.folder), _user(), clock(), passphrase or self.passphrase)

    def _certify(
        self,
        name: str,
        role: MemberRole,
        request: Place,
        num_examples: int | None,
        days: int,
        out: Place | None,
    ) -> IssuedKit:
        lasts, kit = validity(days), free(out, name)
        raw = read_bytes(
            Path(request),
            max_bytes=MAX_CERTIFICATE_BYTES,
            what="a request",
            otherwise=f"Nothing was issued; create one with `fedcore client enrol {name}`.",
        )
        file = provision_member(
            self._act(),
            name,
            role,
            raw,
            where=str(request),
            validity=lasts,
            num_examples=num_examples,
        )
        return written(file, kit)

    def _person(
        self,
        name: str,
        role: MemberRole,
        request: Place | None,
        kit: Place | None,
        days: int,
        out: Place | None,
    ) -> IssuedKit:
        if (request is None) == (kit is None):
            raise ConfigError(
                f"{name}: expected either a request or the folder for a kit, got "
                f"{'neither' if kit is None else 'both'}. Nothing was written."
            )
        if request is not None:
            return self._certify(name, role, request, None, days, out)
        if out is not None:
            raise ConfigError("--out and --kit exclude each other. Nothing was written.")
        folder = Path(kit or "")
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ConfigError(
                f"{folder}: expected an empty folder, or none. Nothing was written; choose another."
            )
        lasts = validity(days)
        check_place(folder / KEY)
        key = new_key()
        file = provision_member(
            self._act(),
            name,
            role,
            make_request(key, name),
            where=name,
            validity=lasts,
            num_examples=None,
        )
        save_key(folder / KEY, key)
        folder.chmod(0o700)
        write_kit(folder, file)
        return issued(file, folder)


def create_authority(folder: Place, project: str, *, passphrase: str | None = None) -> Authority:
    """Creates the certificate authority of a new project.

    Example::

        authority = fedcore.create_authority("authority", "orchard", passphrase=secret)
        authority.add_server(["fl.example.org", "10.0.0.5"])

    Args:
        folder: A new or empty folder.
        project: Name of the project, stored in every certificate.
        passphrase: Encrypts the authority's key; when None, whoever reads the folder can issue
            certificates.

    Raises:
        ConfigError: the folder isn't empty, or the project's name or the passphrase is not valid.
        DiskFull: the disk is full.
    """
    initialise(Act(Path(folder), _user(), clock(), passphrase), project)
    return Authority(folder, passphrase)


def restore_authority(
    file: Place, folder: Place, *, passphrase: str | None, replace: bool = False
) -> backups.Restored:
    """Restores an authority from a backup, after verifying all of it.

    Guarantee:
        The old folder stays in place until the new one is complete, and is then kept under another
        name. The newer member list of the two wins, so that no revocation is undone.

    Example::

        done = fedcore.restore_authority("authority.sealed", "authority", passphrase=secret)
        done.project, done.members, done.caution

    Args:
        file: A file that `fedcore.Authority.backup` wrote.
        folder: The authority's folder.
        passphrase: Decrypts the file.
        replace: Replace a folder that isn't empty.

    Raises:
        ConfigError: the folder isn't empty and ``replace`` isn't set, or there is no passphrase.
        ResourceError: a server is running with this folder.
        DataError: the file is missing, or too large.
        TrustError: decryption fails, or the content is inconsistent.
    """
    act = Act(Path(folder), _user(), clock(), passphrase)
    return backups.restore(act, Path(file), replace=replace)


def _user() -> str:
    try:
        name = getpass.getuser()
    except (KeyError, OSError):  # no user database entry, as in some containers
        name = f"uid {os.getuid()}"
    return f"{name}@{socket.gethostname()}"
