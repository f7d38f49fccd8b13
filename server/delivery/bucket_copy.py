"""Keeps a bucket at the state of a repository while the repository is delivered."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedcore.errors import DataError, FedcoreError
from fedcore.files import read_bytes
from fedcore.observability.words import counted
from server.release.push import TIMESTAMP, push
from server.release.registry.keys import MAX_METADATA_BYTES

log = logging.getLogger("fedcore.server")

_LOOK_S = 2.0
"""How often the repository is looked at."""
_MOST_WAIT_S = 300.0
"""Longest wait after a push that failed; the first is `_LOOK_S`, and each doubles."""


@contextmanager
def copied_to_bucket(
    repository: Path, keys: Path, to: str, *, look_s: float = _LOOK_S
) -> Iterator[None]:
    """Pushes a repository now, and again in a thread whenever it has changed, until exit.

    So the bucket gets what any command publishes, promotes, rolls back or refreshes meanwhile. A
    push that fails is logged and tried again.

    Args:
        repository: The folder of the repository.
        keys: The folder of keys; only its ``root.json`` is read.
        to: Address of the bucket.
        look_s: Seconds between looks at the repository.

    Raises:
        FedcoreError: the first push failed, see `server.release.push.push`.
    """
    over = threading.Event()
    pushed = _pushed(repository, keys, to)
    thread = threading.Thread(
        target=_follow,
        args=(repository, keys, to, pushed, look_s, over),
        name="bucket_copy",
        daemon=True,  # a push that is cut off has changed nothing for devices
    )
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(timeout=10)


def _follow(
    repository: Path, keys: Path, to: str, pushed: bytes, look_s: float, over: threading.Event
) -> None:
    wait_s = look_s
    while not over.wait(wait_s):
        try:
            if _timestamp(repository) != pushed:
                pushed = _pushed(repository, keys, to)
            wait_s = look_s
        except FedcoreError as error:
            wait_s = min(2 * wait_s, _MOST_WAIT_S)
            log.warning("%s It is tried again in %.0f s.", error, wait_s)


def _pushed(repository: Path, keys: Path, to: str) -> bytes:
    """Pushes a repository; returns the timestamp that it had before, as it may change meanwhile."""
    timestamp = _timestamp(repository)
    done = push(repository, keys, to)
    log.info("pushed %s to %s", counted(len(done.uploaded), "file"), done.to)
    for name in done.repaired:
        log.warning("%s: %s was another one; find out who may write there", done.to, name)
    return timestamp


def _timestamp(repository: Path) -> bytes:
    try:
        return read_bytes(
            repository / TIMESTAMP, max_bytes=MAX_METADATA_BYTES, what="signed metadata"
        )
    except DataError:
        return b""  # the push says what is wrong
