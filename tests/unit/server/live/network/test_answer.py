"""What goes out of an answer, and when."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from server.live.network.uvicorn_parts import coalesce_head

LENGTH = (b"content-length", b"4")


class Transport:
    def __init__(self) -> None:
        self.sent: list[bytes] = []

    def write(self, data: bytes) -> None:
        if data:
            self.sent.append(data)

    def close(self) -> None:
        self.sent.append(b"closed")

    def is_closing(self) -> bool:
        return self.sent[-1:] == [b"closed"]


def answered(
    *events: dict[str, Any], method: str = "POST", expects: bool = False, close: bool = False
) -> list[bytes]:
    """What a call sends, and where it is complete."""
    transport = Transport()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        for event in events:
            await send(event)

    async def main() -> None:
        event = asyncio.Event()
        event.set()
        cycle = RequestResponseCycle(
            scope={"method": method, "headers": [(b"connection", b"close")] if close else []},  # type: ignore[arg-type,typeddict-item]
            transport=transport,  # type: ignore[arg-type]
            flow=FlowControl(SimpleNamespace(resume_reading=None)),  # type: ignore[arg-type]
            logger=SimpleNamespace(error=lambda *told, **more: None),  # type: ignore[arg-type]
            access_logger=None,  # type: ignore[arg-type]
            access_log=False,
            default_headers=[],
            message_event=event,
            expect_100_continue=expects,
            keep_alive=True,
            on_response=lambda: transport.write(b"complete"),
        )
        coalesce_head(cycle)
        await cycle.run_asgi(app)

    asyncio.run(main())
    return transport.sent


def start(*headers: tuple[bytes, bytes]) -> dict[str, Any]:
    return {"type": "http.response.start", "status": 200, "headers": headers}


def body(data: bytes, *, more: bool = False) -> dict[str, Any]:
    return {"type": "http.response.body", "body": data, "more_body": more}


HEAD = b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\n"


def test_a_head_goes_out_with_what_follows_it() -> None:
    assert answered(start(LENGTH), body(b"done")) == [HEAD + b"done", b"complete"]
    pieces = answered(start(LENGTH), body(b"do", more=True), body(b"n", more=True), body(b"e"))
    assert pieces == [HEAD + b"do", b"n", b"e", b"complete"]


def test_a_head_that_nothing_follows_goes_out_alone() -> None:
    assert answered(start(LENGTH), body(b"", more=False), method="HEAD") == [HEAD, b"complete"]
    empty = answered(start((b"content-length", b"0")), body(b""))
    assert empty == [HEAD.replace(b"4", b"0"), b"complete"]


def test_who_waits_to_be_told_to_go_on_is_told_at_once() -> None:
    told = answered(start(LENGTH), body(b"done"), expects=True)
    assert told == [b"HTTP/1.1 100 Continue\r\n\r\n", HEAD + b"done", b"complete"]


@pytest.mark.parametrize("events", [(start(LENGTH),), (start(LENGTH), body(b"do", more=True))])
def test_an_answer_that_is_not_finished_ends_the_connection(
    events: tuple[dict[str, Any], ...],
) -> None:
    sent = answered(*events)
    assert sent[-1] == b"closed"
    assert b"".join(sent[:-1]) == HEAD + b"".join(one.get("body", b"") for one in events)


def test_the_last_answer_of_a_connection_goes_out_before_it_ends() -> None:
    sent = answered(start(LENGTH), body(b"done"), close=True)
    assert sent == [
        HEAD.replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n") + b"done",
        b"closed",
        b"complete",
    ]
