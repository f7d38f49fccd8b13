"""Client for a running server's administration: over its Unix socket, or over the network."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from fedcore import errors
from fedcore.crypto.kit import Kit, client_context
from fedcore.crypto.roster import check_server_folder
from fedcore.errors import DataError, FedcoreError, ResourceError, TrustError
from fedcore.rpc.proxy import check_proxies

SOCKET = "control.sock"
OPERATE = "/v1/operate"
_MAX_ANSWER_BYTES = 64 << 20  # 64 MiB: 100,000 devices
_TIMEOUT_S = 60.0
_LONGEST_PATH_BYTES = 100
"""Longest path that fits into a Unix socket's address on every system."""


def ask_local(folder: Path, request: dict[str, Any]) -> dict[str, Any]:
    """Sends a request to a server on this machine, over its Unix socket, and returns the answer.

    Args:
        folder: The server's folder, which contains the socket.
        request: Fields of an `OperatorRequest`.

    Raises:
        DataError: the folder is not a server's, or the answer cannot be parsed.
        ResourceError: no server answers, or this user may not use the socket.
        FedcoreError: the error with which the server answered.
    """
    path = folder / SOCKET
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        # A backup and an evaluation wait for the end of the current round.
        waits = request["verb"] in ("backup", "evaluate")
        connection.settimeout(None if waits else _TIMEOUT_S)
        try:
            check_server_folder(folder)
            with reachable(path) as short:
                connection.connect(short)
            connection.sendall(json.dumps(request).encode() + b"\n")
            with connection.makefile("rb") as stream:
                raw = stream.read(_MAX_ANSWER_BYTES)
        except PermissionError:
            raise ResourceError(
                f"{path}: only the server's own user and root may use this socket. No request "
                "was sent; run this as one of them, or use an operator's certificate (--kit)."
            ) from None
        except OSError:
            raise ResourceError(
                f"{folder}: no server with this identity responds: none is running, or it is "
                "still starting. No request was sent; if none is running, start one with "
                "`fedcore server start`."
            ) from None
    return _read(raw, where=str(folder))


def ask_remote(kit: Kit, request: dict[str, Any]) -> dict[str, Any]:
    """Sends a request to a remote server over TLS and returns the answer.

    Args:
        kit: Kit of an operator or viewer: certificate, key and the server's address.
        request: Fields of an `OperatorRequest`.

    Raises:
        ConfigError: a proxy that the environment names cannot be used.
        TrustError: the server rejected the certificate or the role.
        ResourceError: the server cannot be reached.
        DataError: the answer cannot be parsed.
        FedcoreError: the error with which the server answered.
    """
    url = kit.servers[0]
    check_proxies(os.environ)
    try:
        answer = httpx.post(
            url + OPERATE, json=request, verify=client_context(kit), timeout=_TIMEOUT_S
        )
    except httpx.HTTPError as error:
        raise ResourceError(
            f"{url}: cannot reach the server ({error}). No request was sent; check that it runs "
            "and has not finished its rounds (`fedcore server status` on its machine), and that "
            "this certificate is in force."
        ) from None
    if answer.status_code != 200:
        raise TrustError(
            f"{url}: the server refused {kit.role} {kit.name!r} (HTTP {answer.status_code}: "
            f"{answer.text[:200]}). Nothing was done."
        )
    return _read(answer.content, where=url)


@contextmanager
def reachable(path: Path) -> Iterator[str]:
    """Context manager that yields a path to a socket short enough for a Unix socket's address."""
    plain = os.fsencode(path)
    if len(plain) <= _LONGEST_PATH_BYTES:
        yield str(path)
        return
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)


def _read(raw: bytes, *, where: str) -> dict[str, Any]:
    try:
        answer = json.loads(raw)
        succeeded = answer.pop("ok")
    except (ValueError, KeyError, AttributeError):
        raise DataError(
            f"{where}: cannot read the server's response of {len(raw)} bytes. `fedcore server "
            "status` shows whether it carried out the request; use the same version of fedcore "
            "as the server."
        ) from None
    if not succeeded:
        kind = getattr(errors, str(answer.get("error")), None)
        if not (isinstance(kind, type) and issubclass(kind, FedcoreError)):
            kind = ResourceError
        raise kind(str(answer.get("message")))
    return dict(answer)
