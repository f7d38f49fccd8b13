"""Checks of ``fedcore doctor`` for a device: kit, proxy, server, clock, wake-up port and store."""

from __future__ import annotations

import base64
import os
import socket
import ssl
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from urllib.parse import unquote, urlsplit

from edge_client.delivery.clock import ClockReading, read_floor
from edge_client.delivery.clock import shown as shown_time
from fedcore.crypto.kit import Kit, client_context, load_kit
from fedcore.doctor import Checkup, Finding, disk, expiry, guarded
from fedcore.errors import ConfigError, FedcoreError
from fedcore.rpc.proxy import check_proxies, proxy_for, shown

_TIMEOUT_S = 10.0
_SKEW_S = 600.0
_MAX_HEAD_BYTES = 1 << 15


def examine(asked: Checkup) -> Iterator[Finding]:
    """Yields findings about the device's kit and store, as far as they are given."""
    if asked.kit is not None:
        yield from _kit(asked.kit)
    store = asked.store
    if store is not None:
        yield guarded("store", lambda: _releases_clock(store), remedy="see docs/release.md, Clocks")
        yield disk(store)
    else:
        yield Finding(
            "store",
            "ok",
            "released models were not checked; --store names their folder, if there is one",
        )


def _kit(folder: Path) -> Iterator[Finding]:
    """Yields findings about the kit, its disk and the connection to the kit's servers."""
    try:
        kit = load_kit(folder)
    except FedcoreError as error:
        yield Finding(
            "kit",
            "fail",
            str(error),
            "create a request with `fedcore client enrol`, install the operator's kit with "
            "`client install`",
        )
    else:
        remedy = (
            "ask the operator to renew it, and install the new kit with `fedcore client install`"
        )
        yield expiry(f"{kit.role} {kit.name} of {kit.project}", kit.not_after, remedy=remedy)
        yield from _connection(kit)
    yield disk(folder)


def _connection(kit: Kit) -> Iterator[Finding]:
    """Yields findings about the proxy, the server's addresses, the clock and the wake-up port."""
    try:
        check_proxies(os.environ)
    except ConfigError as error:
        remedy = "set that variable to an HTTP proxy, or unset it; nothing else was checked"
        yield Finding("proxy", "fail", str(error), remedy)
        return
    yield _proxies(kit)
    dates = list[datetime]()
    found = [(server, _server(kit, server, dates)) for server in kit.servers]
    reached = [server for server, finding in found if finding.verdict == "ok"]
    for _, finding in found:  # one address that works is enough: devices try them all
        yield replace(finding, verdict="warn") if reached and finding.verdict != "ok" else finding
    if dates:
        yield _clock(dates[0])
    for server in reached:
        host, port = _target(server)
        if port + 1 < 2**16:  # otherwise the operator sets the port, and the server announces it
            yield _wake_up(kit, host, port + 1, proxy_for(server, os.environ))


def _proxies(kit: Kit) -> Finding:
    """Reports the proxy to each address, or a single one if all are the same."""
    ways = {server: proxy_for(server, os.environ) for server in kit.servers}
    told = {server: shown(way) if way else "none" for server, way in ways.items()}
    if len(set(told.values())) == 1:
        return Finding("proxy", "ok", told[kit.servers[0]])
    return Finding("proxy", "ok", ", ".join(f"{way} to {server}" for server, way in told.items()))


def _server(kit: Kit, server: str, dates: list[datetime]) -> Finding:
    """Checks that a server answers at an address; appends its ``Date`` header to ``dates``."""
    (host, port), proxy = _target(server), proxy_for(server, os.environ)
    try:
        status, date = _ask(kit, host, port, proxy)
    except (OSError, ValueError) as error:
        return _unreachable(host, port, proxy, error)
    if date is not None:
        dates.append(date)
    if status == 403:
        return Finding(
            "server",
            "fail",
            f"{host}:{port} refuses this device: it is not, or no longer, a member",
            "ask the operator: `fedcore provision list` shows who was revoked or has expired",
        )
    return Finding("server", "ok", f"{host}:{port} answers over TLS 1.3, both sides authenticated")


def _target(server: str) -> tuple[str, int]:
    parts = urlsplit(server)
    return parts.hostname or "", parts.port or 443


def _wake_up(kit: Kit, host: str, port: int, proxy: str | None) -> Finding:
    try:
        with (
            _connect(host, port, proxy) as plain,
            client_context(kit).wrap_socket(plain, server_hostname=host),
        ):
            return Finding("wake-up", "ok", f"{host}:{port} answers")
    except (OSError, ValueError) as error:
        return Finding(
            "wake-up",
            "warn",
            f"{host}:{port}: {error}; the device will poll instead",
            "allow this port in firewalls and proxies, unless the server uses another",
        )


def _clock(theirs: datetime) -> Finding:
    off_s = (datetime.now(UTC) - theirs).total_seconds()
    told = f"{abs(off_s):.0f} s {'ahead of' if off_s > 0 else 'behind'} the server's"
    remedy = "set the clock; NTP keeps it correct (timedatectl set-ntp true)"
    if abs(off_s) > _SKEW_S:
        return Finding("clock", "fail", f"{told}, more than the {_SKEW_S:.0f} s allowed", remedy)
    return Finding("clock", "warn" if abs(off_s) > _SKEW_S / 5 else "ok", told, remedy)


def _releases_clock(store: Path, now: datetime | None = None) -> Finding:
    """Compares the clock with the store's time floor, and checks that its metadata is current."""
    judged = ClockReading(now or datetime.now(UTC), read_floor(store / "trust"))
    floor, remedy = judged.floor, "set the clock; NTP keeps it correct (timedatectl set-ntp true)"
    if floor.at is None:
        remedy = "fetch the first release with `fedcore device update --root`"
        return Finding("store", "warn", f"{store}: no release has been verified here yet", remedy)
    if (clock_warning := judged.clock_warning()) is not None:
        return Finding("store", "fail" if judged.is_slow else "warn", clock_warning, remedy)
    if floor.until is not None and floor.until <= judged.at:
        return Finding(
            "store",
            "warn",
            f"the metadata verified last was valid until {shown_time(floor.until)}; this "
            f"device's clock says {shown_time(judged.now)}",
            "run `fedcore device update`; if it is refused, the publisher must run `fedcore "
            "release refresh`",
        )
    return Finding("store", "ok", f"the clock is later than {shown_time(floor.at)}, signed time")


def _unreachable(host: str, port: int, proxy: str | None, error: Exception) -> Finding:
    through = f" through {shown(proxy)}" if proxy else ""
    told = f"{host}:{port}{through}: {error}"
    if isinstance(error, ssl.SSLCertVerificationError):
        remedy = "this is not the kit's server, or its certificate has expired: ask the operator"
    elif isinstance(error, ssl.SSLError):
        remedy = "ask the operator for a new kit: the server refuses this certificate"
    elif isinstance(error, socket.gaierror):
        remedy = (
            "check that the name resolves on this machine; the operator may provision another name"
        )
    else:
        remedy = "check that the server runs and that firewalls and proxies allow this port"
    return Finding("server", "fail", told, remedy)


def _ask(kit: Kit, host: str, port: int, proxy: str | None) -> tuple[int, datetime | None]:
    """Sends ``GET /`` over mutual TLS; returns the status code and the ``Date`` header, if any."""
    with (
        _connect(host, port, proxy) as plain,
        client_context(kit).wrap_socket(plain, server_hostname=host) as secure,
    ):
        secure.sendall(b"GET / HTTP/1.1\r\nHost: %b\r\nConnection: close\r\n\r\n" % host.encode())
        head = _read_head(secure)
    lines = head.split("\r\n")
    status = int(lines[0].split(" ")[1])
    for line in lines[1:]:
        name, _, value = line.partition(":")
        if name.lower() == "date":
            return status, parsedate_to_datetime(value.strip())
    return status, None


def _connect(host: str, port: int, proxy: str | None) -> socket.socket:
    """Connects to a host, through an HTTP proxy (``CONNECT``) if one is given.

    Raises:
        OSError: the host or the proxy cannot be reached, or the proxy refuses.
    """
    if proxy is None:
        return socket.create_connection((host, port), timeout=_TIMEOUT_S)
    parts = urlsplit(proxy if "//" in proxy else f"http://{proxy}")
    plain = socket.create_connection((parts.hostname or "", parts.port or 80), timeout=_TIMEOUT_S)
    target = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    lines = [f"CONNECT {target} HTTP/1.1", f"Host: {target}"]
    if parts.username is not None:
        words = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        lines.append(f"Proxy-Authorization: Basic {base64.b64encode(words.encode()).decode()}")
    try:
        plain.sendall("\r\n".join([*lines, "", ""]).encode())
        first = _read_head(plain).split("\r\n")[0]
        if first.split(" ")[1:2] != ["200"]:
            raise ConnectionError(f"the proxy answered {first!r}")
    except BaseException:
        plain.close()
        raise
    return plain


def _read_head(connection: socket.socket) -> str:
    head = b""
    while b"\r\n\r\n" not in head and len(head) < _MAX_HEAD_BYTES:
        # One byte at a time: after a proxy's answer, the next bytes belong to TLS.
        piece = connection.recv(1)
        if not piece:
            raise ConnectionError("closed without an answer")
        head += piece
    return head.decode("latin-1").partition("\r\n\r\n")[0]
