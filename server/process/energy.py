"""Energy that a machine's own counters report: of processor packages and of GPUs."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

_POWERCAP = Path("/sys/class/powercap")


def package_counters(powercap: Path = _POWERCAP) -> dict[str, tuple[int, int]]:
    """Returns each package's counter in microjoules, and where it starts again, by zone (RAPL).

    Empty where there are none, or this user may not read them.
    """
    found = {}
    for zone in sorted(powercap.glob("*-rapl:*")):
        if zone.name.count(":") > 1:  # a part of a package
            continue
        with suppress(OSError, ValueError):
            values = ((zone / name).read_text() for name in ("energy_uj", "max_energy_range_uj"))
            count, limit = map(int, values)
            found[zone.name] = count, limit
    return found


def joules_between(
    before: Mapping[str, tuple[int, int]], after: Mapping[str, tuple[int, int]]
) -> float | None:
    """Returns the energy between two readings of `package_counters`; None where there are none.

    A counter that started again has done so once.
    """
    both = before.keys() & after.keys()
    if not both:
        return None
    return sum((after[zone][0] - before[zone][0]) % (after[zone][1] + 1) for zone in both) / 1e6


def gpu_joules(index: int) -> float | None:
    """Returns what a GPU has used since its driver was loaded; None where NVML does not say.

    NVML's Python bindings come with the package nvidia-ml-py.
    """
    try:
        nvml: Any = import_module("pynvml")
        nvml.nvmlInit()
        try:
            handle = nvml.nvmlDeviceGetHandleByIndex(index)
            return float(nvml.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1e3
        finally:
            nvml.nvmlShutdown()
    except Exception:  # not installed, no driver, or a GPU without this counter
        return None
