"""Releases over gRPC from the project's server: files, word of changes, and reports.

`DeliveryLink` holds one connection with this device's identity, and opens another one when it
breaks. Everything that comes from the server is untrusted: sizes, rates and times are limited here,
and the caller verifies the content.
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

import grpc
from google.protobuf.message import Message

from edge_client.delivery.resuming import Interrupted, resumed
from fedcore.crypto.kit import Kit, load_kit
from fedcore.errors import CertificateRefused, ConfigError, DataError, RepositoryUnreachable
from fedcore.observability.foreign import foreign
from fedcore.rpc.delivery import CHUNK_BYTES, PORT_OFFSET, method
from fedcore.rpc.delivery_pb2 import (
    Chunk,
    DeviceReport,
    FetchRequest,
    MetadataRequest,
    Published,
    Reported,
    ServingReport,
    WatchReleases,
)
from fedcore.rpc.proxy import check_proxies, proxy_for
from fedcore.rpc.relay import relayed

_CONNECT_S = 10.0
_METADATA_S, _FETCH_S, _REPORT_S = 30.0, 60.0, 20.0
"""Longest time of one call. A fetch that moved at least a chunk goes on in another call; so a
server is given up that sends less than some 550 bytes per second."""
_MAX_METADATA_BYTES = 5_000_001
"""One byte more than any metadata may have, so that the excess shows."""
_JUNK_BYTES = 4 << 20
"""Bytes beyond the content that a connection may carry, 4 MiB: handshakes, framing, pings."""
_OVERHEAD = 0.25
"""Further such bytes, as a share of the content."""
_PIECE_BYTES = 1 << 16
_WINDOW_BYTES = 1 << 17
"""Flow-control window, 128 KiB: what a fast server may send before this device has read it."""
_LINGER_S = 0.25
"""Time after the end of a connection in which what it brought is read."""
_DRAIN_S = 2.0
"""How long a channel stays open after its connection has ended, to read what came before."""
_OPTIONS = (
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 60_000),  # a ping waits behind the data of a slow link
    ("grpc.http2.ping_timeout_ms", 60_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.bdp_probe", 0),  # else the window grows, and with it what a cut loses
    ("grpc.http2.lookahead_bytes", _WINDOW_BYTES),
    ("grpc.min_reconnect_backoff_ms", int(_CONNECT_S * 1000)),
    ("grpc.max_receive_message_length", 2 * CHUNK_BYTES),
    ("grpc.max_metadata_size", 8192),
    ("grpc.enable_retries", 0),  # a retry would need a new connection, and the relay has only one
    ("grpc.enable_http_proxy", 0),  # the relay connects through it
)
_AFTER = "The previous version keeps serving."
_SERVER = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(?::([0-9]{1,5}))?")
_TARGET = re.compile(r"targets/(?:[^/]+/)*([0-9a-f]{64})[.][^/]+")
_Answer = TypeVar("_Answer", bound=Message)
_REFUSING = (grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAUTHENTICATED)


@dataclass(frozen=True)
class DeliveryEndpoint:
    """Host and port of a delivery service."""

    host: str
    port: int

    def __str__(self) -> str:
        """Returns both as one text."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def endpoint_of(kit: Path, server: str) -> DeliveryEndpoint:
    """Returns the address of a delivery service.

    Args:
        kit: The folder of the device's kit, which names the port for training.
        server: ``HOST`` or ``HOST:PORT``; without a port, `PORT_OFFSET` above the kit's.

    Raises:
        ConfigError: ``server`` is not of that form.
        DataError: the kit is missing or unreadable.
        CertificateRefused: the kit is not valid, or not that of a device.
    """
    found = _SERVER.fullmatch(server)
    kit_of_device = _device_kit(kit)
    port = int(found[2]) if found and found[2] else _trained_at(kit_of_device.servers[0])
    if found is None or not 1 <= port < 2**16:
        raise ConfigError(
            f"--server {server}: expected HOST or HOST:PORT, e.g. fl.example.org or "
            "fl.example.org:9094. Nothing was fetched."
        )
    return DeliveryEndpoint(found[1].strip("[]"), port)


class DeliveryLink:
    """A device's connection to the delivery service of its project's server.

    Not for use from several threads, except `close`.
    """

    def __init__(
        self, kit: Path, endpoint: DeliveryEndpoint, *, stop: threading.Event | None = None
    ) -> None:
        """Connects on the first call.

        Args:
            kit: The folder of the device's kit; read again at each connection, so that a renewed
                certificate is used without a restart.
            endpoint: The service's address.
            stop: Set to end waits between attempts early.
        """
        self._kit = kit
        self._endpoint = endpoint
        self._stop = stop or threading.Event()
        self._open = ExitStack()
        self._channel: grpc.Channel | None = None
        self._moved_bytes = 0
        self._content_bytes = 0

    def __enter__(self) -> DeliveryLink:
        """Returns this link, which is closed at the end."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Closes the connection."""
        self.close()

    def close(self) -> None:
        """Closes the connection; the next call opens another."""
        self._channel = None
        self._open.close()

    def source(self, name: str, offset: int) -> Iterator[bytes]:
        """Yields a repository file in chunks, from a byte offset on; a `Source`.

        A connection that breaks off is opened again, and the file goes on where it broke off.

        Raises:
            FileNotFoundError: the server has no such file.
            RepositoryUnreachable: the server does not answer, or sends too slowly.
            CertificateRefused: the server refuses this device.
            DataError: the server is none for releases.
        """
        target = _TARGET.fullmatch(name)
        if target is None:
            once = partial(self._metadata, name.removeprefix("metadata/"))
        else:
            once = partial(self._file, target[1])
        yield from resumed(once, offset, stop=self._stop, unreachable=self._unreachable)

    def watch(self) -> Iterator[Published]:
        """Yields word of changes to the repository, from now on, until the connection breaks off.

        Raises:
            RepositoryUnreachable: the connection broke off, or could not be opened.
            CertificateRefused: the server refuses this device.
            DataError: the server is none for releases.
        """
        try:
            yield from self._stream("Watch", WatchReleases(), Published, None)
        except Interrupted as error:
            raise self._unreachable(error) from None
        raise self._unreachable(Interrupted("it closed the stream"))

    def report(self, report: DeviceReport) -> None:
        """Tells the server what became of a version.

        Raises:
            RepositoryUnreachable: the report did not arrive.
            CertificateRefused: the server refuses this device.
            DataError: the server is none for releases.
        """
        self._tell("Report", report)

    def report_serving(self, report: ServingReport) -> None:
        """Tells the server how a version is used; raises as `report` does.

        A server of an earlier version of fedcore takes none: then this raises `DataError`.
        """
        self._tell("ReportServing", report)

    def _tell(self, call: str, report: Message) -> None:
        try:
            with _as_interrupted():
                self._connected().unary_unary(
                    method(call),
                    request_serializer=type(report).SerializeToString,
                    response_deserializer=Reported.FromString,
                )(report, timeout=_REPORT_S)
        except Interrupted as error:
            self.close()
            raise self._unreachable(error) from None

    def _file(self, sha256: str, offset: int) -> Iterator[bytes]:
        request = FetchRequest(sha256=sha256, offset=offset)
        for chunk in self._stream("Fetch", request, Chunk, _FETCH_S):
            if not chunk.content:
                raise Interrupted("it sent a chunk without content")
            self._content_bytes += len(chunk.content)
            yield chunk.content

    def _metadata(self, name: str, offset: int) -> Iterator[bytes]:
        """Yields a metadata file at once: its few kilobytes are asked for again after a cut."""
        raw = bytearray()
        for chunk in self._stream("GetMetadata", MetadataRequest(name=name), Chunk, _METADATA_S):
            if not chunk.content:
                raise Interrupted("it sent a chunk without content")
            raw += chunk.content
            if len(raw) >= _MAX_METADATA_BYTES:
                break
        self._content_bytes += len(raw)
        yield bytes(raw[offset:])

    def _stream(
        self, call: str, request: Message, kind: type[_Answer], timeout_s: float | None
    ) -> Iterator[_Answer]:
        """Yields the answers of a call; closes the connection if it breaks."""
        answers = None
        try:
            with _as_interrupted():
                answers = self._connected().unary_stream(
                    method(call),
                    request_serializer=type(request).SerializeToString,
                    response_deserializer=kind.FromString,
                )(request, timeout=timeout_s)
                yield from answers
        except Interrupted:
            self.close()
            raise
        finally:
            if answers is not None:
                answers.cancel()

    def _connected(self) -> grpc.Channel:
        """Returns the channel; opens a connection if there is none.

        Raises:
            Interrupted: the server cannot be reached.
        """
        if self._channel is not None:
            return self._channel
        kit, (host, port) = _device_kit(self._kit), (self._endpoint.host, self._endpoint.port)
        check_proxies(os.environ)
        self._moved_bytes = self._content_bytes = 0
        credentials = grpc.ssl_channel_credentials(
            kit.authority_pem, kit.key_pem(), kit.certificate_pem
        )
        named = (
            ("grpc.ssl_target_name_override", host),  # the certificate's name, not the socket's
            ("grpc.default_authority", str(self._endpoint)),
        )
        try:
            route = self._open.enter_context(
                relayed(
                    host,
                    port,
                    proxy=proxy_for(f"https://{self._endpoint}", os.environ),
                    timeout_s=_CONNECT_S,
                    took=self._count,
                    piece_bytes=_PIECE_BYTES,
                    linger_s=_LINGER_S,
                )
            )
        except OSError as error:
            raise Interrupted(str(error)) from None
        channel = self._open.enter_context(
            grpc.secure_channel(route.target, credentials, options=(*_OPTIONS, *named))
        )
        # gRPC would wait for another connection, and the relay offers only one.
        threading.Thread(
            target=_close_after, args=(channel, route.over), name="delivery end", daemon=True
        ).start()
        self._channel = channel
        return channel

    def _count(self, count: int) -> None:
        """Counts bytes of the connection; ends it when too many of them are no content."""
        self._moved_bytes += count
        if self._moved_bytes > _JUNK_BYTES + (1 + _OVERHEAD) * self._content_bytes:
            raise ConnectionError("more bytes than the content explains")

    def _unreachable(self, error: Exception) -> RepositoryUnreachable:
        return RepositoryUnreachable(
            f"server {self._endpoint}: no releases from it ({foreign(error, 300)}). What has been "
            f"fetched is kept. {_AFTER} Check that `fedcore release serve` runs there and that its "
            "port is reachable, then run again."
        )


@contextmanager
def _as_interrupted() -> Iterator[None]:
    """Turns errors of gRPC into fedcore's, or into `Interrupted` where another attempt may help."""
    try:
        yield
    except grpc.RpcError as error:
        code, details = error.code(), foreign(error.details(), 200)
        if code == grpc.StatusCode.NOT_FOUND:
            raise FileNotFoundError(details) from None
        if code in _REFUSING:
            raise CertificateRefused(
                f"releases: the server refuses this device ({details}). Nothing was fetched. "
                f"{_AFTER} Ask the operator whether it is still a member (`fedcore provision "
                "list`), and install the kit that it has been given."
            ) from None
        if code == grpc.StatusCode.UNIMPLEMENTED:
            raise DataError(
                "releases: the server that answers there delivers none. Nothing was fetched. "
                f"{_AFTER} Check the port; the default is {PORT_OFFSET} above that of the kit."
            ) from None
        raise Interrupted(f"{code.name.lower()}: {details}") from None


def _device_kit(folder: Path) -> Kit:
    kit = load_kit(folder)
    if kit.role != "device":
        raise CertificateRefused(
            f"{folder}: this is the identity of the {kit.role} {kit.name!r}, expected a device's. "
            "Nothing was fetched; enrol this machine as a device."
        )
    return kit


def _trained_at(server: str) -> int:
    """Returns the port for releases that follows from a server's address in a kit."""
    return (urlsplit(server).port or 0) + PORT_OFFSET


def _close_after(channel: grpc.Channel, over: threading.Event) -> None:
    over.wait()
    time.sleep(_DRAIN_S)
    channel.close()
