"""The wake-up streams: notify devices of work at once, and detect at once when one disconnects.

Each device keeps one gRPC stream open (`Wakeups.Watch`). `serve_wakeups` starts the gRPC server,
and `disconnect_revoked` disconnects devices whose membership ends.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import dataclass, field

import grpc
from google.protobuf.message import DecodeError

from fedcore.crypto.roster import Member, Roster, ServerIdentity
from fedcore.errors import ResourceError
from fedcore.flower.fleet import node_id_of
from fedcore.rpc.crowd import SWEEP_S, Crowd
from fedcore.rpc.grpc_peer import peer_key
from fedcore.rpc.open_calls import OpenCall, OpenCalls
from fedcore.rpc.wake_pb2 import DESCRIPTOR, Call, WatchRequest
from fedcore.rpc.wake_pb2_grpc import WakeServicer
from server.live.network.connections import Connections
from server.live.network.limits import STREAM_S, PeerLog, Refusals, Streams, Uploads
from server.live.network.presence import Presence

log = logging.getLogger("fedcore.server")

_PING_S, _PONG_S = 2, 3
"""Keepalive interval and timeout in seconds. A lost device is noticed within their sum plus 0.5 s.
"""
_IDLE_S = 5
_STREAMS = 4
"""Open streams of a device, on any of its connections; one more ends its oldest."""
_OPTIONS = (
    ("grpc.keepalive_time_ms", _PING_S * 1000),
    ("grpc.keepalive_timeout_ms", _PONG_S * 1000),
    ("grpc.http2.ping_timeout_ms", _PONG_S * 1000),  # default 60 s, which overrides the one above
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 1000),
    ("grpc.max_receive_message_length", 4096),
    ("grpc.max_metadata_size", 8192),
    ("grpc.max_concurrent_streams", 4),  # per connection; a device has one
    ("grpc.max_connection_idle_ms", _IDLE_S * 1000),  # closes connections of rejected devices
    ("grpc.so_reuseport", 0),
)


@dataclass(frozen=True)
class Wakeups(WakeServicer):
    """The gRPC service of the wake-up streams."""

    presence: Presence
    roster: Roster
    uploads: Uploads
    refusals: Refusals
    streams: Streams = field(default_factory=Streams)
    lines: PeerLog = field(default_factory=PeerLog)
    open_calls: OpenCalls = field(default_factory=lambda: OpenCalls(_STREAMS))

    async def Watch(  # noqa: N802 - the name of the service's method
        self, request: WatchRequest, context: grpc.aio.ServicerContext[WatchRequest, Call]
    ) -> AsyncIterator[Call]:
        """Yields ``OPEN`` once the stream is registered, and ``WORK`` whenever work awaits.

        Ends when the device opens another stream or is removed. Aborts if the peer is no device of
        the project, opens streams too often, or has not activated its process.
        """
        public = peer_key(context)
        member = self.roster.member(public) if public is not None else None
        if public is None or member is None or member.role != "device":
            # Log unknown peers by address without the port, which differs on each connection.
            peer = member.name if member else context.peer().rpartition(":")[0]
            self.refusals.note(
                peer,
                403,
                "stream: the certificate is not that of a device in force",
                member=member is not None,
            )
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, "not a device of this project")
        assert public is not None
        assert member is not None
        if not self.streams.admit(public):
            self.refusals.note(member.name, 429, "stream: opened too often")
            # Delay the answer, or a device that retries in a loop would do so at full speed.
            await asyncio.sleep(STREAM_S)
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "opened too often")
        with self.open_calls.opened(public, context) as call:
            calls = self._calls(request, context, member, call)
            async with aclosing(calls):
                async for each in calls:
                    yield each

    async def _calls(
        self,
        request: WatchRequest,
        context: grpc.aio.ServicerContext[WatchRequest, Call],
        member: Member,
        call: OpenCall,
    ) -> AsyncGenerator[Call, None]:
        node_id = node_id_of(member.public)
        stream = self.presence.watch(node_id, request.instance)
        if stream is None:
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "this process was not activated")
        assert stream is not None
        self.lines.tell(member.name, "stream open")
        kind = Call.OPEN
        try:
            while True:
                call.sending()
                yield Call(kind=kind)
                call.sent()
                await stream.wait()
                stream.clear()
                if not self.presence.watched_by(node_id, stream):
                    return
                kind = Call.WORK
        finally:
            if self.presence.watched_by(node_id, stream):
                self.lines.tell(member.name, "stream closed without a sign-off")
                self.presence.unwatch(node_id, stream)
                self.uploads.disconnected(node_id)


def _request(raw: bytes) -> WatchRequest:
    """Parses a request; returns an empty one if ``raw`` is malformed."""
    try:
        request: WatchRequest = WatchRequest.FromString(raw)
    except DecodeError:
        return WatchRequest()
    return request


async def serve_wakeups(
    wakeups: Wakeups,
    identity: ServerIdentity,
    *,
    host: str,
    port: int,
    connections: int,
    handshake_s: float,
) -> tuple[grpc.aio.Server, int]:
    """Starts the gRPC server of the wake-up streams; returns it and the bound port.

    Args:
        wakeups: The service.
        identity: The server's key and certificate, and the authority for devices' certificates.
        host: Address to listen on.
        port: Port to listen on; 0 lets the system choose.
        connections: Maximum number of connections; devices without one poll instead.
        handshake_s: Timeout of the TLS handshake, in seconds.

    Raises:
        ResourceError: the port is in use, or may not be used.
    """
    kit = identity.kit
    credentials = grpc.ssl_server_credentials(
        [(kit.key_pem(), kit.certificate_pem)],
        root_certificates=kit.authority_pem,
        require_client_auth=True,
    )
    granted = (
        ("grpc.max_allowed_incoming_connections", connections),
        ("grpc.server_handshake_timeout_ms", int(handshake_s * 1000)),
    )
    server = grpc.aio.server(options=_OPTIONS + granted)
    # The generated function would log a traceback for each malformed request, from any peer.
    watch = grpc.unary_stream_rpc_method_handler(
        wakeups.Watch,
        request_deserializer=_request,
        response_serializer=Call.SerializeToString,
    )
    service = DESCRIPTOR.services_by_name["Wake"].full_name
    handler = grpc.method_handlers_generic_handler(service, {"Watch": watch})
    server.add_generic_rpc_handlers((handler,))
    target = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    try:
        bound = server.add_secure_port(target, credentials)
    except RuntimeError:
        raise ResourceError(
            f"server: port {port} of {host} is in use or forbidden. Nothing was started; stop "
            "the program that uses it, or choose another with --wake-port."
        ) from None
    await server.start()
    return server, bound


async def keep_room(wakeups: Wakeups, port: int, connections: Connections, most: int) -> None:
    """Ends streams that are not read, and connections without one that are too many, forever.

    Args:
        wakeups: The service.
        port: Its port.
        connections: The connections of the other port.
        most: Most connections on ``port``.
    """
    crowd = Crowd(port, most=most)
    while True:
        await asyncio.sleep(SWEEP_S)
        wakeups.open_calls.sweep()
        peers = wakeups.open_calls.peers()
        await asyncio.to_thread(crowd.sweep, peers, others=len(connections))


async def disconnect_revoked(
    presence: Presence,
    roster: Roster,
    uploads: Uploads,
    connections: Connections,
    *,
    summarise: Callable[[], None],
    every_s: float,
) -> None:
    """Closes streams and connections of former members, every ``every_s`` seconds, forever.

    Also closes connections that exceed a timeout, see `Connections.sweep`, and calls ``summarise``,
    which logs what was not logged one by one.
    """
    while True:
        await asyncio.sleep(every_s)
        # Also makes the roster load a newer list while no device calls.
        members = {member.public for member in roster.members()}
        connections.sweep(members)
        summarise()
        for node_id, public in presence.keys().items():
            if public not in members:
                log.warning("device %s: no longer a member; disconnected", node_id)
                presence.remove(node_id)
                uploads.disconnected(node_id)
