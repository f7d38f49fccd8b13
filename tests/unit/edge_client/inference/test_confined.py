from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_client.inference import confined, process
from edge_client.inference.confined import predict
from edge_client.inference.process import ModelLimits
from fedcore.artifacts.manifest import Manifest
from fedcore.errors import DataError, DeviceError, LimitExceeded, ResourceError
from fedcore.files import sha256_hex
from tests import hostile_models as hostile
from tests.child_answers import READY, answer_to

EYE = np.eye(3, dtype=np.float32)
Run = Callable[..., Any]


def of(manifest: Manifest, raw: bytes) -> Manifest:
    entry = manifest.onnx.model_copy(update={"sha256": sha256_hex(raw), "length": len(raw)})
    return manifest.model_copy(update={"onnx": entry})


@pytest.fixture
def run(manifest: Manifest, tmp_path: Path) -> Run:
    def run(raw: bytes, inputs: Any = EYE, *, threads: int = 1, **limits: Any) -> Any:
        path = tmp_path / "model.onnx"
        path.write_bytes(raw)
        return predict(
            of(manifest, raw), path, inputs, threads=threads, limits=ModelLimits(**limits)
        )

    return run


def test_it_answers_what_onnxruntime_answers_here(run: Run, matmul: Any) -> None:
    expected = np.arange(1, 7, dtype=np.float32).reshape(3, 2)
    for threads in (1, 2, 8):
        np.testing.assert_array_equal(run(matmul.onnx(1.0), threads=threads), expected)


def test_an_answer_depends_on_no_other_input(run: Run) -> None:
    # The model sums all that it is given together, so each answer tells its batch.
    outputs = run(hostile.many_outputs(5))
    assert outputs.shape == (3, 5)
    assert (outputs == 1).all()


def test_single_inferences_are_timed_where_the_model_runs(
    manifest: Manifest, matmul: Any, tmp_path: Path
) -> None:
    raw = matmul.onnx(1.0)
    (tmp_path / "m").write_bytes(raw)
    place = of(manifest, raw), tmp_path / "m", EYE
    median, late = confined.time_runs(*place, runs=200, limits=ModelLimits())
    assert 0.1 < median <= late < 1e6
    for runs in (0, confined.MAX_RUNS + 1):
        with pytest.raises(ValueError, match="runs: expected"):
            confined.time_runs(*place, runs=runs, limits=ModelLimits())


@pytest.mark.parametrize("added", ["x", "zero"])
def test_a_loop_without_end_is_ended(run: Run, added: str) -> None:
    started = time.monotonic()
    with pytest.raises(LimitExceeded, match="no answer within 1 s, this device's time limit"):
        run(hostile.endless_loop(of=added), seconds=1.0)
    assert time.monotonic() - started < 3


def test_the_processor_is_limited_where_nobody_looks_at_the_clock(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "_PROCESSOR_MARGIN_S", -59)
    with pytest.raises(LimitExceeded, match="more CPU time"):
        run(hostile.endless_loop(), seconds=60.0)


@pytest.mark.parametrize("count", [10**9, 10**12, 2**61])
def test_a_model_that_takes_all_memory_is_refused_it(run: Run, count: int) -> None:
    with pytest.raises(LimitExceeded, match="more than 1024 MiB, this device's memory limit"):
        run(hostile.memory_bomb(count), memory_bytes=1 << 30)


def test_the_limit_of_memory_leaves_room_for_what_fits(run: Run) -> None:
    with pytest.raises(DeviceError, match="outputs of shape"):  # 100 MB of numbers: it ran
        run(hostile.memory_bomb(25_000_000), EYE[:1], memory_bytes=1 << 30)


def test_outputs_have_a_limit(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "MAX_OUTPUT_BYTES", 1000)
    with pytest.raises(
        LimitExceeded, match="its outputs have more than 1000 bytes, which is not allowed"
    ):
        run(hostile.many_outputs(1000), EYE[:1])


@pytest.mark.parametrize("path", ["secret", "../secret", "/{here}/secret"])
def test_a_model_reads_no_file_of_the_device(run: Run, tmp_path: Path, path: str) -> None:
    (tmp_path / "secret").write_bytes(b"secret")
    with pytest.raises(DeviceError, match="cannot run it"):
        run(hostile.reads_a_file(path.format(here=tmp_path), 6))


@pytest.mark.parametrize("raw", [b"", b"garbage", b"\x08\x07"])
def test_what_is_no_model_is_said_to_be_none(run: Run, raw: bytes) -> None:
    with pytest.raises(DeviceError, match="cannot run it"):
        run(raw)


def test_answers_that_are_no_numbers_are_none(run: Run) -> None:
    with pytest.raises(DeviceError, match="not numeric"):
        run(hostile.text_for_numbers())


def test_inputs_are_taken_however_they_lie_in_memory(run: Run, matmul: Any) -> None:
    wide = np.arange(24, dtype=np.float32).reshape(3, 8).T  # not contiguous
    expected = wide @ np.arange(1, 7, dtype=np.float32).reshape(3, 2)
    np.testing.assert_allclose(run(matmul.onnx(1.0), wide), expected)


def test_inputs_are_looked_at_first(run: Run, matmul: Any, manifest: Manifest) -> None:
    for wrong in (EYE[0], EYE[:0], EYE[:, :2], EYE.astype(np.float64), np.array(1, np.float32)):
        with pytest.raises(DataError, match="expected"):
            run(matmul.onnx(1.0), wrong)
    for dtype in ("object", "nonsense", "\x1b[31m", "U5", "float32,int8"):
        with pytest.raises(DeviceError, match="not a numeric type") as caught:
            predict(
                manifest.model_copy(update={"input_dtype": dtype}),
                Path("none"),
                EYE,
                threads=1,
                limits=ModelLimits(),
            )
        assert str(caught.value).isprintable()


def test_a_file_that_went_away_or_changed_is_not_run(
    manifest: Manifest, matmul: Any, tmp_path: Path
) -> None:
    path = tmp_path / "model.onnx"
    for raw in (None, b"other"):
        if raw is not None:
            path.write_bytes(raw)
        with pytest.raises(DeviceError, match="its file has just changed"):
            predict(manifest, path, EYE, threads=1, limits=ModelLimits())


@pytest.mark.parametrize(
    "said",
    [
        b"",
        b"\n",
        b"[]\n",
        b"{}\n",
        b"null\n",
        b'{"arrays": [{"dtype": "<f4", "shape": [3, 2]}]}\n',
        b'{"arrays": [{"dtype": "<f4", "shape": [3, 2]}]}\n' + bytes(23),
        b'{"arrays": [{"dtype": "<f4", "shape": [2, 3]}]}\n' + bytes(24),
        b'{"arrays": [{"dtype": "O", "shape": [3]}]}\n' + bytes(24),
        b'{"arrays": [{"dtype": "V8", "shape": [3]}]}\n' + bytes(24),
        b'{"arrays": [{"dtype": "<f4", "shape": [3, "x"]}]}\n' + bytes(24),
        b'{"arrays": [{"dtype": "<f4", "shape": 6}]}\n' + bytes(24),
        b'{"arrays": [{"dtype": "<f4", "shape": [3, 2e999]}]}\n' + bytes(24),
        b'{"arrays": [{"dtype": "\\ud800", "shape": [3, 2]}]}\n' + bytes(24),
        b'{"arrays": [{"dtype": "<f4", "shape": [3, 2]}]}\n' + bytes(25),
        b'{"arrays": [{"dtype": "<f4", "shape": [3, -2]}]}\n' + bytes(24),
        b'{"arrays": [{"dtype": "<f4", "shape": [3, 1000000000000]}]}\n' + bytes(24),
        b'{"arrays": [{"dtype": "<f4", "shape": []}]}\n' + bytes(24),
        b'{"arrays": []}\n',
        b'{"arrays": {}}\n',
        b"[" * 4000 + b"\n",
        b"\xff" * 5000,
    ],
)
def test_a_child_that_was_taken_over_is_not_believed(manifest: Manifest, said: bytes) -> None:
    with pytest.raises(DeviceError, match="its response is malformed") as caught:
        answer_to(manifest, said, 0)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "ready",
    [
        b"{}\n",
        b'{"inputs": [], "outputs": []}\n',
        b'{"inputs": [["x"]], "outputs": [["x"]]}\n',
        b'{"inputs": [["\\u001b[31m", "tensor(float)", [1]]], "outputs": []}\n',
        b'{"inputs": [["x", "tensor(float)", 3]], "outputs": []}\n',
        READY + READY,
    ],
)
def test_what_it_says_that_it_takes_is_not_believed_either(
    manifest: Manifest, ready: bytes
) -> None:
    with pytest.raises(DeviceError, match="its response is malformed") as caught:
        answer_to(manifest, b"", 0, ready=ready)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("status", [-6, -9, -11, -35, 1, 99])
def test_a_child_that_fell_over_is_told_of(manifest: Manifest, status: int) -> None:
    with pytest.raises(DeviceError, match="crashed onnxruntime"):
        answer_to(manifest, b"", status)


def test_foreign_words_do_not_act_on_a_terminal(manifest: Manifest) -> None:
    said = b'{"fault": "run", "text": "\\u001b[31mred\\nfedcore: all is well"}\n'
    with pytest.raises(DeviceError) as caught:
        answer_to(manifest, said, 0)
    assert str(caught.value).isprintable()


INSIDE = """
import json, os, resource, socket, sys
sys.path[:] = json.loads(sys.argv[1])
from edge_client.inference import confined_child as child
before = sorted(int(n) for n in os.listdir("/proc/self/fd"))[:-1]
child._die_with(os.getppid())
child._confine(1 << 30)
tried = []
for name, work in (
    ("open", lambda: open("/etc/hostname")),
    ("connect", lambda: socket.socket()),
    ("pipe", lambda: os.pipe()),
    ("raise", lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (9, 9))),
):
    try:
        work()
    except (OSError, ValueError):
        tried.append(name)
print(json.dumps([before, tried, "TOKEN" in os.environ, os.getcwd()]))
"""


def test_it_inherits_nothing_and_may_do_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKEN", "secret")
    monkeypatch.setattr(process, "_START", INSIDE)
    held = os.open("/etc/hostname", os.O_RDONLY)
    os.set_inheritable(held, True)
    try:
        said, _ = process.start_child("model").communicate(timeout=60)
    finally:
        os.close(held)
    assert json.loads(said) == [[0, 1, 2], ["open", "connect", "pipe", "raise"], False, "/"]


def alive(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize("added", ["x", "zero"])
def test_it_dies_with_its_parent_at_whatever_it_is(
    manifest: Manifest, tmp_path: Path, added: str
) -> None:
    raw = hostile.endless_loop(of=added)
    (tmp_path / "model.onnx").write_bytes(raw)
    (tmp_path / "manifest.json").write_text(of(manifest, raw).model_dump_json())
    code = f"""
        import numpy as np
        from pathlib import Path
        from edge_client.inference.confined import predict
        from edge_client.inference.process import ModelLimits
        from fedcore.artifacts.manifest import parse_manifest
        here = Path({str(tmp_path)!r})
        predict(
            parse_manifest((here / "manifest.json").read_bytes()), here / "model.onnx",
            np.eye(3, dtype=np.float32), threads=1, limits=ModelLimits(seconds=60),
        )
    """
    parent = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)])
    try:
        child = busy_child(parent.pid)
        parent.kill()
    finally:
        parent.kill()
        parent.wait()
    ends = time.monotonic() + 5
    while alive(child) and time.monotonic() < ends:
        time.sleep(0.02)
    assert not alive(child)


def busy_child(parent: int) -> int:
    """The process that ``parent`` started, once it has computed for a while."""
    ends = time.monotonic() + 30
    while time.monotonic() < ends:
        found = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
        if found:
            ticks = int(Path(f"/proc/{found[0]}/stat").read_text().rsplit(")", 1)[1].split()[11])
            if ticks > os.sysconf("SC_CLK_TCK") // 2:
                return int(found[0])
        time.sleep(0.02)
    raise AssertionError("no child was started")


def test_a_machine_without_room_for_a_process_is_an_error_of_ours(
    run: Run, matmul: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: Any, **__: Any) -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(subprocess, "Popen", none)
    with pytest.raises(ResourceError, match="cannot start a process"):
        run(matmul.onnx(1.0))


@pytest.mark.parametrize(
    "wrong",
    [
        {"seconds": 0.5},
        {"seconds": 1e9},
        {"seconds": float("nan")},
        {"memory_bytes": 1},
        {"memory_bytes": 1 << 50},
    ],
)
def test_limits_have_limits(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected"):
        ModelLimits(**wrong)
