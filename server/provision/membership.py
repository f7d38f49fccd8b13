"""Everyone in a project: the server, and all members that ever had a certificate."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from fedcore.crypto.certificates import Subject, certificate_sha256, parse_certificate, subject_of
from fedcore.crypto.kit import KIT
from fedcore.crypto.roster import Member
from fedcore.files import name_exists
from server.provision.folder import locked, read_authority, server_kit
from server.provision.issue import Act


@dataclass(frozen=True)
class Membership:
    """Everyone in a project, from `fedcore.Authority.members`.

    Example::

        found = fedcore.Authority("authority").members()
        [one.name for one in found.members if one.role == "device" and not one.revoked_at]
    """

    project: str
    authority_sha256: str
    """SHA-256 of the authority's certificate, to compare over another channel than the kits."""
    not_after: datetime
    """When the authority's certificate expires, UTC."""
    server: Subject | None
    """The server's certificate; None before there is one."""
    members: tuple[Member, ...]
    """Members in the order of enrolment, including revoked and expired ones."""


def listing(act: Act) -> Membership:
    """Lists all members that ever had a certificate, and the server.

    Raises:
        FedcoreError: the authority can't be read.
    """
    with locked(act.folder):
        authority = read_authority(act.folder, now=act.now)
        server = None
        if name_exists(authority.server / KIT):
            where = str(authority.server / KIT)
            certificate = parse_certificate(server_kit(authority).certificate.encode(), where=where)
            server = subject_of(certificate, authority.certificate, where=where)
    return Membership(
        project=authority.project,
        authority_sha256=certificate_sha256(authority.certificate),
        not_after=authority.certificate.not_valid_after_utc,
        server=server,
        members=tuple(authority.members.values()),
    )
