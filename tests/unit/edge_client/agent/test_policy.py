from __future__ import annotations

import threading
import time
from datetime import datetime
from pathlib import Path

import pytest
import torch

from edge_client.agent.policy import (
    PolicyInputs,
    Power,
    RateLimit,
    check_task,
    hours_left_s,
    limit_gpu,
    read_power,
    reason_to_pause,
    run_sessions,
)
from edge_client.agent.wake import Signals
from fedcore.config.owner import OwnerPolicy, load_owner
from fedcore.errors import ConfigError
from fedcore.files import sha256_hex


def supply(folder: Path, name: str, **values: str) -> None:
    (folder / name).mkdir(parents=True)
    for key, value in values.items():
        (folder / name / key).write_text(value + "\n")


def laptop(folder: Path, *, mains: bool, percent: int) -> Path:
    supply(folder, "AC", type="Mains", online="1" if mains else "0")
    status = "Charging" if mains else "Discharging"
    supply(folder, "BAT0", type="Battery", status=status, capacity=str(percent))
    return folder


def at(hour: int, minute: int = 0) -> PolicyInputs:
    return PolicyInputs(clock=lambda: datetime(2026, 5, 1, hour, minute))


@pytest.mark.parametrize(
    ("hours", "moment", "within"),
    [
        (("22:00-06:00",), (23, 0), True),
        (("22:00-06:00",), (5, 59), True),
        (("22:00-06:00",), (6, 0), False),
        (("22:00-06:00",), (21, 59), False),
        (("09:00-17:00",), (9, 0), True),
        (("09:00-17:00",), (17, 0), False),
        (("01:00-02:00", "12:00-13:00"), (12, 30), True),
        (("01:00-02:00", "12:00-13:00"), (3, 0), False),
        (("08:00-08:00",), (3, 0), True),
    ],
)
def test_the_owners_hours(hours: tuple[str, ...], moment: tuple[int, int], within: bool) -> None:
    reason = reason_to_pause(OwnerPolicy(hours=hours), at(*moment))
    assert (reason is None) == within
    if reason:
        assert f"{moment[0]:02}:{moment[1]:02}" in reason


@pytest.mark.parametrize(
    ("hours", "moment", "left_s"),
    [
        (None, (12, 0), None),
        (("08:00-08:00",), (3, 0), None),
        (("22:00-06:00",), (23, 30), 6.5 * 3600),
        (("09:00-17:00",), (16, 59), 60.0),
        (("09:00-17:00",), (17, 0), 0.0),
        (("09:00-12:00", "12:00-13:00"), (11, 0), 2 * 3600.0),
    ],
)
def test_how_long_the_owners_hours_go_on(
    hours: tuple[str, ...] | None, moment: tuple[int, int], left_s: float | None
) -> None:
    assert hours_left_s(OwnerPolicy(hours=hours), at(*moment)) == left_s


@pytest.mark.parametrize("hours", ["24:00-06:00", "9-17", "09:60-10:00", "09:00"])
def test_hours_that_are_none_are_refused_when_they_are_read(tmp_path: Path, hours: str) -> None:
    path = tmp_path / "owner.toml"
    path.write_text(f'hours = ["{hours}"]\n')
    with pytest.raises(ConfigError, match="hours"):
        load_owner(path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_gpu_that_is_not_there_is_said_so_at_the_start(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ConfigError, match=r"owner\.toml: device = 'cuda', but torch finds no such"):
        limit_gpu(OwnerPolicy(device="cuda"))
    for owner in (OwnerPolicy(), OwnerPolicy(device="cpu"), OwnerPolicy(device="auto")):
        limit_gpu(owner)
    assert not caplog.records
    limit_gpu(OwnerPolicy(max_gpu_fraction=0.5))
    assert "max_gpu_fraction = 0.5 has no effect" in caplog.text


def test_power_is_read_as_linux_tells_it(tmp_path: Path) -> None:
    assert read_power(tmp_path / "none") == Power(False, None)
    assert read_power(laptop(tmp_path / "a", mains=True, percent=30)) == Power(False, 30)
    assert read_power(laptop(tmp_path / "b", mains=False, percent=30)) == Power(True, 30)
    mouse = tmp_path / "c"
    supply(mouse, "hid", type="Battery", scope="Device", status="Discharging", capacity="5")
    assert read_power(mouse) == Power(False, None)
    phone = tmp_path / "d"
    supply(phone, "battery", type="Battery", status="Discharging", capacity="70")
    supply(phone, "usb", type="USB", online="0")
    assert read_power(phone) == Power(True, 70)


def test_a_battery_below_what_the_owner_wants_rests(tmp_path: Path) -> None:
    low = PolicyInputs(power=laptop(tmp_path / "low", mains=False, percent=39))
    enough = PolicyInputs(power=laptop(tmp_path / "enough", mains=False, percent=40))
    charging = PolicyInputs(power=laptop(tmp_path / "charging", mains=True, percent=5))
    owner = OwnerPolicy(min_battery_percent=40)
    assert "39 %" in (reason_to_pause(owner, low) or "")
    assert reason_to_pause(owner, enough) is None
    assert reason_to_pause(owner, charging) is None
    assert "mains" in (reason_to_pause(OwnerPolicy(on_mains_only=True), enough) or "")
    assert reason_to_pause(OwnerPolicy(on_mains_only=True), charging) is None
    assert reason_to_pause(OwnerPolicy(), low) is None


def test_only_tasks_that_the_owner_allows_are_run(tmp_path: Path) -> None:
    task = tmp_path / "task.py"
    task.write_text("raise SystemExit('it was run')")
    check_task(OwnerPolicy(), task)
    check_task(OwnerPolicy(tasks=(sha256_hex(task.read_bytes()),)), task)
    with pytest.raises(ConfigError, match="allows 1 task, not including this one"):
        check_task(OwnerPolicy(tasks=("0" * 64,)), task)


def test_a_device_leaves_when_its_hours_end_and_comes_back_when_they_begin() -> None:
    hour = [12]
    around = PolicyInputs(clock=lambda: datetime(2026, 5, 1, hour[0]), check_interval_s=0.01)
    owner, stop = OwnerPolicy(hours=("12:00-13:00",)), threading.Event()
    events: list[str] = []

    def session(signals: Signals) -> None:
        events.append("begins")
        hour[0] = 14 if len(events) < 4 else hour[0]
        if len(events) >= 4:
            stop.set()
        assert signals.stop.wait(5)
        assert signals.work.is_set()
        events.append("ends")
        threading.Timer(0.05, lambda: hour.__setitem__(0, 12)).start()

    run_sessions(session, owner, stop, around)
    assert events == ["begins", "ends"] * 3 or events == ["begins", "ends"] * 2 + events[4:]
    assert len(events) >= 4


def test_bytes_pass_no_faster_than_the_owner_allows() -> None:
    now, slept = [0.0], list[float]()

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        now[0] += seconds

    pace = RateLimit(1_000_000, clock=lambda: now[0], sleep=sleep)
    for _ in range(10):
        pace.passed(500_000)
    assert now[0] == pytest.approx(5.0)
    now[0] += 100  # a pause is not saved up
    pace.passed(500_000)
    assert slept[-1] == pytest.approx(0.5)


def test_two_threads_share_one_rate() -> None:
    pace = RateLimit(10_000_000)
    started = time.monotonic()
    threads = [threading.Thread(target=pace.passed, args=(1_000_000,)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert time.monotonic() - started >= 0.19


def test_what_is_small_does_not_wait_for_what_is_large_and_both_keep_the_rate() -> None:
    """Or a device whose owner allows little gave no sign of life while a piece was paid for."""
    now = [1000.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds

    pace = RateLimit(300_000, clock=lambda: now[0], sleep=lambda seconds: None)
    large = threading.Thread(target=pace.passed, args=(3_000_000,), daemon=True)
    large.start()
    while not pace._free_s:
        time.sleep(0.001)
    pace.sleep = sleep
    pace.passed(3000)
    assert now[0] == pytest.approx(1000.02)
    large.join(5.0)
    assert not large.is_alive()
    assert now[0] == pytest.approx(1010.01, abs=0.01)
    for _ in range(100):  # a server that has much to say in small pieces has half of it
        pace.passed(3000)
    assert now[0] == pytest.approx(1012.0, abs=0.1)
