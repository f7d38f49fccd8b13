"""Fuzzes both surfaces of the inference server, over sockets: ``python -m tests.campaign.serving``.

Changed requests, raw bytes and declared sizes go to every method and path. Each must be answered or
refused in a typed way, nothing that is logged may be long, memory must stay, and the server must
answer as before in the end.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import os
import resource
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from random import Random

import grpc
import numpy as np
from tritonclient.grpc import service_pb2 as pb

from benchmarks.measure import anonymous_bytes
from fedcore.observability.lines import log_lines
from tests.serving import WIDTH, Running, local, running, store_of

SERVICE = "/inference.GRPCInferenceService/"
METHODS = (
    *("ModelInfer", "ServerLive", "ServerReady", "ModelReady", "ServerMetadata", "ModelMetadata"),
    *("RepositoryIndex", "RepositoryModelLoad", "RepositoryModelUnload", "Nothing"),
)
PATHS = (
    *("/v2/models/product/infer", "/v2/models/product/versions/1/infer", "/v2", "/v2/health/ready"),
    *("/v2/models/product", "/v2/repository/index", "/v2/repository/models/product/unload", "/"),
    *("/metrics", "/v2/models/%00/infer", "/../../etc/passwd"),
)
TYPED = {
    grpc.StatusCode[name]
    for name in (
        *("OK", "INVALID_ARGUMENT", "NOT_FOUND", "UNIMPLEMENTED", "PERMISSION_DENIED"),
        *("RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED"),
    )
}
X = np.linspace(-1, 1, WIDTH, dtype=np.float32)[None]
MOST_GROWTH_BYTES = 64 << 20


def valid_message() -> bytes:
    """A request of all fields."""
    request = pb.ModelInferRequest(model_name="product", model_version="1", id="7")
    request.inputs.add(name="input", datatype="FP32", shape=X.shape)
    request.outputs.add(name="output")
    request.parameters["timeout"].int64_param = 10**6
    request.raw_input_contents.append(X.tobytes())
    return request.SerializeToString()


def valid_body() -> bytes:
    """The same in JSON."""
    tensor = {"name": "input", "datatype": "FP32", "shape": [1, WIDTH], "data": X[0].tolist()}
    return json.dumps({"id": "7", "inputs": [tensor], "outputs": [{"name": "output"}]}).encode()


def changed(rng: Random, raw: bytes) -> bytes:
    """Bytes with a few places changed, cut, doubled or replaced by numbers that are large."""
    found = bytearray(raw)
    for _ in range(rng.randrange(5)):
        at = rng.randrange(len(found) + 1)
        kind = rng.randrange(6)
        if kind == 0:
            found[at : at + rng.randrange(4)] = rng.randbytes(rng.randrange(6))
        elif kind == 1:
            del found[at:]
        elif kind == 2:
            found[at:at] = found[: rng.randrange(len(found) + 1)]
        elif kind == 3:
            found[at:at] = rng.choice((b"\xff" * 10, b"[" * 500, b"9" * 400, b"\x2a\x00" * 5000))
        elif kind == 4:
            found[at : at + 1] = b"\x80"
        else:
            found[at:at] = rng.choice((b"NaN", b"null", b"-1", b"1e999", b"68719476736", b'"'))
    return bytes(found)


def try_grpc(rng: Random, channel: grpc.Channel) -> str:
    """Sends one call; returns its status."""
    call = channel.unary_unary(SERVICE + rng.choice((METHODS[0], rng.choice(METHODS))))
    try:
        call(changed(rng, valid_message()), timeout=20)
    except grpc.RpcError as error:
        if error.code() not in TYPED:
            raise AssertionError(f"gRPC {error.code()}: {error.details()}") from None
        return str(error.code().name)
    return "OK"


def try_http(rng: Random, address: tuple[str, int]) -> str:
    """Sends one request; returns its status, or that the connection was closed without one."""
    body = changed(rng, valid_body())
    length = rng.choice((len(body), len(body), len(body), rng.randrange(2 * len(body) + 1)))
    head = (
        f"{rng.choice(('POST', 'POST', 'GET', 'PUT'))} {rng.choice((PATHS[0], rng.choice(PATHS)))} "
        f"HTTP/1.1\r\nhost: localhost\r\ncontent-length: {length}\r\n"
    ).encode()
    if not rng.randrange(4):
        number = rng.choice((0, 5, len(body), 10**9, -1))
        head += f"inference-header-content-length: {number}\r\n".encode()
    if not rng.randrange(4):
        head = changed(rng, head)
    found = b""
    with socket.create_connection(address, timeout=20) as connection, suppress(ConnectionError):
        connection.sendall(head + b"\r\n" + body)
        connection.shutdown(socket.SHUT_WR)
        while piece := connection.recv(65536):
            found += piece
    status = found[9:12].decode("latin-1") if found.startswith(b"HTTP/1.1 ") else "closed"
    if status == "500" or (found and status == "closed"):
        raise AssertionError(f"HTTP: {found[:500]!r}")
    return status


def fuzz(server: Running, seconds: float, seed: int) -> tuple[Counter[str], list[str]]:
    """Sends requests for so long; returns how many had which status, and what went wrong."""
    rng, statuses, wrong = Random(seed), Counter[str](), []
    host, port = server.http.split(":")
    with grpc.insecure_channel(server.grpc) as channel:
        kinds: tuple[tuple[str, Callable[[], str]], ...] = (
            ("grpc", lambda: try_grpc(rng, channel)),
            ("http", lambda: try_http(rng, (host, int(port)))),
        )
        end_s = time.monotonic() + seconds
        while time.monotonic() < end_s and len(wrong) < 20:
            for name, send in kinds:
                try:
                    statuses[f"{name} {send()}"] += 1
                except (AssertionError, OSError) as error:
                    wrong.append(f"{type(error).__name__}: {error}"[:1000])
        call = channel.unary_unary(SERVICE + METHODS[0])
        answer = pb.ModelInferResponse.FromString(call(valid_message(), timeout=20))
    if answer.raw_output_contents[0] != local(X).tobytes():
        wrong.append("the answer in the end differs from onnxruntime's")
    return statuses, wrong


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the campaign; 1 if anything went wrong."""
    parser = argparse.ArgumentParser(prog="tests.campaign.serving", description=__doc__)
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    told = io.StringIO()
    log_lines(told, level=logging.DEBUG)
    with (
        tempfile.TemporaryDirectory(prefix="fedcore-fuzz-") as folder,
        running(store_of(Path(folder), {"product": 1})) as server,
    ):
        fuzz(server, min(5.0, options.seconds / 4), options.seed + 1)  # what is loaded once
        before_bytes = anonymous_bytes(os.getpid())
        statuses, wrong = fuzz(server, options.seconds, options.seed)
        grown_bytes = anonymous_bytes(os.getpid()) - before_bytes
    longest = max((len(line.encode()) for line in told.getvalue().splitlines()), default=0)
    if longest > 2000:
        wrong.append(f"a line of {longest} bytes was logged")
    if "failed" in told.getvalue():
        wrong.append(f"an untyped error: {told.getvalue()[:500]}")
    if grown_bytes > MOST_GROWTH_BYTES:
        wrong.append(f"memory grew by {grown_bytes} bytes")
    result = {
        "name": "serving",
        "seconds": options.seconds,
        "counts": dict(sorted(statuses.items())),
        "grown_bytes": grown_bytes,
        "longest_line_bytes": longest,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "wrong": wrong,
    }
    print(json.dumps(result, indent=2))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
