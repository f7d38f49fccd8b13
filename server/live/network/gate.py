"""The ASGI application of the network port: authenticates each request before it reads the body.

`Gate` enforces membership, rates and size limits. It passes devices' requests to the Fleet API, and
those of operators and viewers to `server.live.operators.endpoint`.
"""

from __future__ import annotations

import asyncio
import json
import tempfile
import traceback
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from fedcore.crypto.roster import Member, Roster
from fedcore.errors import (
    DataError,
    DeviceError,
    FedcoreError,
    InvalidUpdate,
    ResourceError,
    TrustError,
)
from fedcore.files import disk_errors
from fedcore.flower.fleet import Fleet, node_id_of
from fedcore.flower.fleet_api import ROUTES, Caller, FileResponse, Route, call, upload_of
from fedcore.flower.fleet_arrivals import BEGINNING_BYTES, ChunkUpload, parse_request_head
from fedcore.flower.fleet_bundle import PUSH_BUNDLE, read_bundle
from fedcore.observability.foreign import foreign
from fedcore.rpc.hello import (
    BUNDLES,
    WAKE_PORT,
    Hello,
    check_hello,
    instance_of,
    next_request_s,
    reason_of,
)
from server.live.network.asgi import Receive, Scope, Send, respond, send_file
from server.live.network.limits import Limits, PeerLog, Rates, Refusals, Uploads
from server.live.network.peer import divert_of, key_of
from server.live.network.presence import Presence

Begin = Callable[[bytes], ChunkUpload | None]
Operate = Callable[[Scope, Receive, Send, Member], Awaitable[None]]

ACTIVATE, DEACTIVATE = "/v1/fleet/activate-node", "/v1/fleet/deactivate-node"
PUSH, PUSH_OBJECT = "/v1/fleet/push-messages", "/v1/fleet/push-object"
PING = "/"
"""Path that ``fedcore doctor`` requests to check that a device is authenticated; has no effect."""
_MEMORY_BYTES = 2**16
"""Maximum bytes of a request's body in memory while it arrives; a longer one goes to a file."""
_STATUS: tuple[tuple[type[FedcoreError], int], ...] = (
    (DataError, 400),
    (TrustError, 403),
    (InvalidUpdate, 409),
    (DeviceError, 412),
)


class _Refusal(Exception):
    """A request that the gate rejects, with the HTTP status and text of the answer."""

    def __init__(self, status: int, detail: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(detail)
        self.status, self.detail, self.retry_after_s = status, detail, retry_after_s


@dataclass(frozen=True)
class _Peer:
    """Who sent a request, for the log: a member by name, or a stranger by address."""

    name: str
    member: bool


@dataclass(frozen=True)
class Gate:
    """ASGI application that lets member devices call the Fleet API, within limits.

    It checks in this order: the connection's key is a member's, the path is in the Fleet API, the
    rate is within the limit, the calling process is the active one. Only then it reads the body,
    up to the route's size limit.
    """

    fleet: Fleet
    roster: Roster
    presence: Presence
    uploads: Uploads
    rates: Rates
    limits: Limits
    hello: Hello
    spool: Path
    """Folder for bodies while they arrive."""
    bodies: asyncio.Semaphore
    """Limits how many objects are parsed at a time."""
    wake_port: int
    """Port of the wake-up streams, which devices learn on activation."""
    refusals: Refusals
    lines: PeerLog = field(default_factory=PeerLog)
    operate: Operate | None = None
    """Handler for operators and viewers; None to reject them."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request."""
        if scope["type"] != "http":
            return None
        peer, begun = _Peer(str((scope.get("client") or ("?",))[0]), member=False), False

        async def sent(event: MutableMapping[str, Any]) -> None:
            nonlocal begun
            begun = True
            await send(event)

        try:
            member = self._member(scope)
            peer = _Peer(member.name, member=True)
            if member.role != "device" and self.operate is not None:
                self._check_rate(node_id_of(member.public))
                return await self.operate(scope, receive, sent, member)
            answer = await self._answer(scope, receive, member)
        except _Refusal as refusal:
            await self._refuse(send, peer, scope["path"], refusal)
        except FedcoreError as error:
            if isinstance(error, ResourceError):  # the device will retry, so the round waits
                self.fleet.report_storage_error(error)
            status = next((code for kind, code in _STATUS if isinstance(error, kind)), 500)
            await self._refuse(send, peer, scope["path"], _Refusal(status, str(error)))
        except Exception as error:  # an unforeseen input must not break the connection
            self._note(peer, 500, scope["path"], _describe(error))
            if not begun:
                text = f"the request failed ({type(error).__name__})"
                await respond(send, 500, b"application/json", json.dumps({"detail": text}).encode())
        else:
            if isinstance(answer, FileResponse):
                await send_file(send, answer, timeout_s=self.limits.body_s)
                return None
            offers = self._offers() if scope["path"] == ACTIVATE else []
            await respond(send, 200, b"application/x-protobuf", answer, offers)

    def _offers(self) -> list[tuple[bytes, bytes]]:
        """Returns the headers that tell an admitted device what else this server has."""
        return [(WAKE_PORT.encode(), b"%d" % self.wake_port), (BUNDLES.encode(), b"1")]

    def _member(self, scope: Scope) -> Member:
        public = key_of(scope["state"])
        member = self.roster.member(public) if public is not None else None
        if member is None:
            raise _Refusal(403, "this certificate does not, or no longer, belong to a member")
        if member.role != "device" and self.operate is None:
            raise _Refusal(403, f"{member.name!r} is not a device but {member.role!r}")
        return member

    def _has_tokens(self, node_id: int, calls: int) -> bool:
        return self.rates.wait_s(node_id, calls) == 0.0

    def _check_rate(self, node_id: int, calls: int = 1, *, paid: int = 0) -> None:
        """Takes ``calls`` from a caller's rate, of a request that has paid ``paid`` before."""
        wait_s = self.rates.wait_s(node_id, calls)
        if wait_s > 0:
            # What was paid is not given back: reading the request took time. The next attempt
            # pays it again, so it must not come before there is enough for both.
            wait_s += paid / self.limits.calls_per_s
            raise _Refusal(429, "too many requests", retry_after_s=wait_s)

    async def _answer(self, scope: Scope, receive: Receive, member: Member) -> bytes | FileResponse:
        path, route = scope["path"], ROUTES.get(scope["path"])
        if path == PING and scope["method"] == "GET":
            self._check_rate(node_id_of(member.public))
            return b""
        if route is None or scope["method"] != "POST":
            raise _Refusal(404, "no such endpoint")
        node_id = node_id_of(member.public)
        grant = partial(self._has_tokens, node_id)
        caller = Caller(node_id, member.public, member.name, grant)
        self._check_rate(caller.node_id)
        headers = {
            key.decode("latin-1"): value.decode("latin-1") for key, value in scope["headers"]
        }
        instance = instance_of(headers)
        if path == ACTIVATE:
            if not instance:
                raise _Refusal(400, "it does not identify a device process")
            check_hello(headers, self.hello)
        elif not self.presence.call(caller.node_id, instance, next_request_s(headers)):
            raise _Refusal(401, "this process was not activated")
        begin = None
        if path == PUSH_OBJECT:
            self.uploads.progress_of(caller.node_id)
            begin = partial(self._begin, caller)
        body = await self._body(headers, scope, receive, route, begin)
        if isinstance(body, ChunkUpload):
            self.uploads.progress_of(caller.node_id)
            self.fleet.report_storage_error(None)
            with closing(body):
                return bytes(body.finish().SerializeToString())
        if isinstance(body, bytes):
            await self._prepare(path, caller, headers, body)
            return call(self.fleet, caller, route, body)
        with body:
            if path == PUSH_OBJECT:
                self.uploads.progress_of(caller.node_id)
                async with self.bodies:  # parsing takes several times the object's size in memory
                    answer = await asyncio.to_thread(call, self.fleet, caller, route, body)
                self.fleet.report_storage_error(None)
                return answer
            raw = body.read()
            await self._prepare(path, caller, headers, raw)
            return await asyncio.to_thread(call, self.fleet, caller, route, raw)

    def _begin(self, caller: Caller, raw: bytes) -> ChunkUpload | None:
        """Returns the receiver of the large chunk that starts with ``raw``; None if none does."""
        begun = parse_request_head(raw)
        if begun is None:
            return None
        arrival = ChunkUpload(self.fleet, caller.node_id, caller.name, begun)
        try:
            arrival.write(memoryview(raw)[begun.body_at :])
        except BaseException:
            arrival.close()
            raise
        return arrival

    async def _prepare(
        self, path: str, caller: Caller, headers: dict[str, str], body: bytes
    ) -> None:
        """Updates presence, admission and the log before Flower's handlers get a call."""
        if path == ACTIVATE:
            instance, ended = instance_of(headers), reason_of(headers)
            public = caller.public_key
            if self.presence.arrive(caller.node_id, instance, caller.name, public, ended):
                self.fleet.restart(caller.node_id)
                self.lines.tell(caller.name, "activated", instance[:8])
                if ended:
                    self.lines.tell(caller.name, "its process before", ended)
        elif path == DEACTIVATE:
            reason = reason_of(headers)
            self.presence.leave(caller.node_id, reason)
            self.lines.tell(caller.name, "left", reason)
        elif path in (PUSH, PUSH_BUNDLE):
            await self._admit(caller, path, body)
        elif path == PUSH_OBJECT:
            self.uploads.progress_of(caller.node_id)

    async def _admit(self, caller: Caller, path: str, body: bytes) -> None:
        if more := len(body) // self.limits.call_bytes:
            self._check_rate(caller.node_id, more, paid=1)
        if path == PUSH_BUNDLE:
            bundle = read_bundle(body)
            self._check_rate(caller.node_id, len(bundle.objects), paid=1 + more)
            body = bundle.call
        upload = upload_of(self.fleet, caller, body)
        if upload is None:
            return
        if not await self.uploads.enter(caller.node_id, upload):
            raise _Refusal(503, "the server is busy receiving other updates", retry_after_s=1.0)
        if upload.message_id not in self.fleet.pending:  # its round ended while it waited
            self.uploads.leave(upload.message_id)

    async def _body(
        self,
        headers: dict[str, str],
        scope: Scope,
        receive: Receive,
        route: Route,
        begin: Begin | None,
    ) -> bytes | BinaryIO | ChunkUpload:
        """Reads a request's body: bytes if short, else a file, or a chunk's `ChunkUpload`.

        ``begin`` gets the first bytes, and returns the receiver of the rest if they start a chunk.

        Guarantee:
            Uses at most `_MEMORY_BYTES` and one connection buffer of memory, and at most
            ``route.max_bytes`` on disk, whatever the peer announces or sends. A slow peer does not
            delay others.
        """
        announced = _length(headers)
        if announced is not None and announced > route.max_bytes:
            raise _Refusal(413, f"{announced} bytes, expected at most {route.max_bytes}")
        try:
            async with asyncio.timeout(self.limits.body_s):
                read = await _read(receive, route.max_bytes, self.spool, begin)
                if isinstance(read, ChunkUpload) and not read.is_whole:
                    await self._receive_rest(read, scope, receive, _length(headers))
                return read
        except TimeoutError:
            raise _Refusal(408, f"the request took longer than {self.limits.body_s:g} s") from None

    async def _receive_rest(
        self, arrival: ChunkUpload, scope: Scope, receive: Receive, length: int | None
    ) -> None:
        """Receives the rest of a chunk, in a request whose body has ``length`` bytes if known."""
        divert = divert_of(scope["state"])
        left_bytes = None if length is None else length - arrival.received_bytes
        try:
            ended = divert(scope, arrival.write, left_bytes) if divert is not None else None
            if ended is not None:
                await ended
                return
            while True:
                event = await receive()
                if event["type"] == "http.disconnect":
                    raise ConnectionResetError("the peer disconnected while sending")
                arrival.write(event.get("body", b""))
                if not event.get("more_body"):
                    return
        except ConnectionResetError as error:
            arrival.close()
            raise _Refusal(400, str(error)) from None
        except BaseException:
            arrival.close()
            raise

    def _note(self, peer: _Peer, status: int, path: str, text: str) -> None:
        self.refusals.note(peer.name, status, f"{foreign(path, 100)}: {text}", member=peer.member)

    async def _refuse(self, send: Send, peer: _Peer, path: str, refusal: _Refusal) -> None:
        if refusal.status not in (401, 503):  # these two are normal: activate first, retry later
            self._note(peer, refusal.status, path, refusal.detail)
        headers = [(b"connection", b"close")] if refusal.status in (403, 408, 413) else []
        if refusal.retry_after_s is not None:
            headers.append((b"retry-after", f"{refusal.retry_after_s:.2f}".encode()))
        body = json.dumps({"detail": refusal.detail}).encode()
        await respond(send, refusal.status, b"application/json", body, headers)


def _describe(error: Exception) -> str:
    """Describes an unexpected error in a line: type, message and source location."""
    frame = traceback.extract_tb(error.__traceback__)[-1:]
    where = "".join(f" at {Path(one.filename).name}:{one.lineno}" for one in frame)
    return f"{type(error).__name__}: {foreign(error)}{where}"


def _length(headers: dict[str, str]) -> int | None:
    """Returns the body's length from the headers; None if they do not specify it."""
    announced = headers.get("content-length", "")
    return int(announced) if announced.isdecimal() and "transfer-encoding" not in headers else None


async def _read(
    receive: Receive, max_bytes: int, spool: Path, begin: Begin | None
) -> bytes | BinaryIO | ChunkUpload:
    pieces: list[bytes] = []
    size, file = 0, None
    try:
        while True:
            event = await receive()
            if event["type"] == "http.disconnect":
                raise _Refusal(400, "the peer disconnected while sending")
            pieces.append(event.get("body", b""))
            size += len(pieces[-1])
            if size > max_bytes:
                raise _Refusal(413, f"more than the {max_bytes} bytes allowed")
            if begin is not None and size >= BEGINNING_BYTES:
                arrival, begin = begin(b"".join(pieces)), None
                if arrival is not None:
                    arrival.is_whole = not event.get("more_body")
                    return arrival
            if size > _MEMORY_BYTES:
                with disk_errors(spool):
                    file = file or tempfile.TemporaryFile(dir=spool)  # noqa: SIM115 - its reader's
                    file.writelines(pieces)
                pieces.clear()
            if not event.get("more_body"):
                break
    except BaseException:
        if file is not None:
            file.close()
        raise
    if file is None:
        return b"".join(pieces)
    file.seek(0)
    return file
