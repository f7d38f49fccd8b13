"""What the owner's policy says of this moment: whether this device takes part now."""

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
"""How often the clock and the battery are looked at."""
_MAX_TASK_BYTES = 16 << 20
_MAX_POWER_BYTES = 1 << 12


@dataclass(frozen=True)
class Surroundings:
    """Where a device looks for what its policy depends on."""

    clock: Callable[[], datetime] = datetime.now
    """Local time, as owners think of hours."""
    power: Path = POWER
    look_s: float = _LOOK_S


HERE = Surroundings()


@dataclass(frozen=True)
class Power:
    """What feeds a device."""

    on_battery: bool
    percent: int | None
    """Of the fullest battery; None where there is none that tells."""


def read_power(folder: Path) -> Power:
    """What Linux tells of the power supply; mains where it tells nothing, as in most servers.

    A supply that is online (mains, USB) counts as mains, whatever the battery does.
    """
    online, discharging, percents = False, False, []
    for supply in sorted(folder.iterdir()) if folder.is_dir() else []:
        kind = _value(supply / "type")
        if kind in ("Mains", "USB"):
            online |= _value(supply / "online") == "1"
        elif kind == "Battery" and _value(supply / "scope") != "Device":  # not a mouse's
            discharging |= _value(supply / "status") == "Discharging"
            percent = _value(supply / "capacity")
            percents += [int(percent)] if percent.isdecimal() else []
    return Power(discharging and not online, max(percents, default=None))


def _value(path: Path) -> str:
    """A value of sysfs; empty where there is none."""
    try:
        with path.open("rb") as stream:
            return stream.read(_MAX_POWER_BYTES).decode(errors="replace").strip()
    except OSError:
        return ""


def check_task(owner: OwnerPolicy, path: Path) -> None:
    """Refuses a task that the owner does not allow; its code has not run then.

    Raises:
        ConfigError: it is none of ``owner.tasks``.
        DataError: it cannot be read.
    """
    if owner.tasks is None:
        return
    more = "Nothing was run; name the task file that is there by --task."
    raw = read_bytes(path, max_bytes=_MAX_TASK_BYTES, what="the task", otherwise=more)
    digest = sha256_hex(raw)
    if digest not in owner.tasks:
        raise ConfigError(
            f"{path}: its SHA-256 is {digest}, and {owner.file} allows "
            f"{counted(len(owner.tasks), 'task')}, "
            "none of them this one. Nothing was run; the owner adds it to `tasks` after a look at "
            "the file, or another task is installed."
        )


def reason_to_rest(owner: OwnerPolicy, around: Surroundings = HERE) -> str | None:
    """Why this device takes no part now; None when it does."""
    if owner.hours is not None:
        now = around.clock()
        if not any(_within(hours, now) for hours in owner.hours):
            return f"it is {now:%H:%M}, and the owner's hours are {', '.join(owner.hours)}"
    if owner.on_mains_only or owner.min_battery_percent is not None:
        power = read_power(around.power)
        if power.on_battery and owner.on_mains_only:
            return "it runs on its battery, and the owner wants it to run on mains"
        least = owner.min_battery_percent
        if power.on_battery and least is not None and (power.percent or 0) < least:
            return f"its battery has {power.percent} %, and the owner wants {least} %"
    return None


def _within(hours: str, now: datetime) -> bool:
    """Whether a moment is in ``HH:MM-HH:MM``, which may go past midnight; its end is outside."""
    start, _, end = hours.partition("-")
    text = f"{now:%H:%M}"
    if start <= end:
        return start <= text < end or start == end
    return text >= start or text < end


def hours_left_s(owner: OwnerPolicy, around: Surroundings = HERE) -> float | None:
    """Seconds until the owner's hours end; None where they never do."""
    if owner.hours is None:
        return None
    now = around.clock()
    start = now.replace(second=0, microsecond=0)
    for minutes in range(24 * 60 + 1):
        then = start + timedelta(minutes=minutes)
        if not any(_within(hours, then) for hours in owner.hours):
            return max((then - now).total_seconds(), 0.0)
    return None


def take_part(
    session: Callable[[Signals], None],
    owner: OwnerPolicy,
    stop: threading.Event | None = None,
    around: Surroundings = HERE,
) -> None:
    """Runs ``session`` whenever the owner's policy allows, until ``stop`` is set.

    A session is told to end when the policy allows no more: it gives up what it has begun between
    two steps, says goodbye, so that no round waits for this device, and begins again when it may.
    """
    stop = stop or threading.Event()
    while not stop.is_set():
        reason = reason_to_rest(owner, around)
        if reason is None:
            with _watched(owner, stop, around) as signals:
                session(signals)
            continue
        log.info("rests: %s", reason)
        while not stop.wait(around.look_s) and reason_to_rest(owner, around) is not None:
            continue


@contextmanager
def _watched(owner: OwnerPolicy, stop: threading.Event, around: Surroundings) -> Iterator[Signals]:
    """Signals for a session, which end it when the policy or ``stop`` does."""
    signals = Signals()

    def look() -> None:
        while not signals.stop.wait(around.look_s):
            if stop.is_set() or reason_to_rest(owner, around) is not None:
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
"""Calls that carry no part of a model, and what passes on a stream at a time."""
_SOON_S = 1e-3
"""What is paid for so soon is not waited for."""


@dataclass
class RateLimit:
    """Keeps what passes to and from the server below a rate, over a transfer as a whole.

    What is small shares half of the rate, and waits for nothing else: behind a piece of a model,
    which is paid for in many seconds, no sign of life would leave in time, and a server would take
    the device for gone. What is large waits until everything is paid for.
    """

    bytes_per_s: float
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep
    _free_s: float = field(default=0.0, init=False)
    """When what has passed so far is paid for."""
    _small_free_s: float = field(default=0.0, init=False)
    """When the small of it is, at half of the rate."""
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False)

    def passed(self, count: int) -> None:
        """Waits for as long as ``count`` bytes that have just passed take at that rate."""
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
            self.sleep(wait_s)  # something small has passed meanwhile


def limit_gpu(owner: OwnerPolicy) -> None:
    """Bounds this process's share of each GPU's memory, and says where the owner asks for none.

    Raises:
        ConfigError: the owner pins a device that is not there.
    """
    import torch

    from fedcore.training.device import available

    if owner.device is not None:
        try:
            available(owner.device)
        except ConfigError:
            raise ConfigError(
                f"{owner.file}: device = {owner.device!r}, and torch finds no such device on this "
                "machine. Nothing was trained; install its driver and a torch that supports it, or "
                "set `device` to 'cpu' or 'auto'."
            ) from None
    if owner.max_gpu_fraction is None:
        return
    if not torch.cuda.is_available():
        log.warning(
            "%s: max_gpu_fraction = %g bounds nothing: torch finds no CUDA device here",
            owner.file,
            owner.max_gpu_fraction,
        )
        return
    for index in range(torch.cuda.device_count()):
        torch.cuda.set_per_process_memory_fraction(owner.max_gpu_fraction, index)


def free_gpu() -> None:
    """Gives back what nothing refers to any more."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
