"""What is compiled is kept under a name of its own, and a cache that is broken does no harm."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

COMPILE = """
from fedcore.kernels.fixed_point import add_scaled
import numpy as np
total = np.zeros(3, np.int64)
add_scaled(np.ones((2, 3), np.float32), np.array([2.0, 5.0]), total)
assert total.tolist() == [7, 7, 7]
"""
SHAPES = """
from fedcore.kernels.direct import direct
from fedcore.kernels.window import ConvolutionWindow
for outs in (8, 16):
    assert direct(ConvolutionWindow((2, 2), (1, 1), (0, 0)), 1, outs) is not None
"""


def run(code: str, cache: Path) -> None:
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, env=environment)


def kept(cache: Path) -> dict[str, bytes]:
    return {one.name: one.read_bytes() for one in cache.rglob("*.nb?")}


def test_each_shape_is_kept_apart(tmp_path: Path) -> None:
    run(SHAPES, tmp_path)
    indices = [name for name in kept(tmp_path) if name.endswith(".nbi")]
    assert sum(name.startswith("direct._forward") for name in indices) == 2
    assert sum(name.startswith("direct._backward") for name in indices) == 2


@pytest.mark.parametrize("kind", ["nbi", "nbc"])
@pytest.mark.parametrize("length", [0, 20])
def test_half_a_file_is_made_whole_again(tmp_path: Path, kind: str, length: int) -> None:
    run(COMPILE, tmp_path)
    whole = kept(tmp_path)
    assert len(whole) == 2
    (broken,) = tmp_path.rglob(f"*.{kind}")
    broken.write_bytes(broken.read_bytes()[:length])
    run(COMPILE, tmp_path)  # and leaves nothing broken
    assert all(whole[name] == content for name, content in kept(tmp_path).items())
    run(COMPILE, tmp_path)
    assert sorted(kept(tmp_path)) == sorted(whole)
    assert min(len(content) for content in kept(tmp_path).values()) > 20


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    run(COMPILE, file / "below")
    assert file.read_bytes() == b""
