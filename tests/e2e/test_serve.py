"""``fedcore device serve`` as a process: from a release to answers, over an update, to its end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import urllib.request
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import tritonclient.grpc as triton

import fedcore
from edge_client.delivery.health import read_served
from edge_client.delivery.store import read_record
from server.release.publish import initialise, publish
from tests.e2e.test_base_install import WEIGHT, draft


def post(address: str, body: Any) -> Any:
    raw = json.dumps(body).encode()
    with urllib.request.urlopen(f"{address}/v2/models/product/infer", raw, 60) as response:
        return json.load(response)


def test_a_release_is_served_updated_and_drained(tmp_path: Path) -> None:
    repository, keys, store = tmp_path / "repository", tmp_path / "keys", tmp_path / "store"
    root = initialise(repository, keys, now=datetime.now(UTC))

    def install(factor: float) -> None:
        publish(draft(factor), repository=repository, keys=keys, created=datetime.now(UTC))
        fedcore.update_model(store, "product", repository=repository, root=root)

    install(1.0)
    serve = [sys.executable, "-m", "fedcore.cli", "device", "serve", "--store", str(store)]
    with subprocess.Popen(
        [*serve, "--http-port", "0", "--grpc-port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as process:
        try:
            assert process.stdout is not None
            words = process.stdout.readline().split()
            http, grpc = words[2], words[6]
            x = {"name": "input", "datatype": "FP32", "shape": [2, 3], "data": [1, 0, 0, 1, 1, 1]}
            answer = post(http, {"inputs": [x]})
            assert answer["model_version"] == "1"
            assert answer["outputs"][0]["data"] == [1.0, 2.0, 9.0, 12.0]
            modules = Path(f"/proc/{process.pid}/maps").read_text()
            assert "libtorch" not in modules

            answers, over = [], threading.Event()

            def load() -> None:
                tensor = triton.InferInput("input", [1, 3], "FP32")
                tensor.set_data_from_numpy(np.ones((1, 3), np.float32))
                with triton.InferenceServerClient(grpc) as client:
                    while not over.is_set():
                        result = client.infer("product", [tensor])
                        version = int(result.get_response().model_version)
                        answers.append((version, result.as_numpy("output").tolist()))

            thread = threading.Thread(target=load)
            thread.start()
            install(2.0)
            while post(http, {"inputs": [x]})["model_version"] != "2":
                pass
            while not answers or answers[-1][0] != 2:
                over.wait(0.01)
            over.set()
            thread.join()
            both = [(version, (version * WEIGHT.sum(axis=0)[None]).tolist()) for version in (1, 2)]
            assert all(answer in both for answer in answers)
            record = read_record(store, "product", "active")
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
            requests, errors = read_served(store, "product", record)
            assert requests > 0
            assert errors == 0
        finally:
            process.kill()
