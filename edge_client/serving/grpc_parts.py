"""A gRPC server whose calls are received and answered by one thread.

grpcio's public servers hand each call from thread to thread, or through asyncio: that costs two to
six times the processor time of the call itself. This module drives gRPC's core, which is C, from
one loop: it takes what has arrived, then has it run, then waits. It is the only module that uses
grpcio's private bindings; ``tests/contract/test_grpc_private.py`` checks each use, and
``pyproject.toml`` bounds grpcio's version.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fedcore.errors import ResourceError
from fedcore.rpc.crowd import Crowd, address_of
from fedcore.rpc.tls import silence_grpc_core

silence_grpc_core()

import grpc  # noqa: E402 - after its core was told to be silent
from grpc._cython import cygrpc  # noqa: E402

_ARRIVED, _SHUT_DOWN = "arrived", "shut down"
_AHEAD = 8
"""Calls that the core may announce before the loop has looked at the first."""
_MESSAGE_S = 30.0
"""A caller that opens a call must send its message within so many seconds."""
_PATIENCE_S = 1.0
"""A call whose caller sends no message, or takes no answer, for so long makes room for another."""
_TAKE_S = 30.0
"""A caller must take a message of its answer within so many seconds."""
_LOOK_S = 5.0
_IN_A_RUSH = 8
"""How much higher the core's own limit on connections is: a crowd must not fill it between two
looks of `GrpcLoop.keep_room`."""
_EXPIRE_S = 1.0
"""Least seconds between two looks for calls that wait for their caller."""
_STOPPED_S = 2.0


@dataclass(slots=True, eq=False)
class Call:
    """A call to the server."""

    method: str
    """Its path, such as ``/inference.GRPCInferenceService/ModelInfer``."""
    deadline_s: float | None
    """When the caller stops waiting, by the clock of `time.time`; None if it does not."""
    core: Any
    waits_since_s: float
    """When the caller's next message was last waited for, by `time.monotonic`."""
    peer: str
    """The address of its connection, in gRPC's form."""
    streaming: bool = False
    cancelled: bool = False
    greeted: bool = False
    """Whether initial metadata were sent."""
    sends_since_s: float | None = None
    """When a message was handed to the core that the caller has not taken, by `time.monotonic`."""
    ending: Any = None
    """The core's call while its last message is on the way."""

    def answer(self, message: bytes) -> None:
        """Sends the answer and ends the call, unless it has ended. Any thread may call it."""
        if self.core is None:
            return
        self._end().start_server_batch(
            (
                cygrpc.SendInitialMetadataOperation((), 0),
                cygrpc.SendMessageOperation(message, 0),
                cygrpc.SendStatusFromServerOperation((), cygrpc.StatusCode.ok, b"", 0),
            ),
            _Ended(self),
        )

    def fail(self, code: int, details: str) -> None:
        """Ends the call with a status, a number of ``grpc.StatusCode``, unless it has ended."""
        if self.core is None:
            return
        operations: tuple[Any, ...] = (
            cygrpc.SendStatusFromServerOperation((), code, details.encode(), 0),
        )
        if not self.greeted:
            operations = (cygrpc.SendInitialMetadataOperation((), 0), *operations)
        self._end().start_server_batch(operations, _Ended(self))

    def _end(self) -> Any:
        """Returns the core's call; `ended` lets go of it, as a reference holds up a shutdown."""
        core, self.core = self.core, None
        self.ending, self.sends_since_s = core, time.monotonic()
        return core

    def ended(self) -> None:
        """Lets go of the core's call: its last message was taken, or never will be."""
        self.ending = self.sends_since_s = None

    def cancel(self) -> None:
        """Ends the operation that waits for the caller."""
        self.cancelled = True
        core = self.core or self.ending
        if core is not None:
            core.cancel()

    def send(self, message: bytes) -> None:
        """Sends one message of a stream, which stays open, unless it has ended."""
        if self.core is None:
            return
        operations: tuple[Any, ...] = (cygrpc.SendMessageOperation(message, 0),)
        if not self.greeted:
            self.greeted = True
            operations = (cygrpc.SendInitialMetadataOperation((), 0), *operations)
        self.sends_since_s = time.monotonic()
        self.core.start_server_batch(operations, self)

    def peer_certificate(self) -> bytes:
        """Returns the caller's certificate in PEM; empty without TLS."""
        found = cygrpc.auth_context(self.core).get(b"x509_pem_cert", (b"",))
        return bytes(found[0]) if found else b""


@dataclass(slots=True, eq=False)
class _Ended:
    """What the core returns when the last operation of a call has ended."""

    call: Call


Handler = Callable[[Call, bytes], None]
"""Answers a message, now or later; must not block or raise."""


class GrpcLoop:
    """The server. `serve` runs in a thread of its own until `stop`."""

    def __init__(
        self,
        handler: Handler,
        run_waiting: Callable[[], None],
        *,
        streaming: frozenset[str] = frozenset(),
        max_message_bytes: int,
        max_calls: int,
        max_connections: int,
    ) -> None:
        """Creates a server without a port.

        Args:
            handler: Gets each message; for a stream again after each answer.
            run_waiting: Called after all that has arrived was handed over.
            streaming: Paths of methods whose calls have many messages.
            max_message_bytes: Longest message; longer ones are refused by the core.
            max_calls: Most calls that are open; others get RESOURCE_EXHAUSTED, unless one that
                waits for its caller makes room.
            max_connections: Most connections; `keep_room` closes others, and the core those far
                above.
        """
        self._handler, self._run_waiting = handler, run_waiting
        self._streaming, self._max_calls = streaming, max_calls
        self._queue = cygrpc.CompletionQueue()
        self._server = cygrpc.Server(
            (
                ("grpc.so_reuseport", 0),
                ("grpc.max_receive_message_length", max_message_bytes),
                ("grpc.max_metadata_size", 16384),
                ("grpc.max_concurrent_streams", max_calls),
                ("grpc.max_allowed_incoming_connections", _IN_A_RUSH * max_connections),
                ("grpc.server_handshake_timeout_ms", 10_000),
                # Identity alone: a compressed message may unfold to any size. The core hands its
                # packed bytes over and has ended the call by then.
                ("grpc.compression_enabled_algorithms_bitset", 1),
                ("grpc.max_connection_idle_ms", 120_000),
                ("grpc.keepalive_time_ms", 60_000),
                ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
            ),
            False,
        )
        self._server.register_completion_queue(self._queue)
        self._receiving: OrderedDict[Call, None] = OrderedDict()
        self._calls: dict[Call, None] = {}
        """The open calls, the oldest first."""
        self._expire_s = 0.0
        self._max_connections = max_connections
        self._crowd: Crowd | None = None
        self.port = 0
        """The port that `bind` has taken."""
        self._ahead = 0
        self._stopping = threading.Event()
        self._destroying = threading.Lock()
        self.stopped = threading.Event()

    def bind(self, host: str, port: int, credentials: grpc.ServerCredentials | None) -> int:
        """Listens on an address; returns the port, which the system chooses for 0.

        Raises:
            ResourceError: the port is in use, or may not be used.
        """
        target = (f"[{host}]:{port}" if ":" in host else f"{host}:{port}").encode()
        more = () if credentials is None else (credentials._credentials,)
        try:
            bound = int(self._server.add_http2_port(target, *more))
        except RuntimeError:
            bound = 0
        if not bound:
            raise ResourceError(
                f"serve: port {port} of {host} is in use or forbidden. Nothing was started; stop "
                "the program that uses it, or choose another with --grpc-port."
            )
        self.port, self._crowd = bound, Crowd(bound, most=self._max_connections)
        return bound

    def keep_room(self) -> None:
        """Shuts down connections without a call that are too many, see `Crowd`."""
        if self._crowd is not None:
            self._crowd.sweep({address_of(call.peer) for call in list(self._calls)})

    def start(self) -> threading.Thread:
        """Starts to serve in a thread, which it returns."""
        self._server.start()
        for _ in range(_AHEAD):
            self._expect_call()
        thread = threading.Thread(target=self._serve, name="grpc", daemon=True)
        thread.start()
        return thread

    def stop(self, grace_s: float) -> None:
        """Accepts no new calls, lets open ones end for ``grace_s`` seconds, and stops."""
        self._stopping.set()
        # The core does not check whether the server is still there, and the loop may destroy it as
        # soon as it hears of the shutdown: before this call has returned.
        with self._destroying:
            self._server.shutdown(self._queue, _SHUT_DOWN)
        if not self.stopped.wait(grace_s):
            with self._destroying:
                if not self.stopped.is_set():
                    self._server.cancel_all_calls()
            self.stopped.wait(_STOPPED_S)

    def _expect_call(self) -> None:
        self._ahead += 1
        self._server.request_call(self._queue, self._queue, _ARRIVED)

    def _serve(self) -> None:
        pending = False  # whether something arrived since requests last ran
        shut_down = False
        while not (shut_down and not self._calls and self._ahead == 0):
            event = self._queue.poll(0 if pending else time.time() + _LOOK_S)
            tag, kind = event.tag, event.completion_type
            if kind == cygrpc.CompletionType.queue_timeout:
                if pending:
                    self._run_waiting()
                self._expire()
                pending = False
            elif tag is _ARRIVED:
                self._ahead -= 1
                if not self._stopping.is_set():
                    self._expect_call()
                if event.success and event.call is not None:
                    self._arrived(event)
            elif isinstance(tag, _Ended):
                tag.call.ended()
                del self._calls[tag.call]
            elif tag is _SHUT_DOWN:
                shut_down = True
            else:
                pending = True
                self._moved(tag, event)
            event = tag = None  # the core waits for calls that are still referred to
        with self._destroying:
            self._server.destroy()
            self.stopped.set()

    def _arrived(self, event: Any) -> None:
        details = event.call_details
        deadline_s = details.deadline
        call = Call(
            method=details.method.decode(errors="replace"),
            deadline_s=deadline_s if deadline_s is not None and deadline_s < 1e12 else None,
            core=event.call,
            waits_since_s=time.monotonic(),
            peer=event.call.peer(),
        )
        self._calls[call] = None
        if len(self._calls) > self._max_calls and not self._made_room():
            call.fail(RESOURCE_EXHAUSTED, "too many calls are open; send the request again later")
            return
        call.streaming = call.method in self._streaming
        self._receive(call)

    def _made_room(self) -> bool:
        """Ends the call that has waited longest for its caller.

        Either for a message, which may be a stream's next, or for an answer to be taken. Otherwise
        one caller could open as many calls as there may be, and keep all others out.
        """
        limit_s = time.monotonic() - _PATIENCE_S
        for call in self._receiving:
            if call.waits_since_s > limit_s:  # as all after it
                break
            if not call.cancelled:
                call.cancel()
                return True
        untaken = self._untaken(_PATIENCE_S)
        if untaken:
            untaken[0].cancel()
        return bool(untaken)

    def _untaken(self, for_s: float) -> list[Call]:
        """Returns the calls whose callers have not taken a message for so long."""
        limit_s = time.monotonic() - for_s
        return [
            call
            for call in self._calls
            if not call.cancelled and (call.sends_since_s or limit_s) < limit_s
        ]

    def _receive(self, call: Call) -> None:
        call.waits_since_s = time.monotonic()
        self._receiving[call] = None
        call.core.start_server_batch((cygrpc.ReceiveMessageOperation(0),), call)

    def _moved(self, call: Call, event: Any) -> None:
        """Handles the end of an operation: a message was received, or one of a stream sent."""
        operation = event.batch_operations[0]
        if call not in self._receiving:  # a message of a stream was sent
            call.sends_since_s = None
            if event.success:
                self._receive(call)
            else:
                call.fail(CANCELLED, "the caller is gone")
            return
        del self._receiving[call]
        message = operation.message() if event.success else None
        if message is not None:
            self._handler(call, message)
        elif call.streaming:
            call.fail(OK, "")
        else:
            call.fail(INVALID_ARGUMENT, "the call has no message, or one that is too long")

    def _expire(self) -> None:
        """Ends calls whose caller opened them and sent nothing, or takes nothing of the answer."""
        now_s = time.monotonic()
        if now_s < self._expire_s:
            return
        self._expire_s, limit_s = now_s + _EXPIRE_S, now_s - _MESSAGE_S
        for call in self._untaken(_TAKE_S):
            call.cancel()
        for call in [call for call in self._receiving if call.waits_since_s < limit_s]:
            if not call.streaming:
                call.cancel()


def code(status: grpc.StatusCode) -> int:
    """Returns the number of a status."""
    return int(status.value[0])


OK = code(grpc.StatusCode.OK)
CANCELLED = code(grpc.StatusCode.CANCELLED)
INVALID_ARGUMENT = code(grpc.StatusCode.INVALID_ARGUMENT)
RESOURCE_EXHAUSTED = code(grpc.StatusCode.RESOURCE_EXHAUSTED)


def server_credentials(key: bytes, certificate: bytes, authority: bytes) -> grpc.ServerCredentials:
    """Returns credentials that demand a certificate of the authority from each caller."""
    pair: Sequence[tuple[bytes, bytes]] = [(key, certificate)]
    return grpc.ssl_server_credentials(pair, root_certificates=authority, require_client_auth=True)
