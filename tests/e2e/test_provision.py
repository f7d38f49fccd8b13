"""Identities from the command line to a connection, in real processes."""

from __future__ import annotations

import json
import os
import re
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from fedcore.crypto.certificates import peer_public
from fedcore.crypto.kit import Kit, client_context, load_kit
from fedcore.crypto.roster import Member, Roster, load_server_identity, server_context

PAGE = Path(__file__).parents[2] / "docs" / "identities.md"
SECRET = {"FEDCORE_PASSPHRASE": "five random words are good"}
Fedcore = Callable[..., subprocess.CompletedProcess[str]]


class Door:
    """A server that only says whom it let in: TLS on loopback, then the roster."""

    def __init__(self, folder: Path) -> None:
        identity = load_server_identity(folder)
        self.context = server_context(identity)
        self.roster = Roster(identity.roster_path, identity.kit.authority_pem)

    def connect(self, kit: Kit) -> Member | None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            listener.settimeout(10)
            met: list[Member | None] = []

            def serve() -> None:
                with (
                    suppress(ssl.SSLError),  # the client turned away, and says so
                    listener.accept()[0] as plain,
                    self.context.wrap_socket(plain, server_side=True) as secure,
                ):
                    der = secure.getpeercert(binary_form=True)
                    met.append(self.roster.member(peer_public(der or b"")))
                    secure.sendall(b"x")

            thread = threading.Thread(target=serve)
            thread.start()
            address = listener.getsockname()
            with (
                socket.create_connection(address, timeout=10) as plain,
                client_context(kit).wrap_socket(plain, server_hostname="127.0.0.1") as secure,
            ):
                assert secure.version() == "TLSv1.3"
                assert secure.recv(1) == b"x"
            thread.join(timeout=10)
            return met[0]


@pytest.mark.slow
def test_from_nothing_to_a_connection_and_out_again(tmp_path: Path, fedcore: Fedcore) -> None:
    here = tmp_path / "here"
    here.mkdir()

    def run(*arguments: object, code: int = 0) -> subprocess.CompletedProcess[str]:
        done = fedcore(*arguments, cwd=here, env=SECRET)
        assert done.returncode == code, done.stderr
        assert "Traceback" not in done.stderr
        return done

    def machine(*arguments: object) -> Any:
        return json.loads(run(*arguments, "--json").stdout)

    made = machine("provision", "init", "--project", "orchard")
    run("provision", "server", "127.0.0.1")
    asked = machine("client", "enrol", "edge-1", "--kit", "device")
    run("provision", "device", "edge-1", "--request", asked["request"], "--examples", 600)
    install = ("client", "install", "edge-1.kit", "--kit", "device", "--authority")
    done = run(*install, "0" * 64, code=10)
    assert done.stderr.startswith("CertificateRefused: edge-1.kit: its authority has SHA-256")
    run(*install, made["authority_sha256"])
    run("provision", "operator", "anna", "--kit", "anna")

    door = Door(here / "authority" / "server")
    device, anna = load_kit(here / "device"), load_kit(here / "anna")
    for kit, role, weight in ((device, "device", 600), (anna, "operator", None)):
        member = door.connect(kit)
        assert member is not None
        assert (member.name, member.role, member.num_examples) == (kit.name, role, weight)

    done = run("provision", "device", "edge-1", "--request", "edge-1.kit", code=2)
    assert "this file exists" in done.stderr
    run("provision", "backup", "authority.sealed")
    run("provision", "revoke", "edge-1")
    assert door.connect(device) is None
    assert door.connect(anna) is not None
    run("provision", "restore", "authority.sealed", "--replace")  # lets nobody back in
    assert Door(here / "authority" / "server").connect(device) is None
    states = {row["name"]: row["state"] for row in machine("provision", "list")["members"]}
    assert states == {"edge-1": "revoked", "anna": "in force"}

    run("provision", "init", "--project", "orchard", "--authority", "other")
    run("provision", "server", "127.0.0.1", "--authority", "other")
    with pytest.raises(ssl.SSLCertVerificationError):
        Door(here / "other" / "server").connect(anna)


@pytest.mark.slow
def test_many_at_once_lose_nothing(tmp_path: Path, fedcore: Fedcore) -> None:
    """Two operators certify at the same moment: the lock lets one go after the other."""
    fedcore("provision", "init", "--project", "orchard", cwd=tmp_path)
    fedcore("provision", "server", "127.0.0.1", cwd=tmp_path)
    threads = [
        threading.Thread(
            target=lambda n=n: fedcore(
                "provision", "viewer", f"v-{n}", "--kit", f"v-{n}", cwd=tmp_path
            )
        )
        for n in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    door = Door(tmp_path / "authority" / "server")
    assert sorted(member.name for member in door.roster.members()) == [f"v-{n}" for n in range(4)]
    for n in range(4):
        assert door.roster.member(load_kit(tmp_path / f"v-{n}").public) is not None


@pytest.mark.slow
def test_the_page_works_in_its_order(tmp_path: Path) -> None:
    script = "\n".join(re.findall(r"^```bash\n(.*?)^```", PAGE.read_text(), re.M | re.S))
    assert script.count("fedcore ") >= 10
    kept = {name: value for name, value in os.environ.items() if name != "FEDCORE_PASSPHRASE"}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=tmp_path,
        env={**kept, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    kit = load_kit(tmp_path / "kit")
    roster = tmp_path / "elsewhere" / "server" / "roster.json"
    assert Roster(roster, kit.authority_pem).member(kit.public) is None  # revoked at the end
    assert (kit.not_after - datetime.now(UTC)).days == 89
