"""The base package alone, as ``make test-device`` installs it from a wheel.

FEDCORE_DEVICE_VENV names the virtual environment. What is published is made here, with the full
install; what a device does is done there, in processes of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from fedcore.artifacts.golden import golden_bytes
from server.release.draft import Draft
from server.release.publish import initialise, publish
from tests.origin import LINEAGE, NO_PRIVACY, PARITY

ROOT = Path(__file__).parents[2]
WEIGHT = np.arange(1, 7, dtype=np.float32).reshape(3, 2)
ABSENT = ("torch", "flwr", "opacus", "onnx", "ray", "sklearn")


@pytest.fixture(scope="module")
def venv() -> Path:
    value = os.environ.get("FEDCORE_DEVICE_VENV")
    if not value:
        pytest.skip("FEDCORE_DEVICE_VENV is not set: `make test-device` makes one and names it")
    return Path(value).resolve()


def run(
    venv: Path, program: str, *arguments: str | Path, stdin: str = ""
) -> subprocess.CompletedProcess[str]:
    """Runs a program of the device's environment, away from the checkout."""
    return subprocess.run(
        [venv / "bin" / program, *arguments],
        cwd=venv,
        env={k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "PYTEST"))},
        input=stdin,
        capture_output=True,
        text=True,
        timeout=60,
    )


def canonical(name: str) -> str:
    return name.lower().replace("_", "-")


def pinned(text: str) -> dict[str, str]:
    lines = (line.partition("==") for line in text.splitlines() if "==" in line)
    return {canonical(name): version for name, _, version in lines if not name.startswith("#")}


def draft(factor: float) -> Draft:
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["input", "weight"], ["output"])],
        "product",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 3])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, ["batch", 2])],
        [numpy_helper.from_array(factor * WEIGHT, "weight")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    inputs = np.eye(3, dtype=np.float32)
    return Draft(
        model="product",
        kind="regression",
        labels=(),
        input_shape=(3,),
        input_dtype="float32",
        golden_tolerance=1e-4,
        lineage=LINEAGE,
        privacy=NO_PRIVACY,
        parity=PARITY,
        onnx=model.SerializeToString(),
        golden=golden_bytes(inputs, inputs @ (factor * WEIGHT)),
    )


def test_it_is_a_copy_and_not_this_checkout(venv: Path) -> None:
    done = run(venv, "python", "-c", "import fedcore, sys; print(fedcore.__file__, sys.prefix)")
    file, prefix = done.stdout.split()
    assert Path(prefix) == venv
    assert Path(file).is_relative_to(venv)
    assert run(venv, "pip", "check").returncode == 0


def test_it_takes_no_more_room_than_promised(venv: Path) -> None:
    limit = int(os.environ["FEDCORE_DEVICE_LIMIT_MB"])
    taken = sum(
        (Path(folder) / file).lstat().st_blocks * 512
        for folder, _, files in os.walk(venv)
        for file in files
    )
    print(f"the device's environment takes {taken / 1e6:.0f} MB of {limit} MB")
    assert taken <= limit * 1_000_000


@pytest.mark.parametrize("name", ABSENT)
def test_what_only_training_needs_is_not_there(venv: Path, name: str) -> None:
    code = f"import importlib.util; print(importlib.util.find_spec({name!r}))"
    assert run(venv, "python", "-c", code).stdout == "None\n"


def test_its_versions_are_the_ones_written_down(venv: Path) -> None:
    installed = pinned(run(venv, "pip", "freeze", "--exclude", "fedcore").stdout)
    assert installed == pinned((ROOT / "constraints-device.txt").read_text())
    assert installed["protobuf"].startswith("6."), "Flower, on the other side, needs it below 7"


def test_the_full_install_is_the_one_written_down() -> None:
    if Path(sys.prefix).resolve() != (ROOT / ".venv").resolve():
        pytest.skip("these tests do not run in .venv, which `make setup` makes")
    done = subprocess.run(
        [sys.executable, "-m", "pip", "freeze", "--all", "--exclude-editable", "--exclude", "pip"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    installed = {name: version.partition("+")[0] for name, version in pinned(done.stdout).items()}
    expected = pinned((ROOT / "constraints.txt").read_text())
    # More may be there: what torch's CUDA build brings, and what its user likes to have.
    assert {name: installed.get(name) for name in expected} == expected


def test_it_fetches_verifies_and_infers(venv: Path, tmp_path: Path) -> None:
    repository, keys, store = tmp_path / "repository", tmp_path / "keys", tmp_path / "store"
    root = initialise(repository, keys, now=datetime.now(UTC))
    publish(draft(1.0), repository=repository, keys=keys, created=datetime.now(UTC))
    place = ("--store", store, "--model", "product")
    update = ("device", "update", "--repository", repository, *place)
    infer = ("device", "infer", *place, "--input", "-", "--json")

    first = run(venv, "fedcore", *update, "--root", root)
    assert first.returncode == 0, first.stderr
    answer = run(venv, "fedcore", *infer, stdin="[[1, 0, 0], [1, 1, 1]]")
    assert answer.returncode == 0, answer.stderr
    assert json.loads(answer.stdout)["outputs"] == [[1.0, 2.0], [9.0, 12.0]]

    second = publish(draft(2.0), repository=repository, keys=keys, created=datetime.now(UTC))
    target = next((repository / "targets").rglob(f"*{second.onnx.sha256}*"))
    raw = bytearray(target.read_bytes())
    raw[len(raw) // 2] ^= 1
    target.write_bytes(raw)
    refused = run(venv, "fedcore", *update)
    assert refused.returncode == 10, refused.stdout + refused.stderr
    assert "Traceback" not in refused.stderr
    answer = run(venv, "fedcore", *infer, stdin="[[1, 0, 0]]")
    assert json.loads(answer.stdout)["outputs"] == [[1.0, 2.0]]

    raw[len(raw) // 2] ^= 1
    target.write_bytes(raw)
    assert run(venv, "fedcore", *update).returncode == 0
    answer = run(venv, "fedcore", *infer, stdin="[[1, 0, 0]]")
    assert json.loads(answer.stdout)["outputs"] == [[2.0, 4.0]]


def test_a_verb_that_needs_more_says_what_to_install(venv: Path, tmp_path: Path) -> None:
    written = run(venv, "fedcore", "new", tmp_path / "mine")
    assert written.returncode == 0, written.stderr
    done = run(venv, "fedcore", "simulate", tmp_path / "mine" / "run.toml")
    assert done.returncode == 7, done.stdout + done.stderr
    assert "Nothing was run; install it with `pip install 'fedcore[" in done.stderr
    assert "Traceback" not in done.stderr
