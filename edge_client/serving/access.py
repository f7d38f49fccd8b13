"""Who may connect to the server, and which role a caller has.

Without a kit the server listens on loopback only, without TLS, and every program of the machine may
ask for answers. With a kit, each caller needs a certificate of the project's authority, and the
certificate's role says what its holder may do.
"""

from __future__ import annotations

import ipaddress
import socket
import ssl
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from fedcore.crypto.certificates import peer_public
from fedcore.crypto.roster import Roster, ServerIdentity, load_server_identity, server_context
from fedcore.errors import ConfigError, TrustError

LOCAL, NOBODY = "local", ""
"""Roles of a caller of this machine, without TLS, and of one that may do nothing."""


@dataclass(frozen=True)
class Access:
    """The server's identity and its view of callers; both are None without TLS."""

    identity: ServerIdentity | None = None
    roster: Roster | None = None

    def context(self) -> ssl.SSLContext | None:
        """Returns TLS settings for HTTP: version 1.3, and a certificate from each caller."""
        return None if self.identity is None else server_context(self.identity)

    def role_of_pem(self, certificate: bytes) -> str:
        """Returns the role of a caller by its certificate in PEM, see `role_of_der`."""
        return LOCAL if self.roster is None else self.role_of_der(_der(certificate))

    def role_of_der(self, certificate: bytes) -> str:
        """Returns a caller's role by the certificate of its connection, in DER.

        Looked up for each request: who is revoked, or whose certificate expires, has no role from
        then on, however long the connection has been open.
        """
        if self.roster is None:
            return LOCAL
        public = _public(certificate)
        member = self.roster.member(public) if public else None
        return NOBODY if member is None else member.role


@lru_cache(maxsize=256)
def _public(der: bytes) -> bytes:
    try:
        return peer_public(der) if der else b""
    except TrustError:
        return b""


@lru_cache(maxsize=256)
def _der(certificate: bytes) -> bytes:
    try:
        return x509.load_pem_x509_certificate(certificate).public_bytes(Encoding.DER)
    except ValueError:
        return b""


def open_access(host: str, folder: Path | None) -> Access:
    """Returns the access rules for an address to listen on.

    Args:
        host: Name or address.
        folder: The kit's folder, made by ``fedcore provision server``; None to serve without TLS.

    Raises:
        ConfigError: the address is not a loopback one, and there is no kit.
        DataError: the kit is missing or unreadable.
        TrustError: the kit, or the roster beside it, is not valid.
    """
    if folder is None:
        if not is_loopback_name(host):
            raise ConfigError(
                f"--host {host}: other machines reach this address, and without a kit there is no "
                "TLS. Nothing was started; give the kit that `fedcore provision server` made with "
                "--kit, or serve on 127.0.0.1."
            )
        return Access()
    identity = load_server_identity(folder)
    return Access(identity, identity.roster())


def is_loopback_name(host: str) -> bool:
    """Returns whether every address of a host name is this machine's own."""
    try:
        found = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)
        return bool(found) and all(
            ipaddress.ip_address(str(address[0]).partition("%")[0]).is_loopback
            for *_, address in found
        )
    except (OSError, ValueError):
        return False
