"""``simulation.engine = "ray"``: workers as actors of a cluster give the model of one process."""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fedcore.files import sha256_hex

pytestmark = pytest.mark.slow

Fedcore = Callable[..., subprocess.CompletedProcess[str]]
SHORT = [
    *("--set", "federation.rounds=2", "--set", "finetune.epochs=0", "--set", "client.epochs=1"),
    *("--set", "compression.prune_epochs=1", "--set", "compression.timing_runs=100"),
    *("--set", 'compression.candidates=["fp32"]', "--set", "simulation.training=loop"),
]


@pytest.fixture
def short() -> Iterator[str]:
    """A folder for Ray's sockets, whose paths the system limits to 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp") as folder:
        yield folder


@pytest.mark.timeout(300)
def test_two_actors_give_the_bits_of_one_process(
    fresh_fedcore: Fedcore, tmp_path: Path, short: str
) -> None:
    pytest.importorskip("ray")
    folder = tmp_path / "cls"
    assert fresh_fedcore("new", folder, cwd=tmp_path).returncode == 0
    digests = {}
    for engine, workers in (("local", 1), ("ray", 2)):
        done = fresh_fedcore(
            *("simulate", "run.toml", "--runs", engine, "--json", *SHORT),
            *("--set", f"simulation.engine={engine}", "--set", f"simulation.workers={workers}"),
            cwd=folder,
            env={"RAY_TMPDIR": short},
        )
        assert done.returncode == 0, done.stdout + done.stderr
        events = [json.loads(line) for line in done.stdout.splitlines()]
        notes = [event["text"] for event in events if event["event"] == "noted"]
        assert any(f"by {workers} worker" in note for note in notes), notes
        (results,) = (folder / engine).iterdir()
        digests[engine] = sha256_hex((results / "global.safetensors").read_bytes())
    assert digests["local"] == digests["ray"]
    left = subprocess.run(["pgrep", "-f", short], capture_output=True, text=True)
    assert left.stdout == ""
