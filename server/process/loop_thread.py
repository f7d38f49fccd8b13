"""An asyncio service in a thread of its own, beside synchronous work."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import AbstractAsyncContextManager, contextmanager
from typing import TypeVar

from server.process.signals import signals_blocked

Value = TypeVar("Value")


@contextmanager
def served_in_thread(service: AbstractAsyncContextManager[Value], *, name: str) -> Iterator[Value]:
    """Enters a service on an event loop of its own in a new thread, and exits it at the end.

    Signals are blocked in the thread, so that the main thread receives them.

    Args:
        service: The service; entered and exited in the thread.
        name: The thread's name.

    Yields:
        What entering the service returned.

    Raises:
        Exception: what entering the service raised.
    """
    up = Future[tuple[Value, asyncio.AbstractEventLoop, asyncio.Event]]()

    async def serve() -> None:
        over = asyncio.Event()
        async with service as value:
            up.set_result((value, asyncio.get_running_loop(), over))
            await over.wait()

    def body() -> None:
        try:
            asyncio.run(serve())
        except BaseException as error:
            if up.done():
                raise
            up.set_exception(error)

    thread = threading.Thread(target=body, name=name, daemon=True)
    with signals_blocked():
        thread.start()
    try:
        yield up.result()[0]
    finally:
        if up.done() and not up.exception():
            _, loop, over = up.result()
            loop.call_soon_threadsafe(over.set)
        thread.join()
