"""The stream that wakes devices, and by which the server sees at once that one is gone."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from functools import lru_cache

import grpc
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from google.protobuf.message import DecodeError

from fedcore.crypto.certificates import peer_public
from fedcore.crypto.roster import Roster, ServerIdentity
from fedcore.errors import ResourceError, TrustError
from fedcore.flower.fleet import node_id_of
from fedcore.rpc.wake_pb2 import DESCRIPTOR, Call, WatchRequest
from fedcore.rpc.wake_pb2_grpc import WakeServicer
from server.live.network.connections import Connections
from server.live.network.limits import STREAM_S, PeerLines, Refusals, Streams, Uploads
from server.live.network.presence import Presence

log = logging.getLogger("fedcore.server")

_PING_S, _PONG_S = 2, 3
"""A device that is cut off is noticed within the sum of the two, and half a second."""
_IDLE_S = 5
_OPTIONS = (
    ("grpc.keepalive_time_ms", _PING_S * 1000),
    ("grpc.keepalive_timeout_ms", _PONG_S * 1000),
    ("grpc.http2.ping_timeout_ms", _PONG_S * 1000),  # 60 s unless set, whatever the one above says
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 1000),
    ("grpc.max_receive_message_length", 4096),
    ("grpc.max_metadata_size", 8192),
    ("grpc.max_concurrent_streams", 4),  # of one connection; a device has one
    ("grpc.max_connection_idle_ms", _IDLE_S * 1000),  # without a stream: of one that was put out
    ("grpc.so_reuseport", 0),
)


@dataclass(frozen=True)
class Wakeups(WakeServicer):
    """Serves the streams of devices."""

    presence: Presence
    roster: Roster
    uploads: Uploads
    refusals: Refusals
    streams: Streams = field(default_factory=Streams)
    lines: PeerLines = field(default_factory=PeerLines)

    async def Watch(  # noqa: N802 - the name of the service's method
        self, request: WatchRequest, context: grpc.aio.ServicerContext[WatchRequest, Call]
    ) -> AsyncIterator[Call]:
        """Says that the stream is open, and then each time that there is work."""
        public = _peer(context)
        member = self.roster.member(public) if public is not None else None
        if public is None or member is None or member.role != "device":
            # A connection's port is another each time: a peer without a name goes by its address.
            peer = member.name if member else context.peer().rpartition(":")[0]
            self.refusals.note(peer, 403, "stream: no device's certificate that is in force")
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, "not a device of this project")
        assert public is not None
        assert member is not None
        if not self.streams.admit(public):
            self.refusals.note(member.name, 429, "stream: opened too often")
            # Not at once: who opens and cancels in a loop would come again as quickly.
            await asyncio.sleep(STREAM_S)
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "opened too often")
        node_id = node_id_of(public)
        stream = self.presence.watch(node_id, request.instance)
        if stream is None:
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "this process was not activated")
        assert stream is not None
        self.lines.tell(member.name, "stream open")
        try:
            yield Call(kind=Call.OPEN)
            while True:
                await stream.wait()
                stream.clear()
                if not self.presence.watched_by(node_id, stream):
                    return
                yield Call(kind=Call.WORK)
        finally:
            if self.presence.watched_by(node_id, stream):
                self.lines.tell(member.name, "stream closed")
                self.presence.unwatch(node_id, stream)
                self.uploads.gone(node_id)


def _request(raw: bytes) -> WatchRequest:
    """A request; one that names no process, where the bytes are none."""
    try:
        request: WatchRequest = WatchRequest.FromString(raw)
    except DecodeError:
        return WatchRequest()
    return request


def _peer(context: grpc.aio.ServicerContext[WatchRequest, Call]) -> bytes | None:
    return _public_of(context.auth_context().get("x509_pem_cert", (b"",))[0])


@lru_cache(maxsize=1024)
def _public_of(pem: bytes) -> bytes | None:
    """The key of a certificate, read once however often a device opens its stream."""
    try:
        certificate = x509.load_pem_x509_certificate(pem)
        return peer_public(certificate.public_bytes(Encoding.DER))
    except (ValueError, TrustError):
        return None


async def serve_wakeups(
    wakeups: Wakeups,
    identity: ServerIdentity,
    *,
    host: str,
    port: int,
    connections: int,
    handshake_s: float,
) -> tuple[grpc.aio.Server, int]:
    """Starts the gRPC server; returns it and the port that it has.

    Of the ``connections`` at a time each must have shaken hands within ``handshake_s``. A device
    that finds no room asks instead of being woken.

    Raises:
        ResourceError: the port is in use.
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
    # Not by the generated function: bytes that are no request would end in gRPC's own log, by a
    # traceback each, whoever sends them.
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
            f"server: port {port} of {host} is in use, or may not be used. Nothing was started; "
            "stop what uses it, or choose another with --wake-port."
        ) from None
    await server.start()
    return server, bound


async def disconnect_revoked(
    presence: Presence,
    roster: Roster,
    uploads: Uploads,
    connections: Connections,
    *,
    every_s: float,
) -> None:
    """Ends the streams and connections of whoever is a member no more, forever."""
    while True:
        await asyncio.sleep(every_s)
        # A newer list is remembered, even while nobody calls.
        members = {member.public for member in roster.members()}
        connections.sweep(members)
        for node_id, public in presence.keys().items():
            if public not in members:
                log.warning("device %s: no longer a member; put out", node_id)
                presence.remove(node_id)
                uploads.gone(node_id)
