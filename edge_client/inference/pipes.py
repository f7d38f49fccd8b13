"""Reads and writes pipes until a deadline."""

from __future__ import annotations

import os
import select
import time

_PIECE = 1 << 20


def write_all(pipe: int, data: bytes | memoryview, deadline: float) -> None:
    """Writes all bytes to a pipe that does not block.

    Args:
        pipe: The file descriptor, non-blocking.
        data: The bytes.
        deadline: By `time.monotonic`, seconds.

    Raises:
        TimeoutError: the deadline passed.
        BrokenPipeError: nobody reads from the pipe any more.
    """
    left = memoryview(data)
    while len(left):
        _wait(pipe, select.POLLOUT, deadline)
        left = left[os.write(pipe, left[:_PIECE]) :]


def read_line(pipe: int, held: bytearray, most: int, deadline: float) -> bytes:
    """Returns the next line without its end; what was read beyond it stays in ``held``.

    Args:
        pipe: The file descriptor.
        held: What has been read and not been used yet.
        most: Most bytes of the line; a longer one is returned cut.
        deadline: By `time.monotonic`, seconds.

    Raises:
        TimeoutError: the deadline passed.
        EOFError: the other side ended first.
    """
    while (end := held.find(b"\n", 0, most)) < 0 and len(held) < most:
        _read(pipe, held, most, deadline)
    line = bytes(held[: end if end >= 0 else most])
    del held[: len(line) + 1]
    return line


def read_exactly(pipe: int, held: bytearray, size: int, deadline: float) -> bytearray:
    """Returns the next ``size`` bytes; what was read beyond them stays in ``held``.

    Raises:
        TimeoutError: the deadline passed.
        EOFError: the other side ended first.
    """
    while len(held) < size:
        _read(pipe, held, size - len(held), deadline)
    found = held[:size]
    del held[:size]
    return found


def has_more(pipe: int) -> bool:
    """Returns whether there is something to read, or the other side has ended."""
    poll = select.poll()
    poll.register(pipe, select.POLLIN | select.POLLHUP)
    return bool(poll.poll(0))


def _read(pipe: int, held: bytearray, most: int, deadline: float) -> None:
    _wait(pipe, select.POLLIN, deadline)
    piece = os.read(pipe, min(most, _PIECE))
    if not piece:
        raise EOFError
    held += piece


def _wait(pipe: int, event: int, deadline: float) -> None:
    poll = select.poll()
    poll.register(pipe, event)
    if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
        raise TimeoutError
