"""A load of tritonclient: ``python -m benchmarks.peers.serving_load grpc HOST:PORT CALLS AHEAD``.

Keeps so many requests under way (AHEAD), by grpc, json or binary, and prints JSON: latencies in
microseconds, and how long it took in seconds, after a warm-up. With ``once`` in place of the calls
it prints when the first answer came.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from typing import Any

import numpy as np

X = np.linspace(0, 16, 64, dtype=np.float32)[None]
_WARM_UP = 200
_RECONNECT = tuple((f"grpc.{name}_reconnect_backoff_ms", 20) for name in ("initial", "min", "max"))
"""While a server starts, gRPC would otherwise wait a second before it tries to connect again."""


def client_of(transport: str, address: str) -> tuple[Any, Any]:
    """Tritonclient's module and a client."""
    if transport == "grpc":
        import tritonclient.grpc as module

        return module, module.InferenceServerClient(address, channel_args=list(_RECONNECT))
    import tritonclient.http as module

    return module, module.InferenceServerClient(address, network_timeout=60.0)


def request_of(transport: str, module: Any) -> dict[str, Any]:
    """The arguments of a call: mlserver takes JSON alone over HTTP, kserve binary tensors alone."""
    tensor = module.InferInput("input", list(X.shape), "FP32")
    if transport != "json":
        tensor.set_data_from_numpy(X)
        return {"inputs": [tensor]}
    tensor.set_data_from_numpy(X, binary_data=False)
    output = module.InferRequestedOutput("output", binary_data=False)
    return {"inputs": [tensor], "outputs": [output]}


def one_by_one(client: Any, request: dict[str, Any], calls: int) -> list[float]:
    """Latencies of calls of which each waits for the one before."""
    times = []
    for _ in range(calls):
        began = time.perf_counter()
        client.infer("digits", **request)
        times.append(time.perf_counter() - began)
    return times


def side_by_side(client: Any, request: dict[str, Any], calls: int, ahead: int) -> list[float]:
    """Latencies of gRPC calls of which ``ahead`` are under way at a time."""
    times: list[float] = []
    faults: list[Any] = []
    room, done = threading.Semaphore(ahead), threading.Semaphore(0)
    for _ in range(calls):
        room.acquire()
        began = time.perf_counter()

        def ended(result: Any, error: Any, began: float = began) -> None:
            times.append(time.perf_counter() - began)
            if error is not None:
                faults.append(error)
            room.release()
            done.release()

        client.async_infer("digits", **request, callback=ended)
    for _ in range(calls):
        done.acquire()
    if faults:
        raise RuntimeError(f"{len(faults)} of {calls} calls failed: {faults[0]}")
    return times


def in_threads(transport: str, address: str, calls: int, ahead: int) -> list[float]:
    """Latencies of HTTP calls by ``ahead`` threads."""
    times: list[float] = []

    def work() -> None:
        module, client = client_of(transport, address)
        times.extend(one_by_one(client, request_of(transport, module), calls // ahead))

    threads = [threading.Thread(target=work) for _ in range(ahead)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return times


def main() -> None:
    """Runs one load."""
    transport, address, calls, ahead = sys.argv[1:]
    module, client = client_of(transport, address)
    request = request_of(transport, module)
    if calls == "once":
        while True:
            try:
                client.infer("digits", **request)
            except Exception:  # it does not listen yet, whichever way the client says so
                time.sleep(0.01)
            else:
                print(json.dumps({"first_s": time.monotonic()}))
                return
    one_by_one(client, request, _WARM_UP)
    began = time.perf_counter()
    if int(ahead) == 1:
        times = one_by_one(client, request, int(calls))
    elif transport == "grpc":
        times = side_by_side(client, request, int(calls), int(ahead))
    else:
        times = in_threads(transport, address, int(calls), int(ahead))
    took_s = time.perf_counter() - began
    print(json.dumps({"times_us": [round(1e6 * one, 1) for one in times], "took_s": took_s}))


if __name__ == "__main__":
    main()
