"""The GPU part of the benchmark, with a driver's program that says what it is told to."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from benchmarks.gpu import Samples, gpus, has_gpu, rows_of_gpu, sampled, take

DRIVER = """#!/bin/sh
if [ "$1" = "-L" ]; then
    echo "GPU 0: NVIDIA H100 (UUID: GPU-0)"; echo "GPU 1: NVIDIA H100 (UUID: GPU-1)"
else
    while true; do echo "1000, 50"; echo "24, 100"; sleep 0.05; done
fi
"""


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(DRIVER)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")


@pytest.mark.usefixtures("driver")
def test_gpus_are_sampled_while_the_block_runs() -> None:
    assert has_gpu()
    assert gpus() == 2
    with sampled() as samples:
        end = time.monotonic() + 30
        while len(samples.utilisation) < 2 and time.monotonic() < end:
            time.sleep(0.01)
    assert samples.memory_bytes[0] == 1024 << 20
    assert samples.utilisation[0] == pytest.approx(0.75)


def test_without_a_driver_there_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not has_gpu()


def test_rows_tell_the_peak_and_how_busy_it_was() -> None:
    samples = Samples()
    take(["1, 0\n", "3, 80\n", "2, 40\n"], 1, samples)
    rows = {each.metric: each.median for each in rows_of_gpu("w2@50", 12.0, samples)}
    assert rows == {
        "gpu_clients_per_s": 12.0,
        "gpu_peak_bytes": 3 << 20,
        "gpu_utilisation": pytest.approx(0.6),
    }
