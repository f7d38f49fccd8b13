"""The gRPC service ``Delivery``: releases to devices, and their reports back.

Only a device whose certificate is in force in the roster is answered. The service holds no secret,
and vouches for nothing: devices verify signatures and digests with keys of their own.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import grpc
from google.protobuf.message import DecodeError, Message

from fedcore.crypto.roster import Member, Roster
from fedcore.observability.foreign import foreign
from fedcore.observability.throttle import PeerLines, take_token
from fedcore.rpc.delivery import CHUNK_BYTES, MAX_REASON, SERVICE
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
from fedcore.rpc.grpc_peer import peer_key
from fedcore.rpc.open_calls import OpenCall, OpenCalls
from server.delivery.feedback import fault_of_serving
from server.delivery.files import PublishedFiles
from server.delivery.watchers import Watchers

log = logging.getLogger("fedcore.server")

_READ_BYTES = 16 * CHUNK_BYTES
"""Bytes of one read: 256 KiB, the most of a file that a fetch holds in memory."""
_FETCHES = 64
"""Fetches that are served at once; others wait."""
_FETCHES_OF_ONE = 2
_CALLS_OF_ONE = 8
"""Open calls of a device; one more ends its oldest. It uses a stream and up to two fetches."""
_SLOW_BYTES_PER_S, _SLOW_S = 4096, 60.0
"""Where no slot is free, a fetch that was slower for so long ends; its device goes on later."""
_CALL_S, _CALLS = 0.05, 400
"""Rate limit on a device's calls: seconds per call in the long run, and burst size."""
_REPORT_S, _REPORTS = 10.0, 30
"""Rate limit on a device's reports."""
_REFUSED_S = 1.0
"""Seconds before an answer that refuses: a device that tries again in a loop is slowed down."""
OnReport = Callable[[Member, DeviceReport | ServingReport], None]
Code = grpc.StatusCode


@dataclass
class Fetching:
    """How far a fetch is."""

    since_s: float
    sent_bytes: int = 0

    def rate(self, now_s: float) -> float:
        """Returns the bytes taken per second so far."""
        return self.sent_bytes / max(now_s - self.since_s, 1e-9)

    def is_slow(self, now_s: float) -> bool:
        """Returns whether it has been slow for long."""
        return now_s - self.since_s > _SLOW_S and self.rate(now_s) < _SLOW_BYTES_PER_S


@dataclass(frozen=True)
class Deliveries:
    """The handlers of the service's calls. Use it from one event loop only."""

    files: PublishedFiles
    roster: Roster
    watchers: Watchers
    on_report: OnReport | None
    """Callback with each valid report; runs in a thread. None to log them only."""
    _calls: dict[bytes, tuple[float, float]] = field(default_factory=dict)
    _reports: dict[bytes, tuple[float, float]] = field(default_factory=dict)
    _fetching: Counter[bytes] = field(default_factory=Counter)
    _fetches: dict[OpenCall, Fetching] = field(default_factory=dict)
    open_calls: OpenCalls = field(default_factory=lambda: OpenCalls(_CALLS_OF_ONE))
    _slots: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(_FETCHES))
    _lines: PeerLines = field(
        default_factory=lambda: PeerLines(partial(log.info, "%s"), "deliveries")
    )

    async def watch(self, request: WatchReleases, context: Any) -> AsyncIterator[Published]:
        """Yields the repository's state now, and whenever it changes."""
        member = await self._admit(context)
        with self.open_calls.opened(member.public, context) as call:
            stream = self.watchers.open(member.public)
            self._log(member.name, "waits for releases")
            try:
                while not stream.ended:
                    spread_ms = int(1000 * self.watchers.spread_s)
                    call.sending()
                    yield Published(change=self.watchers.change, spread_ms=spread_ms)
                    call.sent()
                    await stream.changed()
                await context.abort(
                    Code.CANCELLED, "another stream of this device, or no member now"
                )
            finally:
                self.watchers.close(member.public, stream)

    async def get_metadata(self, request: MetadataRequest, context: Any) -> AsyncIterator[Chunk]:
        """Yields a metadata file in chunks."""
        member = await self._admit(context)
        with self.open_calls.opened(member.public, context) as call:
            descriptor = self.files.open_metadata(request.name)
            if descriptor is None:
                await context.abort(Code.NOT_FOUND, "there is no such metadata")
            assert descriptor is not None
            async with aclosing(_chunks(descriptor, 0)) as chunks:
                async for chunk in chunks:
                    call.sending()
                    yield chunk
                    call.sent()

    async def fetch(self, request: FetchRequest, context: Any) -> AsyncIterator[Chunk]:
        """Yields a file in chunks, from an offset on; waits for the device to read each."""
        member = await self._admit(context)
        if self._fetching[member.public] >= _FETCHES_OF_ONE:
            await self._refuse(context, member.name, Code.RESOURCE_EXHAUSTED, "fetches too much")
        self._fetching[member.public] += 1
        try:
            with self.open_calls.opened(member.public, context) as call:
                async with self._slots:
                    chunks = self._fetched(request, context, member, call)
                    async with aclosing(chunks):
                        async for chunk in chunks:
                            yield chunk
        finally:
            self._fetching[member.public] -= 1
            if not self._fetching[member.public]:
                del self._fetching[member.public]

    async def _fetched(
        self, request: FetchRequest, context: Any, member: Member, call: OpenCall
    ) -> AsyncGenerator[Chunk, None]:
        descriptor = await asyncio.to_thread(self.files.open_file, request.sha256)
        if descriptor is None:
            await context.abort(Code.NOT_FOUND, "there is no such file")
        assert descriptor is not None
        fetching = self._fetches[call] = Fetching(time.monotonic())
        try:
            async with aclosing(_chunks(descriptor, request.offset)) as chunks:
                async for chunk in chunks:
                    call.sending()
                    yield chunk
                    call.sent()
                    fetching.sent_bytes += len(chunk.content)
                    if self.roster.member(member.public) is None:
                        await context.abort(Code.PERMISSION_DENIED, "no member any more")
        finally:
            del self._fetches[call]

    def sweep(self) -> None:
        """Ends calls whose answer is not taken, and where no slot is free the slowest fetch."""
        self.open_calls.sweep()
        if not self._slots.locked():
            return
        now_s = time.monotonic()
        slow = [call for call, one in self._fetches.items() if one.is_slow(now_s)]
        any(call.end() for call in sorted(slow, key=lambda one: self._fetches[one].rate(now_s)))

    async def report(self, request: DeviceReport, context: Any) -> Reported:
        """Takes a report of what became of a version."""
        return await self._take(request, lambda: fault_of(request), context)

    async def report_serving(self, request: ServingReport, context: Any) -> Reported:
        """Takes counts of how a version is used."""
        return await self._take(request, lambda: fault_of_serving(request), context)

    async def _take(
        self, report: DeviceReport | ServingReport, fault_in: Callable[[], str], context: Any
    ) -> Reported:
        member = await self._admit(context)
        now = time.monotonic()
        if not take_token(self._reports, member.public, now, every_s=_REPORT_S, burst=_REPORTS):
            await self._refuse(context, member.name, Code.RESOURCE_EXHAUSTED, "reports too often")
        if fault := fault_in():
            await self._refuse(context, member.name, Code.INVALID_ARGUMENT, fault)
        self._log(member.name, "reports", f" {report_text(report)}")
        if self.on_report is not None:
            await asyncio.to_thread(self.on_report, member, report)
        return Reported()

    def handler(self) -> grpc.GenericRpcHandler:
        """Returns the service for a gRPC server."""
        calls = {
            "Watch": _streaming(self.watch, WatchReleases),
            "GetMetadata": _streaming(self.get_metadata, MetadataRequest),
            "Fetch": _streaming(self.fetch, FetchRequest),
            "Report": grpc.unary_unary_rpc_method_handler(
                self.report,
                request_deserializer=_parser(DeviceReport),
                response_serializer=Reported.SerializeToString,
            ),
            "ReportServing": grpc.unary_unary_rpc_method_handler(
                self.report_serving,
                request_deserializer=_parser(ServingReport),
                response_serializer=Reported.SerializeToString,
            ),
        }
        return grpc.method_handlers_generic_handler(SERVICE, calls)

    async def _admit(self, context: Any) -> Member:
        """Returns the calling device; ends the call if it is none in force, or calls too often."""
        public = peer_key(context)
        member = self.roster.member(public) if public is not None else None
        if public is None or member is None or member.role != "device":
            # Unknown peers by address without the port, which differs on each connection.
            peer = member.name if member else str(context.peer()).rpartition(":")[0]
            await self._refuse(
                context, peer, Code.PERMISSION_DENIED, "not a device in force", member=bool(member)
            )
        assert public is not None
        assert member is not None
        if not take_token(self._calls, public, time.monotonic(), every_s=_CALL_S, burst=_CALLS):
            await self._refuse(context, member.name, Code.RESOURCE_EXHAUSTED, "calls too often")
        return member

    async def _refuse(
        self, context: Any, peer: str, code: grpc.StatusCode, why: str, *, member: bool = True
    ) -> None:
        self._log(peer, f"refused: {why}", member=member)
        await asyncio.sleep(_REFUSED_S)
        await context.abort(code, why)

    def _log(self, peer: str, what: str, more: str = "", *, member: bool = True) -> None:
        line = f"delivery: {foreign(peer, 100)}: {what}{more}"
        self._lines.tell(peer, what, line, member=member)


def fault_of(report: DeviceReport) -> str:
    """Returns what is wrong with a device's report; empty if nothing is."""
    known = (DeviceReport.ACTIVATED, DeviceReport.REFUSED, DeviceReport.RETURNED)
    if report.outcome not in known:
        return "an outcome that does not exist"
    if not 1 <= len(report.model) <= 64 or not 1 <= report.version <= 10**15:
        return "no valid model and version"
    if len(report.reason) > MAX_REASON:
        return "a reason that is too long"
    figures = (report.golden_error, report.p50_us)
    if not all(0 <= figure < float("inf") for figure in figures):
        return "a figure that is not finite or negative"
    return ""


def report_text(report: DeviceReport | ServingReport) -> str:
    """Returns a valid report in words, fit to print."""
    model = f"{foreign(report.model, 64)} version {report.version}"
    if isinstance(report, ServingReport):
        return f"{model} answered {report.requests} requests, {report.errors} failed"
    outcome = DeviceReport.Outcome.Name(report.outcome).lower()
    said = f": {foreign(report.reason, 500)}" if report.reason else ""
    return f"{model} {outcome}{said}"


async def _chunks(descriptor: int, offset: int) -> AsyncGenerator[Chunk, None]:
    """Yields an open file from an offset on, and closes it."""
    try:
        while raw := await asyncio.to_thread(os.pread, descriptor, _READ_BYTES, offset):
            for start in range(0, len(raw), CHUNK_BYTES):
                yield Chunk(content=raw[start : start + CHUNK_BYTES])
            offset += len(raw)
    except (OSError, OverflowError):  # the disk; or an offset that no file has
        return
    finally:
        os.close(descriptor)


def _parser(kind: type[Message]) -> Callable[[bytes], Message]:
    """Returns a parser that gives an empty request for a malformed one, instead of a traceback."""

    def parse(raw: bytes) -> Message:
        request: Message = kind()
        try:
            request.ParseFromString(raw)
        except DecodeError:
            request.Clear()
        return request

    return parse


def _streaming(call: Callable[..., AsyncIterator[Any]], kind: type[Message]) -> Any:
    answer = Published if kind is WatchReleases else Chunk
    return grpc.unary_stream_rpc_method_handler(
        call, request_deserializer=_parser(kind), response_serializer=answer.SerializeToString
    )
