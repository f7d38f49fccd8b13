"""A delivery service that answers whatever it is told to, with a valid identity of the project."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from fedcore.rpc.delivery import CHUNK_BYTES, SERVICE
from fedcore.rpc.delivery_pb2 import Chunk, FetchRequest, MetadataRequest
from tests.delivering import HOST, Delivering

Change = Callable[[str, bytes], bytes]
"""Gets a file's name and content, and returns what is sent in its place."""


@dataclass
class Behaviour:
    """What the service does with the next calls."""

    repository: Path
    change: Change = lambda name, raw: raw
    manner: str = "plain"
    """``plain``, ``endless`` (never stops), ``slow`` (a byte now and then), ``empty`` (chunks
    without content), ``huge`` (one message for all) or ``short`` (stops in the middle,
    every time)."""

    def file(self, name: str) -> bytes | None:
        path = self.repository / name
        return self.change(name, path.read_bytes()) if path.is_file() else None

    def named(self, sha256: str) -> bytes | None:
        for path in (self.repository / "targets").rglob(f"{sha256}.*"):
            return self.file(str(path.relative_to(self.repository)))
        return None

    def pieces(self, raw: bytes) -> Iterator[bytes]:
        if self.manner == "huge":
            yield raw + bytes(1 << 20)
        elif self.manner == "empty":
            yield from itertools.repeat(b"", 1000)
        elif self.manner == "slow":
            for place in range(len(raw)):
                time.sleep(0.02)
                yield raw[place : place + 1]
        else:
            end = len(raw) // 2 if self.manner == "short" else len(raw)
            for start in range(0, end, CHUNK_BYTES):
                yield raw[start : min(start + CHUNK_BYTES, end)]
            while self.manner == "endless":
                yield bytes(CHUNK_BYTES)


@contextmanager
def hostile(project: Delivering, behaviour: Behaviour) -> Iterator[int]:
    """Serves in threads; yields the port."""

    def metadata(request: MetadataRequest, context: Any) -> Iterator[Chunk]:
        return _answer(behaviour.file(f"metadata/{request.name}"), 0, context)

    def fetch(request: FetchRequest, context: Any) -> Iterator[Chunk]:
        return _answer(behaviour.named(request.sha256), request.offset, context)

    def _answer(raw: bytes | None, offset: int, context: Any) -> Iterator[Chunk]:
        if raw is None:
            context.abort(grpc.StatusCode.NOT_FOUND, "")
            return
        for piece in behaviour.pieces(raw[offset:]):
            if not context.is_active():
                return
            yield Chunk(content=piece)

    kit = project.server.kit
    server = grpc.server(ThreadPoolExecutor(8))
    calls = {
        name: grpc.unary_stream_rpc_method_handler(
            call, request_deserializer=kind.FromString, response_serializer=Chunk.SerializeToString
        )
        for name, call, kind in (
            ("GetMetadata", metadata, MetadataRequest),
            ("Fetch", fetch, FetchRequest),
        )
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, calls),))
    port = server.add_secure_port(
        f"{HOST}:0",
        grpc.ssl_server_credentials(
            [(kit.key_pem(), kit.certificate_pem)], kit.authority_pem, require_client_auth=True
        ),
    )
    server.start()
    try:
        yield port
    finally:
        server.stop(0).wait()
