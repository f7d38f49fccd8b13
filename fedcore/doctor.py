"""Finds problems that would keep a server or a device from working: ``fedcore doctor``.

`diagnose` is part of the Python API. Each check returns a `Finding`; the checks specific to a
device or a server come from the entry-point group ``fedcore.doctors``.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from importlib.metadata import entry_points
from os import PathLike
from pathlib import Path
from typing import Literal

from fedcore import __version__
from fedcore.cli import Command, json_option
from fedcore.errors import ConfigError, FedcoreError, ResourceError
from fedcore.observability.foreign import say

_SOON = timedelta(days=14)
_LITTLE_BYTES, _TOO_LITTLE_BYTES = 2 << 30, 200 << 20
FLOWER = ("1.41", "1.42")
"""Versions of Flower that fedcore is tested with: it uses private parts of them."""


@dataclass(frozen=True)
class Finding:
    """The result of one check of `fedcore.diagnose`, with a remedy if something is wrong.

    Example::

        for finding in fedcore.diagnose(kit="kit"):
            print(finding.verdict, finding.check, finding.detail, finding.remedy)
    """

    check: str
    """What was checked, such as ``clock``."""
    verdict: Literal["ok", "warn", "fail"]
    detail: str
    remedy: str = ""
    """What to do; empty if nothing is wrong."""


@dataclass(frozen=True)
class Checkup:
    """What `diagnose` looks at: folders of a device or of a server."""

    kit: Path | None = None
    store: Path | None = None
    identity: Path | None = None
    runs: Path = Path("runs")


Examine = Callable[[Checkup], Iterable[Finding]]


def guarded(check: str, work: Callable[[], Finding], *, remedy: str) -> Finding:
    """Runs a check; a `FedcoreError` that it raises becomes a failed finding."""
    try:
        return work()
    except FedcoreError as error:
        return Finding(check, "fail", str(error), remedy)


def versions() -> Finding:
    """Checks the versions of Python, fedcore, and Flower, of which private parts are used."""
    found = {name: _version(name) for name in ("flwr", "torch", "grpcio", "onnxruntime")}
    told = ", ".join(f"{name} {version or 'not installed'}" for name, version in found.items())
    told = f"fedcore {__version__}, Python {platform.python_version()}, {told}"
    flower = found["flwr"]
    if flower is not None and flower.rpartition(".")[0] not in FLOWER:
        return Finding("versions", "fail", told, f"`pip install 'flwr=={FLOWER[-1]}.*'`")
    if found["flwr"] is None or found["torch"] is None:
        remedy = "`pip install 'fedcore[train]'` for a device that trains, `[server]` for a server"
        return Finding("versions", "warn", f"{told}: this machine can infer only", remedy)
    return Finding("versions", "ok", told)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def expiry(what: str, not_after: datetime, *, remedy: str, now: datetime | None = None) -> Finding:
    """Checks how long a certificate remains valid."""
    left = not_after - (now or datetime.now(UTC))
    until = f"{what} until {not_after:%Y-%m-%d %H:%M} UTC"
    if left <= timedelta(0):
        return Finding("certificate", "fail", f"{until}: expired {_told(-left)} ago", remedy)
    told = f"{until} ({_told(left)})"
    if left < _SOON:
        return Finding("certificate", "warn", f"{told}: expires soon", remedy)
    return Finding("certificate", "ok", told)


def _told(time: timedelta) -> str:
    """Returns a duration in its largest whole unit, such as ``1 day`` or ``12 minutes``."""
    if time >= timedelta(hours=1):
        name, unit = ("day", timedelta(days=1)) if time.days else ("hour", timedelta(hours=1))
    else:
        name, unit = "minute", timedelta(minutes=1)
    count = time // unit
    return f"{count} {name}{'' if count == 1 else 's'}"


def disk(folder: Path) -> Finding:
    """Checks that a folder, or its nearest existing parent, is writable and has free space."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    told = f"{free / 2**30:.1f} GiB free at {there}"
    remedy = f"free space there, or put the folder {folder} on another disk"
    if not os.access(there, os.W_OK):
        return Finding("disk", "fail", f"{there} is not writable by this user", remedy)
    if free < _TOO_LITTLE_BYTES:
        return Finding("disk", "fail", told, remedy)
    return Finding("disk", "warn" if free < _LITTLE_BYTES else "ok", told, remedy)


def gpu() -> Finding:
    """Checks whether torch finds the machine's GPU."""
    try:
        import torch
    except ModuleNotFoundError:
        return Finding("gpu", "ok", "torch is not installed; this machine cannot train")
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        free = torch.cuda.mem_get_info()[0] / 2**30
        return Finding("gpu", "ok", f"{', '.join(names)}; {free:.1f} GiB free on the first")
    if shutil.which("nvidia-smi"):
        return Finding(
            "gpu",
            "warn",
            f"torch {torch.__version__} finds no GPU, though NVIDIA's driver is installed",
            "install the CUDA build of torch, and check that `nvidia-smi` lists a GPU",
        )
    return Finding("gpu", "ok", "none; training runs on the CPU")


def providers() -> Finding:
    """Checks that ONNX Runtime is installed with its CPU execution provider."""
    try:
        import onnxruntime
    except ModuleNotFoundError:
        return Finding("onnxruntime", "fail", "not installed", "`pip install onnxruntime`")
    found = onnxruntime.get_available_providers()
    told = f"{onnxruntime.__version__}: {', '.join(found)}"
    if "CPUExecutionProvider" not in found:
        remedy = "reinstall onnxruntime: released models are tested on its CPU provider"
        return Finding("onnxruntime", "fail", told, remedy)
    return Finding("onnxruntime", "ok", told)


def task_layers(path: Path) -> Finding:
    """Checks that a task loads, and that every layer supports per-example privacy."""
    from fedcore.errors import UnsupportedLayer
    from fedcore.privacy.layers import check_layers
    from fedcore.task.answers import new_model
    from fedcore.task.definition import load_task

    task = load_task(path)
    try:
        check_layers(new_model(task))
    except UnsupportedLayer as error:
        return Finding(
            "task",
            "warn",
            f"{task.name}: {error}",
            "only needed with privacy.unit = 'example': replace the layers listed",
        )
    return Finding("task", "ok", f"{task.name}: every layer can be trained with privacy")


def _arguments(parser: argparse.ArgumentParser) -> None:
    side = parser.add_mutually_exclusive_group()
    side.add_argument(
        "--kit",
        type=Path,
        metavar="DIR",
        help="check a device, given the folder of its kit, e.g. --kit kit",
    )
    side.add_argument(
        "--identity",
        type=Path,
        metavar="DIR",
        help="check a server, given the folder of its identity, e.g. --identity authority/server",
    )
    parser.add_argument(
        "--store",
        type=Path,
        metavar="DIR",
        help="also check a device's released models, e.g. --store /var/lib/fedcore",
    )
    parser.add_argument("--task", type=Path, help="also check a task, e.g. --task churn/task.py")
    parser.add_argument(
        "--runs",
        type=Path,
        default=Path("runs"),
        help="folder for a server's results (default: runs)",
    )
    json_option(parser)


def diagnose(
    *,
    kit: str | PathLike[str] | None = None,
    store: str | PathLike[str] | None = None,
    identity: str | PathLike[str] | None = None,
    runs: str | PathLike[str] = "runs",
    task: str | PathLike[str] | None = None,
) -> list[Finding]:
    """Checks what would keep a device or a server from working; changes nothing.

    A device is checked by its kit, its store of models, or both, and a server by its identity: the
    versions installed, certificates, clock, network, disk, and the GPU.

    Example::

        findings = fedcore.diagnose(kit="kit", task="churn/task.py")
        assert not [one for one in findings if one.verdict == "fail"], findings

    Args:
        kit: Folder of a device's kit.
        store: Folder of a device's released models.
        identity: Folder of a server's key and certificate.
        runs: Folder of a server's results.
        task: File of a task that will be trained there.

    Returns:
        One finding a check, in order.

    Raises:
        ConfigError: no folder is given, or those of a device and of a server are.
    """
    if (kit or store or identity) is None:
        raise ConfigError(
            "doctor: expected --kit or --store for a device, or --identity for a server; got "
            "none. Nothing was checked."
        )
    if identity is not None and (kit or store) is not None:
        raise ConfigError(
            f"doctor: {'--kit' if kit else '--store'} is for a device, --identity for a server. "
            "Nothing was checked; run it once for each."
        )
    (entry,) = entry_points(
        group="fedcore.doctors", name="device" if identity is None else "server"
    )
    examine: Examine = entry.load()
    asked = Checkup(_path(kit), _path(store), _path(identity), Path(runs))
    findings = [versions(), *examine(asked), gpu(), providers()]
    if task is not None:
        path, remedy = Path(task), "`fedcore check` gives details about a task"
        findings.append(guarded("task", lambda: task_layers(path), remedy=remedy))
    return findings


def _path(place: str | PathLike[str] | None) -> Path | None:
    return None if place is None else Path(place)


def _doctor(options: argparse.Namespace) -> int:
    findings = diagnose(
        kit=options.kit,
        store=options.store,
        identity=options.identity,
        runs=options.runs,
        task=options.task,
    )
    failed = any(finding.verdict == "fail" for finding in findings)
    if options.json:
        say(json.dumps({"ok": not failed, "findings": list(map(asdict, findings))}, indent=2))
    else:
        for finding in findings:
            say(f"{finding.verdict.upper():<5}{finding.check:<12} {finding.detail}")
            if finding.verdict != "ok":
                say(f"     {'':<12} -> {finding.remedy}")
        side = "device" if options.identity is None else "server"
        say("This would fail." if failed else f"This {side} is ready.")
    return ResourceError.exit_code if failed else 0


doctor = Command(
    help="find what would stop a server or a device from working, and say how to fix it",
    arguments=_arguments,
    run=_doctor,
    example="fedcore doctor --kit kit --task task.py",
)
