"""Measuring real processes: their lines, their memory, their failures."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from benchmarks.measure import Observed, ProgramFailed, observe, pss_bytes, tree

HELD_BYTES = 64 << 20


def python(code: str, folder: Path, *, limit_s: float = 60) -> Observed:
    return observe([sys.executable, "-c", code], environment={}, folder=folder, limit_s=limit_s)


def test_lines_are_stamped_as_they_arrive(tmp_path: Path) -> None:
    code = "import time; print('a', flush=True); time.sleep(0.5); print('b', flush=True)"
    observed = python(code, tmp_path)
    (first, a), (second, b) = observed.lines
    assert (a.strip(), b.strip()) == ("a", "b")
    assert observed.launched_s < first < second <= time.monotonic()
    assert second - first == pytest.approx(0.5, abs=0.4)


def test_memory_counts_children(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A busy machine takes long for a sample: the next would come after the child has ended.
    monkeypatch.setattr("benchmarks.measure._SAMPLE_S", 0.05)
    monkeypatch.setattr("benchmarks.measure._SAMPLING_SHARE", 1.0)
    child = f"x = bytearray(b'1' * {HELD_BYTES}); import time; time.sleep(1)"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}], check=True)"
    observed = python(code, tmp_path)
    assert observed.peak_bytes() > HELD_BYTES
    assert observed.peak_bytes(until_s=observed.launched_s - 1) == 0


def test_a_failure_quotes_the_program(tmp_path: Path) -> None:
    with pytest.raises(ProgramFailed, match=r"left with 3 .* no such thing"):
        python("import sys; print('no such thing', file=sys.stderr); sys.exit(3)", tmp_path)


def test_a_program_that_hangs_is_ended_with_its_children(tmp_path: Path) -> None:
    note = tmp_path / "child"
    child = "import time; time.sleep(60)"
    code = (
        "import subprocess, sys, pathlib\n"
        f"p = subprocess.Popen([sys.executable, '-c', {child!r}])\n"
        f"pathlib.Path({str(note)!r}).write_text(str(p.pid))\n"
        "p.wait()"
    )
    began = time.monotonic()
    with pytest.raises(ProgramFailed, match="left with -9"):
        python(code, tmp_path, limit_s=1.5)
    assert time.monotonic() - began < 20
    stat = Path(f"/proc/{note.read_text()}/stat")
    deadline = time.monotonic() + 5
    while stat.exists() and " Z " not in stat.read_text() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not stat.exists() or " Z " in stat.read_text()


def test_a_process_that_is_gone_has_no_memory() -> None:
    nobody = 2**22 + 1  # above the largest number that Linux gives
    assert pss_bytes(nobody) == 0
    assert tree(nobody) == {nobody}
