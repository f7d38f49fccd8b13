"""What may have become of a file, and what a command may then do.

A command refuses in words and with a documented exit code, or does exactly what it would have done,
or says what it mended. It neither waits for a pipe's other end, nor goes on in silence with another
result, nor shows a traceback.
"""

from __future__ import annotations

import os
import re
import resource
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

SPARSE_BYTES = 1 << 40
"""Of a file that takes no room on its disk, and would take all memory."""
GROWTH_BYTES = 512 << 20
"""What a command may take beyond what it takes when nothing is wrong."""
_LONGEST_S = 25.0
_GOES_ON_S = 0.5
"""How long a command goes on that has reached what it was waited for."""
_SAID = r"damag|restored from|moved aside|(done|written|computed|created|charged) again|not match"
"""What a command may say of a file that it mends or does without."""
_MAX_LINE_BYTES = 2048
_CODES = frozenset(range(12)) | {130}
_VARIES = re.compile(
    r"\d+\.\d+(e-?\d+)?|\d{4}-\d\d-\d\d[T ]\d\d:\d\d(:\d\d)?(\.\d+)?(Z| UTC)?|[0-9a-f]{16,}|"
    r"/tmp/\S+|\d{4,}"
)


def _without(path: Path) -> None:
    path.unlink()


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _flipped(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 0x10
    path.write_bytes(raw)


def _a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _a_loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


def _closed(path: Path) -> None:
    path.chmod(0)


def _sparse(path: Path) -> None:
    os.truncate(path, SPARSE_BYTES)


HARMS: dict[str, Callable[[Path], None]] = {
    "gone": _without,
    "empty": _empty,
    "flipped": _flipped,
    "folder": _a_folder,
    "pipe": _a_pipe,
    "loop": _a_loop,
    "sparse": _sparse,
}
if os.geteuid() != 0:  # root reads whatever its mode is
    HARMS["closed"] = _closed


@dataclass(frozen=True)
class Command:
    """What is run in a copy of a place, as a process of its own."""

    name: str
    work: Callable[[], int]
    """Runs it in the folder of the copy, and returns its exit code."""
    until: str = ""
    """It is told to stop once its output holds this: it would go on forever."""


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    code: int | None
    """None where it did not, and was killed."""
    out: str
    err: str
    seconds: float
    peak_bytes: int
    reached: bool = False
    """Whether its output held what it was waited for."""


def run(command: Command, folder: Path) -> Done:
    """Runs a command in ``folder``, forked from this process, which has imported what it needs."""
    out, err = folder.parent / "out", folder.parent / "err"
    started = time.monotonic()
    pid = os.fork()
    if not pid:
        _child(command, folder, out, err)
    told, reached, stop_s = False, False, _LONGEST_S / 2
    while True:
        found, status, usage = os.wait4(pid, os.WNOHANG)
        if found:
            break
        passed = time.monotonic() - started
        if command.until and not reached and command.until in _text(out):
            reached, stop_s = True, passed + _GOES_ON_S
        if command.until and not told and passed > stop_s:
            told = True
            os.kill(pid, signal.SIGTERM)
        if passed > _LONGEST_S:
            os.killpg(pid, signal.SIGKILL)
            os.wait4(pid, 0)
            return Done(None, _text(out), _text(err), passed, 0)
        time.sleep(0.005)
    code = os.waitstatus_to_exitcode(status)
    passed = time.monotonic() - started
    return Done(code, _text(out), _text(err), passed, usage.ru_maxrss * 1024, reached)


def _child(command: Command, folder: Path, out: Path, err: Path) -> None:
    """Never returns."""
    code = 99
    try:
        os.setsid()
        for descriptor, path in ((1, out), (2, err)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
        sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.chdir(folder)
        code = command.work()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _text(path: Path) -> str:
    return path.read_text(errors="surrogateescape") if path.exists() else ""


def same(done: Done, usual: Done) -> bool:
    """Whether it said what it says when nothing is wrong, but for times, digests and places."""
    return _plain(done.out) == _plain(usual.out)


def _plain(text: str) -> Sequence[str]:
    return _VARIES.sub("#", text).splitlines()


def verdict(done: Done, usual: Done, name: str) -> tuple[str, str]:
    """What came of a command after harm to the file ``name``.

    Returns:
        ``refused``, ``same`` or ``said``, or ``wrong``; and why it is wrong.
    """
    said = done.out.replace('"damage": null', "") + done.err
    if done.code is None:
        return "wrong", f"it hung: {said[-300:]!r}"
    if "Traceback" in said or done.code not in _CODES:
        return "wrong", f"exit {done.code}: {said[-800:]!r}"
    for line in done.err.splitlines():
        if not line.isprintable() or len(line.encode()) >= _MAX_LINE_BYTES:
            return "wrong", f"a line that no terminal or log can take: {line[:200]!r}"
    if done.peak_bytes > usual.peak_bytes + GROWTH_BYTES:
        return "wrong", f"it took {done.peak_bytes >> 20} MiB, and {usual.peak_bytes >> 20} usually"
    if done.code not in (0, usual.code):
        last = done.err.strip().splitlines()[-1:] or [""]
        if not re.match(r"[A-Z]\w+: .{20}", last[0]) and not re.search("fail|damage", done.out):
            return "wrong", f"exit {done.code}, and no sentence why: {said[-300:]!r}"
        return "refused", ""
    if same(done, usual) and done.reached == usual.reached:
        return "same", ""
    if name in said or re.search(_SAID, said):
        return "said", ""
    return "wrong", f"another result, and not a word of {name}: {said[-600:]!r}"


def copied(place: Path, copy: Path) -> Path:
    """A copy of a place, in the place of the one before."""
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(place, copy, symlinks=True)
    return copy
