"""Number of CPU cores that a process may use: its affinity, and the quota of its container."""

from __future__ import annotations

import math
import os
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")
_GROUP_OF_PROCESS = Path("/proc/self/cgroup")


def usable_cores(cgroup: Path = _CGROUP, group_of_process: Path = _GROUP_OF_PROCESS) -> int:
    """Returns the number of cores that this process may use, at least 1.

    A container's CPU quota of 150 % counts as two cores.

    Args:
        cgroup: Where the control groups are mounted.
        group_of_process: File that names the group of this process.
    """
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    quotas = [quota for group in _groups(cgroup, group_of_process) if (quota := _quota(group))]
    return max(1, min([cores, *(math.ceil(quota) for quota in quotas)]))


def _groups(cgroup: Path, group_of_process: Path) -> list[Path]:
    """Returns the folders of this process's group and of all that contain it; each may limit it."""
    named = ""
    for line in _text(group_of_process).splitlines():
        number, _, path = line.split(":", 2) if line.count(":") >= 2 else ("", "", "")
        if number == "0":  # version 2 of control groups has a single hierarchy
            named = path.strip("/")
    own = cgroup / named
    above = [one for one in own.parents if one.is_relative_to(cgroup)]
    return [own, *above, cgroup / "cpu"]  # version 1 has a folder for each controller


def _quota(group: Path) -> float | None:
    """Returns a group's quota in cores; None if it has none."""
    words = _text(group / "cpu.max").split()
    if not words:
        words = [_text(group / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period")]
    if len(words) != 2 or not all(word.isdecimal() and int(word) for word in words):
        return None  # "max" or -1: no limit
    return int(words[0]) / int(words[1])


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError):
        return ""
