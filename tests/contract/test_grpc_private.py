"""What the server of inference uses of grpcio's private bindings."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import grpc
import pytest
from grpc._cython import cygrpc

from edge_client.serving import grpc_parts
from edge_client.serving.grpc_parts import Call, GrpcLoop, Handler
from tests.campaign.http2 import call, opening

METHOD, STREAM = "/a.Service/Method", "/a.Service/Stream"


@contextmanager
def serving(handler: Handler, **more: int) -> Iterator[tuple[grpc.Channel, GrpcLoop]]:
    limits = {"max_message_bytes": 1 << 16, "max_calls": 16, "max_connections": 16, **more}
    loop = GrpcLoop(handler, lambda: None, streaming=frozenset({STREAM}), **limits)
    port = loop.bind("127.0.0.1", 0, None)
    loop.start()
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield channel, loop
        loop.stop(grace_s=20.0)
    assert loop.stopped.is_set()


def test_the_names_that_are_used_are_there() -> None:
    for name in (
        *("CompletionQueue", "Server", "auth_context", "CompletionType", "StatusCode"),
        *("ReceiveMessageOperation", "SendMessageOperation", "SendInitialMetadataOperation"),
        "SendStatusFromServerOperation",
    ):
        assert hasattr(cygrpc, name)


def test_a_call_is_answered_with_its_method_and_deadline() -> None:
    calls: list[Call] = []

    def handler(call: Call, message: bytes) -> None:
        calls.append(call)
        call.answer(message[::-1])

    with serving(handler) as (channel, _):
        method = channel.unary_unary(METHOD)
        assert method(b"abc", timeout=30) == b"cba"
        assert method(b"") == b""
        assert [call.method for call in calls] == [METHOD, METHOD]
        assert calls[0].deadline_s is not None
        assert calls[1].deadline_s is None


def test_a_call_that_is_still_held_does_not_hold_up_the_stop() -> None:
    calls: list[Call] = []

    def handler(call: Call, message: bytes) -> None:
        calls.append(call)
        if message:
            call.answer(message)
        else:
            call.fail(5, "not found: ü")

    with serving(handler) as (channel, loop):
        method = channel.unary_unary(METHOD)
        method(b"1")
        with pytest.raises(grpc.RpcError) as caught:
            method(b"")
        assert (caught.value.code(), caught.value.details()) == (
            grpc.StatusCode.NOT_FOUND,
            "not found: ü",
        )
        waiting = threading.Thread(target=loop.stop, args=(20.0,))
        waiting.start()
        assert loop.stopped.wait(10.0)
        waiting.join()
        assert len(calls) == 2


def test_a_call_that_is_never_answered_is_cut_off_by_the_stop() -> None:
    held: list[Call] = []
    with serving(lambda call, message: held.append(call)) as (channel, loop):
        future = channel.unary_unary(METHOD).future(b"1")
        while not held:
            pass
        stopping = threading.Thread(target=loop.stop, args=(0.1,))
        stopping.start()
        assert future.exception(timeout=20) is not None
        held.pop().fail(14, "too late")
        stopping.join()


def test_a_stream_is_answered_message_by_message() -> None:
    with serving(lambda call, message: call.send(message * 2)) as (channel, _):
        found = list(channel.stream_stream(STREAM)(iter([b"a", b"b"])))
        assert found == [b"aa", b"bb"]


def test_calls_beyond_the_limit_are_refused_and_others_not() -> None:
    held: list[Call] = []
    with serving(lambda call, message: held.append(call), max_calls=2) as (first, _):
        futures = [first.unary_unary(METHOD).future(b"1") for _ in range(2)]
        while len(held) < 2:
            pass
        # Another connection: on one, the core itself has the others wait.
        port = first._channel.target().decode().rpartition(":")[2]  # type: ignore[attr-defined]
        with grpc.insecure_channel(
            f"127.0.0.1:{port}", options=[("grpc.use_local_subchannel_pool", 1)]
        ) as second:
            with pytest.raises(grpc.RpcError) as caught:
                second.unary_unary(METHOD)(b"1", timeout=20)
            assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        for call in held:
            call.answer(b"done")
        assert [future.result(timeout=20) for future in futures] == [b"done"] * 2


def test_long_messages_do_not_reach_the_handler_and_compressed_ones_are_not_unfolded() -> None:
    """A compressed message could unfold to any size: the core refuses it, packed as it is."""
    sizes: list[int] = []

    def handler(call: Call, message: bytes) -> None:
        sizes.append(len(message))
        call.answer(b"")

    with serving(handler) as (channel, _):
        method = channel.unary_unary(METHOD)
        with pytest.raises(grpc.RpcError) as caught:
            method(bytes(1 << 17))
        assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        with pytest.raises(grpc.RpcError):
            method(bytes(1 << 14), compression=grpc.Compression.Gzip)
        method(bytes(1 << 14))
    assert sizes[-1] == 1 << 14
    assert all(size < 100 for size in sizes[:-1])


def test_a_second_answer_to_a_call_does_nothing() -> None:
    def handler(call: Call, message: bytes) -> None:
        call.answer(b"first")
        call.answer(b"second")
        call.fail(13, "third")

    with serving(handler) as (channel, _):
        assert channel.unary_unary(METHOD)(b"") == b"first"
        assert channel.unary_unary(METHOD)(b"") == b"first"


def test_a_stop_never_ends_the_process() -> None:
    """The loop must not destroy the server while the core is still inside the shutdown's call."""
    for _ in range(300):
        loop = GrpcLoop(
            lambda call, message: None,
            lambda: None,
            max_message_bytes=1 << 16,
            max_calls=2,
            max_connections=2,
        )
        thread = loop.start()
        loop.stop(5)
        thread.join(20)
        assert loop.stopped.is_set()


def test_streams_that_send_nothing_keep_nobody_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grpc_parts, "_PATIENCE_S", 0.0)
    over = threading.Event()

    def nothing() -> Iterator[bytes]:
        over.wait(60)
        yield from ()

    loop = GrpcLoop(
        lambda call, message: call.answer(message),
        lambda: None,
        streaming=frozenset({STREAM}),
        max_message_bytes=1 << 16,
        max_calls=2,
        max_connections=4,
    )
    target = f"127.0.0.1:{loop.bind('127.0.0.1', 0, None)}"
    loop.start()
    apart = [("grpc.use_local_subchannel_pool", 1)]
    with grpc.insecure_channel(target, apart) as idle, grpc.insecure_channel(target, apart) as own:
        held = [idle.stream_stream(path)(nothing()) for path in (METHOD, STREAM)]
        deadline_s = time.monotonic() + 20
        while len(loop._receiving) < 2 and time.monotonic() < deadline_s:
            time.sleep(0.005)
        assert own.unary_unary(METHOD)(b"a", timeout=20) == b"a"
        over.set()
        for call in held:
            call.cancel()
        loop.stop(20.0)
    assert loop.stopped.is_set()


def _raw(loop_port: int, calls: int) -> socket.socket:
    """A caller that opens calls and takes no bytes of their answers."""
    raw = socket.create_connection(("127.0.0.1", loop_port), 10)
    raw.sendall(opening(0) + b"".join(call(2 * n + 1, METHOD, b"x") for n in range(calls)))
    return raw


def test_a_call_whose_answer_is_not_taken_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grpc_parts, "_TAKE_S", 0.3)
    monkeypatch.setattr(grpc_parts, "_EXPIRE_S", 0.05)
    monkeypatch.setattr(grpc_parts, "_LOOK_S", 0.05)
    answered: list[Call] = []

    def handler(call: Call, message: bytes) -> None:
        answered.append(call)
        call.answer(bytes(1000))

    with serving(handler) as (_, loop), _raw(loop.port, 3):
        until_s = time.monotonic() + 10.0
        while len(answered) < 3 or loop._calls:
            assert time.monotonic() < until_s, loop._calls
            time.sleep(0.01)
        assert all(each.core is None and each.ending is None for each in answered)


def test_answers_that_are_not_taken_make_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grpc_parts, "_PATIENCE_S", 0.2)
    answered = threading.Semaphore(0)

    def handler(call: Call, message: bytes) -> None:
        call.answer(message * 1000)
        answered.release()

    with serving(handler, max_calls=2) as (channel, loop), _raw(loop.port, 2):
        for _ in range(2):
            assert answered.acquire(timeout=10)
        time.sleep(0.25)
        assert channel.unary_unary(METHOD)(b"abc", timeout=10) == b"abc" * 1000


def test_connections_without_a_call_leave_room_for_others() -> None:
    with serving(lambda call, message: call.answer(message), max_connections=16) as (channel, loop):
        idle = [socket.create_connection(("127.0.0.1", loop.port), 10) for _ in range(12)]
        until_s = time.monotonic() + 10.0
        ended = 0
        while ended < 8:
            assert time.monotonic() < until_s, ended
            loop.keep_room()
            time.sleep(0.05)
            ended = sum(_has_ended(one) for one in idle)
        assert channel.unary_unary(METHOD)(b"abc", timeout=10) == b"abc"
        for one in idle:
            one.close()


def _has_ended(connection: socket.socket) -> bool:
    connection.setblocking(False)
    try:
        while connection.recv(1000):
            pass
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True
