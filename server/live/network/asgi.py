"""ASGI as the network port uses it: the types of an application, and how an answer is sent."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from fedcore.flower.fleet_api import FileResponse

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

_PIECE_BYTES = 2**15


async def send_file(send: Send, answer: FileResponse, *, timeout_s: float) -> None:
    """Streams a large answer at the peer's pace, with one piece in memory at a time.

    Gives up after ``timeout_s``; uvicorn then closes the connection.
    """
    length = (b"content-length", str(answer.size_bytes).encode())
    head = [(b"content-type", b"application/x-protobuf"), length]
    with answer.file as file:
        try:
            async with asyncio.timeout(timeout_s):
                await send({"type": "http.response.start", "status": 200, "headers": head})
                await send({"type": "http.response.body", "body": answer.head, "more_body": True})
                while piece := file.read(_PIECE_BYTES):
                    await send({"type": "http.response.body", "body": piece, "more_body": True})
                await send({"type": "http.response.body", "body": b""})
        except TimeoutError:
            return


async def respond(
    send: Send,
    status: int,
    kind: bytes,
    body: bytes,
    headers: list[tuple[bytes, bytes]] | None = None,
) -> None:
    """Sends a whole answer of a content type ``kind``."""
    length = (b"content-length", str(len(body)).encode())
    head = [(b"content-type", kind), length, *(headers or [])]
    await send({"type": "http.response.start", "status": status, "headers": head})
    await send({"type": "http.response.body", "body": body})
