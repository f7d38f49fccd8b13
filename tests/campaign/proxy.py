"""A TCP proxy that does to connections what networks do."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field


@dataclass
class Proxy:
    """Passes on what comes to ``host`` to ``behind``, at the same ports, in a thread of its own.

    ``mode`` is ``pass``, ``drop`` (nothing passes, nothing is closed), ``delay`` (every piece comes
    0.2 s later) or ``double`` (what a peer sends is sent again over a second connection).
    """

    host: str
    behind: str
    ports: Sequence[int]
    mode: str = "pass"
    connections: int = 0
    _writers: set[asyncio.StreamWriter] = field(default_factory=set)
    _up: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> Proxy:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="proxy")
        self._thread.start()
        assert self._up.wait(10)
        return self

    def __exit__(self, *error: object) -> None:
        self.cut()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    def cut(self) -> None:
        """Closes every connection."""

        def close() -> None:
            for writer in list(self._writers):
                writer.transport.abort()

        self._loop.call_soon_threadsafe(close)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        servers = []
        for port in self.ports:
            serve = asyncio.start_server(
                lambda reader, writer, port=port: self._serve(port, reader, writer),
                self.host,
                port,
            )
            servers.append(self._loop.run_until_complete(serve))
        self._up.set()
        self._loop.run_forever()
        for server in servers:
            server.close()
        self._loop.run_until_complete(asyncio.sleep(0))  # what was just accepted is a task then
        tasks = asyncio.all_tasks(self._loop)
        for task in tasks:
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        self._loop.close()

    async def _serve(
        self, port: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.connections += 1
        opened = [writer]
        self._writers.add(writer)
        with suppress(OSError):
            server_reader, server_writer = await asyncio.open_connection(self.behind, port)
            opened.append(server_writer)
            targets = [server_writer]
            if self.mode == "double":
                _, second = await asyncio.open_connection(self.behind, port)
                opened.append(second)
                targets.append(second)
            self._writers.update(opened)
            tasks = [
                asyncio.create_task(self._pass(reader, targets)),
                asyncio.create_task(self._pass(server_reader, [writer])),
            ]
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in tasks:
                task.cancel()
        for one in opened:
            one.transport.abort()
            self._writers.discard(one)

    async def _pass(
        self, reader: asyncio.StreamReader, writers: Sequence[asyncio.StreamWriter]
    ) -> None:
        with suppress(OSError):
            while piece := await reader.read(2**16):
                while self.mode == "drop":
                    await asyncio.sleep(0.05)
                if self.mode == "delay":
                    await asyncio.sleep(0.2)
                for place, writer in enumerate(writers):
                    if writer.transport.is_closing():
                        if place == 0:
                            return
                        continue
                    with suppress(OSError):
                        writer.write(piece)
                        await writer.drain()
