"""The network side of the Fleet API: an ASGI application that asks who calls before it reads."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

from fedcore.crypto.roster import Member, Roster
from fedcore.errors import DataError, DeviceError, FedcoreError, InvalidUpdate, TrustError
from fedcore.flower.fleet import Fleet, node_id_of
from fedcore.flower.fleet_api import ROUTES, Caller, Route, call, upload_of
from fedcore.rpc.hello import WAKE_PORT, Hello, check_hello, instance_of
from server.live.limits import Limits, Rates, Refusals, Uploads
from server.live.peer import key_of
from server.live.presence import Presence

log = logging.getLogger("fedcore.server")

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

ACTIVATE, DEACTIVATE = "/v1/fleet/activate-node", "/v1/fleet/deactivate-node"
PULL_OBJECT = "/v1/fleet/pull-object"
PUSH, PUSH_OBJECT = "/v1/fleet/push-messages", "/v1/fleet/push-object"
_INLINE_BYTES = 2**18
"""Requests up to so many bytes are answered at once; larger ones in a thread."""
_PIECE_BYTES = 2**17
_STATUS: tuple[tuple[type[FedcoreError], int], ...] = (
    (DataError, 400),
    (TrustError, 403),
    (InvalidUpdate, 409),
    (DeviceError, 412),
)


class _Refusal(Exception):
    """A call that is answered without asking the fleet."""

    def __init__(self, status: int, detail: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(detail)
        self.status, self.detail, self.retry_after_s = status, detail, retry_after_s


@dataclass(frozen=True)
class Gate:
    """Lets members with the role of a device call the Fleet API, within limits.

    In this order: the key of the connection is a member's, the path is one of the Fleet API's, the
    rate is kept to, the process was let in; only then is a body read, and no further than the
    call's own limit.
    """

    fleet: Fleet
    roster: Roster
    presence: Presence
    uploads: Uploads
    rates: Rates
    limits: Limits
    hello: Hello
    bodies: asyncio.Semaphore
    answers: asyncio.Semaphore
    wake_port: int
    refusals: Refusals

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request."""
        if scope["type"] != "http":
            return
        peer = str((scope.get("client") or ("?",))[0])
        try:
            member = self._member(scope)
            peer = member.name
            if scope["path"] == PULL_OBJECT:  # what it answers with may be large
                async with self.answers:
                    await _send_pieces(
                        send, await self._answer(scope, receive, member), self.limits
                    )
                return
            answer = await self._answer(scope, receive, member)
        except _Refusal as refusal:
            await self._refuse(send, peer, scope["path"], refusal)
        except FedcoreError as error:
            status = next((code for kind, code in _STATUS if isinstance(error, kind)), 500)
            await self._refuse(send, peer, scope["path"], _Refusal(status, str(error)))
        else:
            wake = (
                [(WAKE_PORT.encode(), b"%d" % self.wake_port)] if scope["path"] == ACTIVATE else []
            )
            await _respond(send, 200, b"application/x-protobuf", answer, wake)

    def _member(self, scope: Scope) -> Member:
        public = key_of(scope["state"])
        member = self.roster.member(public) if public is not None else None
        if member is None:
            raise _Refusal(403, "this certificate is not, or no longer, a member's")
        if member.role != "device":
            raise _Refusal(403, f"{member.name!r} is no device but {member.role!r}")
        return member

    async def _answer(self, scope: Scope, receive: Receive, member: Member) -> bytes:
        path, route = scope["path"], ROUTES.get(scope["path"])
        if route is None or scope["method"] != "POST":
            raise _Refusal(404, "no such call")
        caller = Caller(node_id_of(member.public), member.public, member.name)
        wait_s = self.rates.wait_s(caller.node_id)
        if wait_s > 0:
            raise _Refusal(429, "too many calls", retry_after_s=wait_s)
        headers = {
            key.decode("latin-1"): value.decode("latin-1") for key, value in scope["headers"]
        }
        instance = instance_of(headers)
        if path == ACTIVATE:
            check_hello(headers, self.hello)
        elif not self.presence.call(caller.node_id, instance):
            raise _Refusal(401, "this process was not activated")
        body = await self._body(headers, receive, route)
        if path == ACTIVATE:
            if self.presence.arrive(caller.node_id, instance, member.name, member.public):
                self.fleet.restart(caller.node_id)
                log.info("device %s: activated (%s)", member.name, instance[:8])
        elif path == DEACTIVATE:
            self.presence.leave(caller.node_id)
            log.info("device %s: left", member.name)
        elif path == PUSH:
            await self._admit(caller, body)
        elif path == PUSH_OBJECT:
            self.uploads.progress_of(caller.node_id)
        if len(body) > _INLINE_BYTES:
            return await asyncio.to_thread(call, self.fleet, caller, route, body)
        return call(self.fleet, caller, route, body)

    async def _admit(self, caller: Caller, body: bytes) -> None:
        upload = upload_of(self.fleet, caller, body)
        if upload is None:
            return
        if not await self.uploads.enter(caller.node_id, upload):
            raise _Refusal(503, "the server is taking in other updates", retry_after_s=1.0)
        if upload.message_id not in self.fleet.asked:  # its round ended while it waited
            self.uploads.leave(upload.message_id)

    async def _body(self, headers: dict[str, str], receive: Receive, route: Route) -> bytes:
        """Reads a request's body, counting.

        Guarantee:
            At most ``route.max_bytes`` and one piece of the connection's buffer are held, whatever
            the peer announces or sends; large bodies are read a few at a time.
        """
        announced = headers.get("content-length", "")
        if announced.isdigit() and int(announced) > route.max_bytes:
            raise _Refusal(413, f"{announced} bytes, at most {route.max_bytes} are taken")
        large = not announced.isdigit() or int(announced) > _INLINE_BYTES
        try:
            async with asyncio.timeout(self.limits.body_s):
                if not large:
                    return await _read(receive, route.max_bytes)
                async with self.bodies:
                    return await _read(receive, route.max_bytes)
        except TimeoutError:
            raise _Refusal(408, f"the request took longer than {self.limits.body_s:g} s") from None

    async def _refuse(self, send: Send, peer: str, path: str, refusal: _Refusal) -> None:
        if refusal.status not in (401, 503):  # these two are part of coming and of waiting
            self.refusals.note(peer, refusal.status, f"{path}: {refusal.detail}")
        headers = [(b"connection", b"close")] if refusal.status in (403, 408, 413) else []
        if refusal.retry_after_s is not None:
            headers.append((b"retry-after", f"{refusal.retry_after_s:.2f}".encode()))
        body = json.dumps({"detail": refusal.detail}).encode()
        await _respond(send, refusal.status, b"application/json", body, headers)


async def _read(receive: Receive, max_bytes: int) -> bytes:
    pieces, size = [], 0
    while True:
        event = await receive()
        if event["type"] == "http.disconnect":
            raise _Refusal(400, "the peer went away while it sent")
        piece = event.get("body", b"")
        size += len(piece)
        if size > max_bytes:
            raise _Refusal(413, f"more than the {max_bytes} bytes that are taken")
        pieces.append(piece)
        if not event.get("more_body"):
            return b"".join(pieces)


async def _send_pieces(send: Send, body: bytes, limits: Limits) -> None:
    """Sends a large answer no faster than its peer reads, so that few are held at a time."""
    length = (b"content-length", str(len(body)).encode())
    head = [(b"content-type", b"application/x-protobuf"), length]
    try:
        async with asyncio.timeout(limits.body_s):
            await send({"type": "http.response.start", "status": 200, "headers": head})
            for start in range(0, len(body), _PIECE_BYTES):
                piece = body[start : start + _PIECE_BYTES]
                await send({"type": "http.response.body", "body": piece, "more_body": True})
            await send({"type": "http.response.body", "body": b""})
    except TimeoutError:
        return  # uvicorn hangs up on an answer that was not finished


async def _respond(
    send: Send,
    status: int,
    kind: bytes,
    body: bytes,
    headers: list[tuple[bytes, bytes]] | None = None,
) -> None:
    length = (b"content-length", str(len(body)).encode())
    head = [(b"content-type", kind), length, *(headers or [])]
    await send({"type": "http.response.start", "status": status, "headers": head})
    await send({"type": "http.response.body", "body": body})
