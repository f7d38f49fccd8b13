"""Operations of a project's authority: create, certify, renew, revoke and sign."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import NoReturn
from urllib.parse import urlsplit

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey

from fedcore.crypto.certificates import (
    MemberRole,
    Role,
    check_name,
    parse_certificate,
    pem,
    subject_of,
)
from fedcore.crypto.issue import (
    check_host,
    issue_authority,
    issue_member,
    issue_server,
    read_request,
)
from fedcore.crypto.keys import fingerprint, new_key, private_bytes, public_bytes, save_key
from fedcore.crypto.kit import KEY, KIT, KitFile, write_kit
from fedcore.crypto.roster import MAX_NUM_EXAMPLES, ROSTER, Member, RosterEntry, RosterFile
from fedcore.crypto.roster_seal import delegate
from fedcore.crypto.sealing import encrypt
from fedcore.errors import ConfigError
from fedcore.files import disk_errors, name_exists, write_atomic
from server.provision.folder import (
    CERTIFICATE,
    PRIVATE_KEY,
    ROSTER_KEY,
    AuthorityState,
    check_place,
    link_roster,
    locked,
    read_authority,
    read_key,
    record,
    server_kit,
    write_roster,
)

SERVER_NAME = "server"


@dataclass(frozen=True)
class Act:
    """The context of an operation on an authority: folder, user, time and passphrase."""

    folder: Path
    """The authority's folder."""
    by: str
    """The acting user, as stated in the audit log."""
    now: datetime
    """The current time, UTC; certificates are valid from here."""
    passphrase: str | None = field(default=None, repr=False)
    """Decrypts the authority's key if it is encrypted."""


def initialise(act: Act, project: str) -> x509.Certificate:
    """Creates an authority in a new or empty folder; a passphrase encrypts its key.

    Raises:
        ConfigError: the folder isn't empty, or the project's name or the passphrase is invalid.
        DiskFull: the disk is full.
    """
    folder, key = act.folder, new_key()
    certificate = issue_authority(key, project=project, now=act.now)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(
            f"{folder}: expected an empty folder, or none. Nothing was written; choose another, "
            "or use the existing authority."
        )
    raw = private_bytes(key)
    if act.passphrase is not None:
        raw = encrypt(raw, act.passphrase)
    with disk_errors(folder):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.chmod(0o700)
    record(folder, at=act.now, by=act.by, action="init", project=project)
    write_atomic(folder / PRIVATE_KEY, raw, mode=0o600)
    signing = new_key()
    save_key(folder / ROSTER_KEY, signing)
    roster = RosterFile(version=1, members=()).signed(signing, delegate(signing, 1, key))
    write_atomic(folder / ROSTER, roster.to_bytes())
    write_atomic(folder / CERTIFICATE, pem(certificate))  # last: marks the folder as complete
    return certificate


def provision_server(
    act: Act, hosts: Sequence[str], *, port: int, validity: timedelta, again: bool
) -> KitFile:
    """Creates the server's key and certificate in the authority's subfolder ``server``.

    Args:
        act: The context of the operation.
        hosts: All names and addresses under which devices reach the server, preferred first.
        port: The server's port.
        validity: Lifetime of the certificate.
        again: Whether to replace an existing identity.

    Raises:
        ConfigError: an identity exists already, or a host is invalid.
        FedcoreError: the authority can't be read, or its key can't be decrypted.
    """
    if not 1 <= port <= 65535:
        raise ConfigError(f"port {port}: expected 1 to 65535. Nothing was written.")
    addresses = tuple(_address(host, port) for host in hosts)
    with locked(act.folder):
        authority = read_authority(act.folder, now=act.now)
        if name_exists(authority.server / KIT) and not again:
            raise ConfigError(
                f"{authority.server}: the server already has an identity. Nothing was written; "
                "`fedcore provision renew server` extends it under the same names, --replace "
                "creates a new key for the given names."
            )
        check_place(authority.server / KEY)
        key = new_key()
        file = _certify_server(act, authority, key.public_key(), addresses, validity, "issue")
        link_roster(authority.server)
        # A crash between the two leaves a mismatched pair, which is rejected when loaded.
        save_key(authority.server / KEY, key)
        write_kit(authority.server, file)
        return file


def provision_member(
    act: Act,
    name: str,
    role: MemberRole,
    request: bytes,
    *,
    where: str,
    validity: timedelta,
    num_examples: int | None,
) -> KitFile:
    """Certifies the key in a signing request, and returns the kit for the requester.

    The operator decides name and role; the request supplies the key, and its name must match.

    Raises:
        ConfigError: the name is in use, invalid, or not the request's; the key has a certificate
            already, or was revoked; there is no server yet.
        CertificateRefused: the request is invalid.
    """
    asked = read_request(request, where=where)
    check_name(name)
    if asked.name != name:
        raise ConfigError(
            f"{where}: this request was made by {asked.name!r}, expected {name!r}. No "
            f"certificate was issued; pass the name in the request, or the request of {name!r}."
        )
    if num_examples is not None and not 1 <= num_examples <= MAX_NUM_EXAMPLES:
        raise ConfigError(
            f"{name}: {num_examples} examples, expected 1 to {MAX_NUM_EXAMPLES}, the largest "
            "weight of a client. No certificate was issued."
        )
    with locked(act.folder):
        authority = read_authority(act.folder, now=act.now)
        _check_free(authority, name, public_bytes(asked.public_key))
        addresses = server_kit(authority).servers
        certificate = issue_member(
            asked.public_key,
            name=name,
            role=role,
            authority=authority.certificate,
            authority_key=read_key(authority, act.passphrase),
            now=act.now,
            validity=validity,
        )
        _record(act, "issue", certificate, authority)
        entry = RosterEntry(certificate=pem(certificate).decode(), num_examples=num_examples)
        write_roster(authority, (*authority.roster.members, entry))
        return _kit(authority, addresses, certificate)


def renew(act: Act, name: str, *, validity: timedelta) -> KitFile:
    """Issues a new certificate for an existing key; installs it at once if it is the server's.

    Raises:
        ConfigError: no active member has this name.
        FedcoreError: the authority can't be read, or its key can't be decrypted.
    """
    with locked(act.folder):
        authority = read_authority(act.folder, now=act.now)
        old = server_kit(authority)
        if name == SERVER_NAME:
            check_place(authority.server / KIT)
            public = _public(old.certificate)
            file = _certify_server(act, authority, public, old.servers, validity, "renew")
            write_kit(authority.server, file)
            return file
        entry, member = _known(authority, name)
        certificate = issue_member(
            _public(entry.certificate),
            name=name,
            role=member.role,
            authority=authority.certificate,
            authority_key=read_key(authority, act.passphrase),
            now=act.now,
            validity=validity,
        )
        _record(act, "renew", certificate, authority)
        _change(authority, entry, {"certificate": pem(certificate).decode()})
        return _kit(authority, old.servers, certificate)


def revoke(act: Act, name: str) -> Member:
    """Revokes a member's certificate; a running server notices when it next reads the roster.

    Needs neither the authority's key nor a passphrase, so that it works in a hurry.

    Raises:
        ConfigError: no active member has this name.
    """
    with locked(act.folder):
        authority = read_authority(act.folder, now=act.now)
        entry, member = _known(authority, name)
        certificate = parse_certificate(entry.certificate.encode(), where=name)
        _record(act, "revoke", certificate, authority)
        _change(authority, entry, {"revoked_at": act.now})
        return replace(member, revoked_at=act.now)


def sign_roster(act: Act) -> AuthorityState:
    """Creates a new roster key, and signs the current roster with it.

    For projects older than signed rosters, and for a lost or stolen key: a server that has seen the
    new key rejects rosters signed with the old one.

    Raises:
        SignatureInvalid: the roster has an invalid signature; it is not signed again.
        FedcoreError: the authority can't be read, or its key can't be decrypted.
    """
    with locked(act.folder):
        authority = read_authority(act.folder, now=act.now, unsigned=True)
        authority_key, key = read_key(authority, act.passphrase), new_key()
        old = authority.roster.signer
        signer = delegate(key, old.number + 1 if old is not None else 1, authority_key)
        record(act.folder, at=act.now, by=act.by, action="sign", signer=signer.number)
        members = authority.roster.members
        file = RosterFile(version=authority.roster.version + 1, members=members)
        # A crash between the two leaves a mismatched key, which is rejected.
        save_key(act.folder / ROSTER_KEY, key)
        write_atomic(act.folder / ROSTER, file.signed(key, signer).to_bytes())
        return read_authority(act.folder, now=act.now)


def _certify_server(
    act: Act,
    authority: AuthorityState,
    public: EllipticCurvePublicKey,
    addresses: tuple[str, ...],
    validity: timedelta,
    action: str,
) -> KitFile:
    certificate = issue_server(
        public,
        hosts=[urlsplit(address).hostname or "" for address in addresses],
        authority=authority.certificate,
        authority_key=read_key(authority, act.passphrase),
        now=act.now,
        validity=validity,
    )
    _record(act, action, certificate, authority)
    return _kit(authority, addresses, certificate)


def _kit(
    authority: AuthorityState, addresses: tuple[str, ...], certificate: x509.Certificate
) -> KitFile:
    return KitFile(
        servers=addresses,
        certificate=pem(certificate).decode(),
        authority=pem(authority.certificate).decode(),
    )


def _address(host: str, port: int) -> str:
    name = str(check_host(host).value)
    return f"https://[{name}]:{port}" if ":" in name else f"https://{name}:{port}"


def _public(certificate: str) -> EllipticCurvePublicKey:
    """Returns the public key of a verified certificate."""
    public = x509.load_pem_x509_certificate(certificate.encode()).public_key()
    assert isinstance(public, EllipticCurvePublicKey)
    return public


def _record(
    act: Act, action: str, certificate: x509.Certificate, authority: AuthorityState
) -> None:
    subject = subject_of(certificate, authority.certificate, where="certificate")
    role: Role = subject.role
    record(
        act.folder,
        at=act.now,
        by=act.by,
        action=action,
        name=subject.name,
        role=role,
        serial=subject.serial,
        fingerprint=fingerprint(subject.public),
        not_after=f"{subject.not_after:%Y-%m-%dT%H:%M:%SZ}",
    )


def _known(authority: AuthorityState, name: str) -> tuple[RosterEntry, Member]:
    if name == SERVER_NAME:
        raise ConfigError(
            f"{authority.folder}: the server is not a member, and devices have no list of "
            "revoked servers. Nothing was changed; give it a new key with `fedcore provision "
            "server HOST --replace`. If the old one was stolen, start a new project, or wait "
            "until its certificate expires."
        )
    found = authority.find(name)
    if found is None:
        raise ConfigError(
            f"{authority.folder}: no member in force is named {name!r}. Nothing was changed; "
            "list all members with `fedcore provision list`."
        )
    return found


def _check_free(authority: AuthorityState, name: str, public: bytes) -> None:
    if name == SERVER_NAME or authority.find(name) is not None:
        _refuse(
            f"{name!r} is taken",
            "choose another name, or revoke the member that has it; an expiring certificate is "
            "extended with `fedcore provision renew`",
        )
    for member in authority.members.values():
        if member.public == public:
            state = "was revoked" if member.revoked_at else "has a certificate already"
            _refuse(f"the key of this request {state}, for {member.name!r}", "enrol with a new key")


def _refuse(why: str, remedy: str) -> NoReturn:
    raise ConfigError(f"{why}. No certificate was issued; {remedy}.")


def _change(authority: AuthorityState, entry: RosterEntry, update: dict[str, object]) -> None:
    """Replaces some fields of a member's entry in the roster."""
    changed = RosterEntry.model_validate({**entry.model_dump(), **update})
    write_roster(
        authority, tuple(changed if old is entry else old for old in authority.roster.members)
    )
