"""A TCP proxy that cuts each of its connections after so many bytes, as a bad network does."""

from __future__ import annotations

import selectors
import socket
import struct
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

_PIECE = 1 << 16


@dataclass
class Cutting:
    """What has passed: bytes from the server by connection, and the connections that were cut."""

    port: int
    behind: int
    after: list[int]
    """Bytes from the server after which the first, second, ... connection is cut."""
    passed_bytes: list[int] = field(default_factory=list)
    cuts: int = 0


@contextmanager
def cutting(behind: int, after: Sequence[int]) -> Iterator[Cutting]:
    """Passes on connections to a port of this machine, and resets one after the other.

    Those after the last that is to be cut pass whole.
    """
    listener = socket.create_server(("127.0.0.1", 0))
    state = Cutting(listener.getsockname()[1], behind, list(after))
    threads: list[threading.Thread] = []

    def accept() -> None:
        with suppress(OSError):
            while True:
                client, _ = listener.accept()
                place = len(state.passed_bytes)
                state.passed_bytes.append(0)
                threads.append(threading.Thread(target=_pass, args=(state, client, place)))
                threads[-1].start()

    accepting = threading.Thread(target=accept)
    accepting.start()
    try:
        yield state
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        accepting.join()
        for thread in threads:
            thread.join()


def _pass(state: Cutting, client: socket.socket, place: int) -> None:
    limit = state.after[place] if place < len(state.after) else 1 << 62
    with (
        client,
        socket.create_connection(("127.0.0.1", state.behind)) as server,
        suppress(OSError),
        selectors.DefaultSelector() as ready,
    ):
        ready.register(client, selectors.EVENT_READ)
        ready.register(server, selectors.EVENT_READ)
        while True:
            for key, _ in ready.select():
                left = limit - state.passed_bytes[place]
                if key.fileobj is client:
                    if not (piece := client.recv(_PIECE)):
                        return
                    server.sendall(piece)
                else:
                    if not (piece := server.recv(min(_PIECE, left))):
                        return
                    client.sendall(piece)
                    state.passed_bytes[place] += len(piece)
                if state.passed_bytes[place] >= limit:
                    state.cuts += 1
                    for one in (client, server):  # a reset, not an orderly end
                        one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    return
