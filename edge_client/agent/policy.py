"""Enforcement of the owner's policy: task, hours, power, bandwidth and GPU.

Start with `run_sessions`, which runs training sessions whenever the policy allows it.
"""

from __future__ import annotations

import gc
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path

from edge_client.agent.wake import Signals
from fedcore.config.owner import OwnerPolicy
from fedcore.errors import ConfigError
from fedcore.files import read_bytes, sha256_hex
from fedcore.observability.words import counted

log = logging.getLogger("fedcore.device")

POWER = Path("/sys/class/power_supply")
_LOOK_S = 10.0
"""Interval between two checks of the clock and the battery."""
_MAX_TASK_BYTES = 16 << 20
_MAX_POWER_BYTES = 1 << 12


@dataclass(frozen=True)
class PolicyInputs:
    """Sources of the time and the power state that a policy depends on; tests replace them."""

    clock: Callable[[], datetime] = datetime.now
    """Returns local time: owners state hours in it."""
    power: Path = POWER
    check_interval_s: float = _LOOK_S


HERE = PolicyInputs()


@dataclass(frozen=True)
class Power:
    """Power state of a device."""

    on_battery: bool
    percent: int | None
    """Charge of the fullest battery; None if no battery reports its charge."""


def read_power(folder: Path) -> Power:
    """Reads the power state from Linux's sysfs.

    A connected mains or USB supply counts as mains, even if the battery discharges. So does a
    machine that reports no supply at all, which most servers do.

    Args:
        folder: ``/sys/class/power_supply``, or a folder laid out like it.
    """
    online, discharging, percents = False, False, []
    for supply in sorted(folder.iterdir()) if folder.is_dir() else []:
        kind = _value(supply / "type")
        if kind in ("Mains", "USB"):
            online |= _value(supply / "online") == "1"
        elif kind == "Battery" and _value(supply / "scope") != "Device":  # a mouse has that scope
            discharging |= _value(supply / "status") == "Discharging"
            percent = _value(supply / "capacity")
            percents += [int(percent)] if percent.isdecimal() else []
    return Power(discharging and not online, max(percents, default=None))


def _value(path: Path) -> str:
    """Reads a sysfs value; empty if the file cannot be read."""
    try:
        with path.open("rb") as stream:
            return stream.read(_MAX_POWER_BYTES).decode(errors="replace").strip()
    except OSError:
        return ""


def check_task(owner: OwnerPolicy, path: Path) -> None:
    """Checks that the owner allows a task file, by its SHA-256 and without running it.

    Raises:
        ConfigError: the digest is not in ``owner.tasks``.
        DataError: the file cannot be read.
    """
    if owner.tasks is None:
        return
    more = "Nothing was run; pass an existing task file with --task."
    raw = read_bytes(path, max_bytes=_MAX_TASK_BYTES, what="the task", otherwise=more)
    digest = sha256_hex(raw)
    if digest not in owner.tasks:
        raise ConfigError(
            f"{path}: its SHA-256 is {digest}, but {owner.file} allows "
            f"{counted(len(owner.tasks), 'task')}, not including this one. Nothing was run; have "
            "the owner review the file and add it to `tasks`, or install another task."
        )


def reason_to_pause(owner: OwnerPolicy, around: PolicyInputs = HERE) -> str | None:
    """Returns why the policy forbids training now; None if it allows it."""
    if owner.hours is not None:
        now = around.clock()
        if not any(_within(hours, now) for hours in owner.hours):
            return f"the time is {now:%H:%M}, outside the owner's hours {', '.join(owner.hours)}"
    if owner.on_mains_only or owner.min_battery_percent is not None:
        power = read_power(around.power)
        if power.on_battery and owner.on_mains_only:
            return "it runs on battery, and the owner requires mains power"
        least = owner.min_battery_percent
        if power.on_battery and least is not None and (power.percent or 0) < least:
            return f"its battery has {power.percent} %, and the owner requires {least} %"
    return None


def _within(hours: str, now: datetime) -> bool:
    """Returns whether ``now`` is within ``HH:MM-HH:MM``.

    The end is exclusive, and may lie after midnight. An interval from a time to itself is all day.
    """
    start, _, end = hours.partition("-")
    text = f"{now:%H:%M}"
    if start <= end:
        return start <= text < end or start == end
    return text >= start or text < end


def hours_left_s(owner: OwnerPolicy, around: PolicyInputs = HERE) -> float | None:
    """Returns the seconds until the owner's hours end, 0 outside them; None if they never end."""
    if owner.hours is None:
        return None
    now = around.clock()
    start = now.replace(second=0, microsecond=0)
    for minutes in range(24 * 60 + 1):
        then = start + timedelta(minutes=minutes)
        if not any(_within(hours, then) for hours in owner.hours):
            return max((then - now).total_seconds(), 0.0)
    return None


def run_sessions(
    session: Callable[[Signals], None],
    owner: OwnerPolicy,
    stop: threading.Event | None = None,
    around: PolicyInputs = HERE,
) -> None:
    """Runs ``session`` whenever the owner's policy allows it, until ``stop`` is set.

    When the policy no longer allows training, the session's ``stop`` signal is set. The session
    then aborts its work between two steps and deactivates this device, so that no round waits for
    it. A new session starts when the policy allows it again.

    Args:
        session: Trains until ``stop`` of its signals is set.
        owner: The policy.
        stop: Ends everything; never set when None.
        around: Sources of time and power state.
    """
    stop = stop or threading.Event()
    while not stop.is_set():
        reason = reason_to_pause(owner, around)
        if reason is None:
            with _monitored(owner, stop, around) as signals:
                session(signals)
            continue
        log.info("paused by owner policy: %s", reason)
        while not stop.wait(around.check_interval_s) and reason_to_pause(owner, around) is not None:
            continue


@contextmanager
def _monitored(
    owner: OwnerPolicy, stop: threading.Event, around: PolicyInputs
) -> Iterator[Signals]:
    """Yields a session's signals; sets their ``stop`` when the policy or ``stop`` demands it."""
    signals = Signals()

    def look() -> None:
        while not signals.stop.wait(around.check_interval_s):
            if stop.is_set() or reason_to_pause(owner, around) is not None:
                signals.stop.set()
                signals.work.set()

    looking = threading.Thread(target=look, name="policy", daemon=True)
    looking.start()
    try:
        yield signals
    finally:
        signals.stop.set()
        looking.join()


_SMALL_BYTES = 1 << 14
"""Transfers up to this size count as small: requests without model data, and reads of a stream."""
_SOON_S = 1e-3
"""A remaining wait up to this long is skipped."""


@dataclass
class RateLimit:
    """Limits the average rate of all traffic to and from the server. Thread-safe.

    A small transfer waits only for small ones, at half of the rate: behind part of a model, which
    takes many seconds, a heartbeat would be late and the server would count the device as offline.
    A large transfer waits until the rate covers everything.
    """

    bytes_per_s: float
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep
    _free_s: float = field(default=0.0, init=False)
    """When all traffic so far is within the rate, on ``clock``."""
    _small_free_s: float = field(default=0.0, init=False)
    """When all small transfers so far are within half of the rate, on ``clock``."""
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False)

    def passed(self, count: int) -> None:
        """Counts ``count`` bytes just transferred, and blocks until the rate allows more."""
        took_s, small = count / self.bytes_per_s, count <= _SMALL_BYTES
        with self._lock:
            now = self.clock()
            self._free_s = max(self._free_s, now) + took_s
            if small:
                self._small_free_s = max(self._small_free_s, now) + 2 * took_s
                wait_s = self._small_free_s - now
            else:
                wait_s = self._free_s - now
        self.sleep(wait_s)
        while not small and (wait_s := self._free_s - self.clock()) > _SOON_S:
            self.sleep(wait_s)  # small transfers during the sleep have added to the wait


def limit_gpu(owner: OwnerPolicy) -> None:
    """Applies the owner's ``max_gpu_fraction`` to each CUDA device, and checks ``device``.

    Logs a warning where a fraction is set and torch finds no CUDA device.

    Raises:
        ConfigError: torch does not find the device that the owner sets.
    """
    import torch

    from fedcore.training.device import available

    if owner.device is not None:
        try:
            available(owner.device)
        except ConfigError:
            raise ConfigError(
                f"{owner.file}: device = {owner.device!r}, but torch finds no such device on "
                "this machine. Nothing was trained; install its driver and a torch that supports "
                "it, or set `device` to 'cpu' or 'auto'."
            ) from None
    if owner.max_gpu_fraction is None:
        return
    if not torch.cuda.is_available():
        log.warning(
            "%s: max_gpu_fraction = %g has no effect: torch finds no CUDA device on this machine",
            owner.file,
            owner.max_gpu_fraction,
        )
        return
    for index in range(torch.cuda.device_count()):
        torch.cuda.set_per_process_memory_fraction(owner.max_gpu_fraction, index)


def free_gpu() -> None:
    """Collects garbage, and returns torch's unused GPU memory to the driver."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
