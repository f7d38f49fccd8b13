"""Handshakes over real sockets: who gets through, and who does not."""

from __future__ import annotations

import socket
import ssl
import threading
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from fedcore.crypto.certificates import peer_public, pem
from fedcore.crypto.keys import load_key, new_key, save_key
from fedcore.crypto.kit import client_context, load_identity, load_kit
from fedcore.crypto.roster import load_server_identity, server_context


@dataclass
class Outcome:
    """What each side of one connection saw."""

    server_error: OSError | None = None
    client_error: OSError | None = None
    version: str | None = None
    peer: bytes | None = None
    session_reused: bool | None = None
    answer: bytes = b""


def connect(
    server: ssl.SSLContext,
    client: ssl.SSLContext,
    *,
    name: str = "localhost",
    session: ssl.SSLSession | None = None,
) -> tuple[Outcome, ssl.SSLSession | None]:
    """One connection: the server answers once it has authenticated the client."""
    outcome, kept = Outcome(), None
    ours, theirs = socket.socketpair()
    for end in (ours, theirs):
        end.settimeout(10)

    def serve() -> None:
        try:
            with server.wrap_socket(theirs, server_side=True) as secure:
                outcome.version = secure.version()
                outcome.session_reused = secure.session_reused
                outcome.peer = secure.getpeercert(binary_form=True)
                secure.recv(5)
                secure.sendall(b"hello")
                secure.recv(1)
        except OSError as error:
            outcome.server_error = error
            theirs.close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        with client.wrap_socket(ours, server_hostname=name, session=session) as secure:
            secure.sendall(b"hello")
            outcome.answer = secure.recv(5)
            kept = secure.session
    except OSError as error:
        outcome.client_error = error
        ours.close()
    thread.join(timeout=20)
    assert not thread.is_alive()
    return outcome, kept


@pytest.fixture
def server(tmp_path: Path, project: Any) -> ssl.SSLContext:
    identity = load_server_identity(project.server(tmp_path / "server", "localhost", "127.0.0.1"))
    return server_context(identity)


def test_a_member_and_its_server_meet_over_tls_1_3(
    tmp_path: Path, project: Any, server: ssl.SSLContext
) -> None:
    kit = load_kit(project.device(tmp_path / "kit"))
    for name in ("localhost", "127.0.0.1"):
        outcome, _ = connect(server, client_context(kit), name=name)
        assert outcome.answer == b"hello"
        assert outcome.version == "TLSv1.3"
        assert outcome.peer is not None
        assert peer_public(outcome.peer) == kit.public


def test_tls_1_2_is_refused_from_either_side(
    tmp_path: Path, project: Any, server: ssl.SSLContext
) -> None:
    kit = load_kit(project.device(tmp_path / "kit"))
    old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    old.load_verify_locations(cadata=kit.authority_pem.decode())
    (tmp_path / "chain.pem").write_bytes(kit.certificate_pem)
    old.load_cert_chain(tmp_path / "chain.pem", kit.key_path)
    outcome, _ = connect(server, old)
    assert isinstance(outcome.server_error, ssl.SSLError)
    assert outcome.server_error.reason == "UNSUPPORTED_PROTOCOL"
    assert outcome.answer == b""

    identity = load_server_identity(tmp_path / "server")
    lax = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    lax.maximum_version = ssl.TLSVersion.TLSv1_2
    (tmp_path / "chain.pem").write_bytes(identity.kit.certificate_pem)
    lax.load_cert_chain(tmp_path / "chain.pem", identity.kit.key_path)
    outcome, _ = connect(lax, client_context(kit))
    assert isinstance(outcome.client_error, ssl.SSLError)
    assert outcome.answer == b""


def careless(kit: Any) -> ssl.SSLContext:
    """The kit of someone who verifies nothing: only the server's checks are left."""
    context = client_context(kit)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


def refused_by_server(outcome: Outcome, reason: str) -> bool:
    error = outcome.server_error
    return isinstance(error, ssl.SSLError) and error.reason == reason and not outcome.answer


def test_nobody_gets_in_without_a_certificate(
    tmp_path: Path, project: Any, server: ssl.SSLContext
) -> None:
    bare = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    bare.load_verify_locations(cadata=pem(project.authority).decode())
    outcome, _ = connect(server, bare)
    assert refused_by_server(outcome, "PEER_DID_NOT_RETURN_A_CERTIFICATE")


def test_another_authoritys_member_is_refused_by_both(
    tmp_path: Path, project: Any, impostor: Any, server: ssl.SSLContext
) -> None:
    kit = load_kit(impostor.device(tmp_path / "kit"))
    outcome, _ = connect(server, client_context(kit))  # a kit for another server
    assert isinstance(outcome.client_error, ssl.SSLCertVerificationError)
    outcome, _ = connect(server, careless(kit))
    assert refused_by_server(outcome, "CERTIFICATE_VERIFY_FAILED")


@pytest.mark.parametrize("days", [-400, 400], ids=["expired", "not valid yet"])
def test_a_certificate_out_of_its_time_is_refused(
    tmp_path: Path, project: Any, server: ssl.SSLContext, now: datetime, days: int
) -> None:
    kit = load_kit(project.device(tmp_path / "kit"))
    key, moment = load_key(kit.key_path), now + timedelta(days=days)
    stale = replace(kit, certificate_pem=pem(project.certify(key, "edge-1", now=moment)))
    outcome, _ = connect(server, client_context(stale))
    assert refused_by_server(outcome, "CERTIFICATE_VERIFY_FAILED")


def test_a_device_does_not_pass_for_the_server(tmp_path: Path, project: Any) -> None:
    kit = load_kit(project.device(tmp_path / "kit"))
    posing = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    (tmp_path / "chain.pem").write_bytes(kit.certificate_pem)
    posing.load_cert_chain(tmp_path / "chain.pem", kit.key_path)
    trusting_any_name = client_context(kit)
    trusting_any_name.check_hostname = False
    outcome, _ = connect(posing, trusting_any_name)
    assert isinstance(outcome.client_error, ssl.SSLCertVerificationError)
    assert "certificate purpose" in outcome.client_error.verify_message
    assert outcome.answer == b""


def test_the_servers_certificate_opens_no_connection(
    tmp_path: Path, project: Any, server: ssl.SSLContext
) -> None:
    outcome, _ = connect(server, client_context(load_identity(tmp_path / "server")))
    assert refused_by_server(outcome, "CERTIFICATE_VERIFY_FAILED")


def test_the_name_that_was_asked_for_must_stand_in_the_certificate(
    tmp_path: Path, project: Any, server: ssl.SSLContext
) -> None:
    kit = load_kit(project.device(tmp_path / "kit"))
    for name in ("fl.example", "127.0.0.2"):
        outcome, _ = connect(server, client_context(kit), name=name)
        assert isinstance(outcome.client_error, ssl.SSLCertVerificationError)
        assert outcome.answer == b""


def test_a_certificate_is_of_no_use_with_another_key(tmp_path: Path, project: Any) -> None:
    kit = load_kit(project.device(tmp_path / "kit"))
    save_key(kit.key_path, new_key())  # after the kit was loaded
    with pytest.raises(ssl.SSLError, match="KEY_VALUES_MISMATCH"):
        client_context(kit)


def test_no_session_is_resumed_past_the_certificate(
    tmp_path: Path, project: Any, server: ssl.SSLContext
) -> None:
    context = client_context(load_kit(project.device(tmp_path / "kit")))
    first, session = connect(server, context)
    assert first.answer == b"hello"
    assert session is None or not session.has_ticket
    again, _ = connect(server, context, session=session)
    assert again.answer == b"hello"
    assert again.session_reused is False
