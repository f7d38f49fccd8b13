"""Server checks of ``fedcore doctor``: identity, clock, roster, ports, audit log, disk, proxy."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from fedcore.crypto.certificates import parse_certificate
from fedcore.crypto.roster import Roster, ServerIdentity, load_server_identity
from fedcore.crypto.roster_seen import SEEN, read_seen
from fedcore.doctor import Checkup, Finding, disk, expiry, guarded
from fedcore.errors import FedcoreError, ResourceError
from fedcore.observability.words import counted, is_or_are
from fedcore.rpc.proxy import proxy_for, shown
from server.live.operators.drained import read_drained, unknown
from server.operator_log import AUDIT, MARK, verify_audit

_SOON_DAYS = 14
AUTHORITY = "authority.pem"
"""Certificate next to the server's folder; present if the authority is on this machine."""


def examine(asked: Checkup) -> Iterator[Finding]:
    """Yields the findings about a server."""
    folder = asked.identity
    assert folder is not None
    try:
        identity = load_server_identity(folder)
    except FedcoreError as error:
        yield Finding(
            "identity",
            "fail",
            str(error),
            "create one with `fedcore provision server HOST`, extend it with `provision "
            "renew server`",
        )
    else:
        remedy = "`fedcore provision renew server`, and start the server again"
        yield expiry("the server's certificate", identity.kit.not_after, remedy=remedy)
        yield _clock(identity)
        remedy = (
            "follow the message; if the authority is on another machine, copy roster.json from "
            "it again"
        )
        yield guarded("roster", lambda: _roster(identity), remedy=remedy)
        remedy = "remove drained.json, and drain the devices again that should be"
        yield guarded("drained", lambda: _drained(identity), remedy=remedy)
        yield _ports(identity)
        yield guarded("audit", lambda: _audit(folder), remedy="check who has write access to it")
        if (folder.absolute().parent / AUTHORITY).is_file():
            log = folder.absolute().parent / AUDIT
            yield guarded("authority", lambda: _log(log), remedy="check who has write access to it")
    yield disk(asked.runs)
    proxy = proxy_for("https://", os.environ)
    finding = (
        f"{shown(proxy)}; a server does not need a proxy, but operators who connect to it may"
        if proxy
        else "none"
    )
    yield Finding("proxy", "ok", finding)


def _clock(identity: ServerIdentity) -> Finding:
    certificate = parse_certificate(identity.kit.certificate_pem, where="certificate")
    now, begins = datetime.now(UTC), certificate.not_valid_before_utc
    finding = f"{now:%Y-%m-%d %H:%M:%S} UTC"
    if now < begins:
        return Finding(
            "clock",
            "fail",
            f"{finding}, before the certificate was issued ({begins:%Y-%m-%d %H:%M})",
            "set the clock; NTP keeps it correct (timedatectl set-ntp true)",
        )
    return Finding("clock", "ok", finding)


def _roster(identity: ServerIdentity) -> Finding:
    # Writes nothing: the user who runs this may not be the one who runs the server.
    roster = Roster(identity.roster_path, identity.kit.authority_pem)
    had = read_seen(identity.kit.folder / SEEN)
    if roster.version < had.version:
        was = f"version {roster.version}, but version {had.version} was in force before"
        finding = f"{was}: the server refuses it"
        remedy = (
            "copy the newest roster.json from the authority; if that is lost, revoke again "
            f"everyone missing from it, and remove {SEEN}"
        )
        return Finding("roster", "fail", finding, remedy)
    members = roster.members()
    now = datetime.now(UTC)
    soon = [one.name for one in members if (one.not_after - now).days < _SOON_DAYS]
    devices = sum(one.role == "device" for one in members)
    others = counted(len(members) - devices, "other")
    finding = f"version {roster.version}: {counted(devices, 'device')}, {others}"
    if had.restored is not None and roster.version <= had.version:
        finding = (
            f"{finding}; it was restored from a backup of {had.restored:%Y-%m-%d %H:%M} UTC, so "
            "members revoked since then are in force again"
        )
        remedy = (
            "run `fedcore provision revoke NAME` for each of them; the next change of the roster "
            "clears this warning"
        )
        return Finding("roster", "warn", finding, remedy)
    if not devices:
        return Finding("roster", "warn", finding, "`fedcore provision device NAME --request FILE`")
    if soon:
        names = ", ".join(soon[:5]) + (", ..." if len(soon) > 5 else "")
        finding = f"{finding}; {len(soon)} expire within {_SOON_DAYS} days: {names}"
        remedy = "run `fedcore provision renew NAME`, and install the new kit"
        return Finding("roster", "warn", finding, remedy)
    return Finding("roster", "ok", finding)


def _log(path: Path) -> Finding:
    lines = counted(verify_audit(path, begun_loose=True), "line")
    return Finding("authority", "ok", f"{lines} in its audit log, in an unbroken chain")


def _drained(identity: ServerIdentity) -> Finding:
    drained = read_drained(identity.kit.folder)
    strangers = unknown(drained, Roster(identity.roster_path, identity.kit.authority_pem))
    finding = f"{counted(len(drained), 'device')} {is_or_are(len(drained))} left out of rounds"
    if strangers:
        finding = f"{finding}; there is no device in force named {', '.join(strangers[:5])}"
        return Finding("drained", "warn", finding, "`fedcore server drain NAME --undo`")
    return Finding("drained", "ok", finding)


def _ports(identity: ServerIdentity) -> Finding:
    from server.live.operators.client import ask_local

    wanted = tuple(range(identity.port, min(identity.port + 2, 2**16)))
    try:
        said = ask_local(identity.kit.folder, {"verb": "status"})
        finding = (
            f"a server is running: {said['run']} on {said['listens']}, wakes on {said['wakes']}"
        )
        return Finding("ports", "ok", finding)
    except ResourceError:
        taken = [port for port in wanted if not _is_free(port)]
    if taken:
        return Finding(
            "ports",
            "fail",
            f"port {' and '.join(map(str, taken))} is in use by another program, or forbidden",
            "stop the program that uses it (ss -ltnp), or choose others with --listen and "
            "--wake-port",
        )
    finding = f"{' and '.join(map(str, wanted))}: free; allow them in firewalls"
    return Finding("ports", "ok", finding)


def _is_free(port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except (OSError, OverflowError):
            return False
    return True


def _audit(folder: Path) -> Finding:
    if not any((folder / name).exists() for name in (AUDIT, MARK)):
        if (folder / SEEN).exists():
            finding = (
                f"{folder / AUDIT} is missing, but a server has run with this identity ({SEEN})"
            )
            remedy = (
                "restore it, or check who has write access here: the next server starts a new log"
            )
            return Finding("audit", "fail", finding, remedy)
        return Finding("audit", "ok", "no server has run with this identity yet")
    lines = verify_audit(folder / AUDIT)
    return Finding("audit", "ok", f"{counted(lines, 'line')}, in an unbroken chain")
