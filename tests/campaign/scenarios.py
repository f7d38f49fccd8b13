"""What is done to servers, devices, networks and disks; each leaves a result to be compared."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count, cycle
from pathlib import Path
from typing import Any

from server.journal import ACCEPTED, COMMITTED, POINTS
from server.journal_head import HEAD, JOURNAL
from tests.campaign.proxy import Proxy
from tests.campaign.site import NAMES, PATIENCE_S, Site, Started

SENT = "sent"
_GOES_ON = (ACCEPTED, COMMITTED)


@dataclass
class Outcome:
    """What a scenario measured and found, beside the run's result."""

    counts: dict[str, int] = field(default_factory=dict)
    resumed_s: list[float] = field(default_factory=list)
    """From the start of a new server's process until a round went on in it."""
    imports_s: list[float] = field(default_factory=list)
    """The part of it that imports took."""
    back_s: list[float] = field(default_factory=list)
    """From the start of a new device's process until it was let in."""
    wrong: list[str] = field(default_factory=list)

    def note(self, what: str) -> None:
        self.counts[what] = self.counts.get(what, 0) + 1


def undisturbed(place: Site) -> Outcome:
    place.devices()
    _finish(place.server())
    return Outcome()


def _finish(server: Started, code: int = 0) -> None:
    found = server.end()
    if found != code:
        raise AssertionError(f"exit {found}, expected {code}: {server.tail()}")


def _measure(server: Started, outcome: Outcome) -> bool:
    """Waits until a round goes on; False when the server ended first."""
    first = server.until(lambda: server.said(*_GOES_ON), dead=True)
    if not first:
        return False
    outcome.resumed_s.append(first[0][0] - server.born)
    ((_, words),) = server.said("imported")
    outcome.imports_s.append(float(words[1]))
    return True


def kill_servers(place: Site, kills: int, rng: random.Random) -> Outcome:
    """Half at points of the journal in turn, half at moments spread evenly over a round."""
    outcome = Outcome()
    devices = place.devices()
    points: Iterator[str] = cycle([*POINTS, SENT])
    round_s = 4 * place.slow_s  # training and evaluation, and what they cost beside
    resumed = False
    for number in count():
        last = number >= kills
        at_point = not last and number % 2 == 0
        point = next(points) if at_point else ""
        # Past the first update, so that each start is measured; now and then at once, too.
        nth = 1 if number % 8 == 6 else rng.randint(2, 4)
        server = place.server("--resume", die=f"{point}:{nth}" if at_point else "")
        if _measure(server, outcome) and not resumed:
            outcome.resumed_s.pop()  # that was the first start
            outcome.imports_s.pop()
        resumed = True
        if last:
            _finish(server)
            break
        if at_point:
            server.end()
        else:
            time.sleep(rng.uniform(0, round_s))
            server.kill()
        if server.process.returncode == 0:
            outcome.wrong.append(f"the run was over after {number} of {kills} kills")
            break
        if server.process.returncode != -signal.SIGKILL:
            raise AssertionError(f"exit {server.process.returncode}: {server.tail()}")
        outcome.note(f"server killed at {point}" if at_point else "server killed at any time")
        for name, device in devices.items():
            if device.process.poll() is not None:
                raise AssertionError(f"{name} ended: {device.tail()}")
    return outcome


def kill_devices(place: Site, kills: int, rng: random.Random) -> Outcome:
    """One after the other, at moments spread over rounds; each is started again at once."""
    outcome, devices = Outcome(), place.devices()
    server = place.server("--resume")
    server.until(lambda: server.said(*_GOES_ON))
    for number in range(kills):
        name = NAMES[number % len(NAMES)]
        time.sleep(rng.uniform(0, 4 * place.slow_s))
        if server.process.poll() is not None:
            outcome.wrong.append(f"the run was over after {number} of {kills} kills")
            break
        devices[name].kill()
        outcome.note("device killed")
        again = devices[name] = place.device(name)
        again.until(lambda again=again: "activated as node" in again.log.read_text())
        outcome.back_s.append(time.time() - again.born)
    _finish(server)
    return outcome


def stop_and_go_on(place: Site, rng: random.Random) -> Outcome:
    """SIGSTOP for longer than a server waits, and SIGCONT: a device, then the server."""
    outcome, devices = Outcome(), place.devices()
    server = place.server("--resume")
    for stopped, seconds in ((devices[NAMES[0]], 9.0), (server, 6.0), (devices[NAMES[1]], 2.0)):
        server.until(lambda: server.said(*_GOES_ON))
        time.sleep(rng.uniform(0, 2 * place.slow_s))
        stopped.process.send_signal(signal.SIGSTOP)
        time.sleep(seconds)
        stopped.process.send_signal(signal.SIGCONT)
        outcome.note("stopped and went on")
    _finish(server)
    return outcome


def bad_network(place: Site, rng: random.Random) -> Outcome:
    """Between devices and server everything goes through a proxy that cuts, drops and repeats."""
    outcome = Outcome()
    ports = (place.project.port, place.wake_port)
    with Proxy("127.0.0.1", place.server_host, ports) as proxy:
        place.devices()
        server = place.server("--resume")
        server.until(lambda: server.said(*_GOES_ON))
        for mode in ("cut", "drop", "delay", "double", "cut", "drop"):
            if mode != "cut":
                proxy.mode = mode
                time.sleep(7.0 if mode == "drop" else 2.0)
            if mode in ("cut", "drop", "double"):
                proxy.cut()
            if mode == "double":
                time.sleep(2.0)  # what is opened now is doubled
            proxy.mode = "pass"
            outcome.note(f"network: {mode}")
            time.sleep(rng.uniform(0.2, 1.0))
        _finish(server)
    return outcome


def _truncate(path: Path, rng: random.Random) -> None:
    path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size)])


def _flip(path: Path, rng: random.Random) -> None:
    raw = bytearray(path.read_bytes())
    for _ in range(8):
        raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
    path.write_bytes(raw)


def tear_journals(place: Site, times: int, rng: random.Random) -> Outcome:
    """After a kill, a file of the journal is cut short or changed, and the run goes on."""
    outcome = Outcome()
    place.devices()
    journal = place.folder / "journal"
    harms: Iterator[Callable[[Path, random.Random], None]] = cycle([_truncate, _flip])
    names = cycle([JOURNAL, f"{JOURNAL}-wal", HEAD, "a value"])
    for number in range(times):
        server = place.server("--resume", die=f"{ACCEPTED}:{rng.randint(1, 5)}")
        server.end()
        if server.process.returncode != -signal.SIGKILL:
            raise AssertionError(f"exit {server.process.returncode}: {server.tail()}")
        name = next(names)
        path = journal / name
        if name == "a value":
            path = rng.choice(sorted((journal / "values").iterdir()))
        if number % 4 == 0 or number % 4 == 3:
            harm = next(harms)
        if path.exists() and path.stat().st_size:
            harm(path, rng)
            outcome.note(f"torn: {name}")
    _finish(place.server("--resume"))
    return outcome


def fill_disks(place: Site, times: int) -> Outcome:
    """No file may grow past what the journal's next value needs; then there is room again."""
    outcome = Outcome()
    place.devices()
    for _ in range(times):
        server = place.server("--resume", die=f"{ACCEPTED}:3")
        server.end()
        full = place.server("--resume", "--largest-file", "100000")
        end = time.monotonic() + 12.0
        while full.process.poll() is None and time.monotonic() < end:
            time.sleep(0.05)
        if full.process.poll() is None:
            outcome.note("disk full: the round waited for room")
            full.kill()
        elif full.process.returncode == 7:
            outcome.note("disk full: the server stopped and said so")
        else:
            raise AssertionError(f"exit {full.process.returncode}: {full.tail()}")
    _finish(place.server("--resume"))
    return outcome


def wrong_clocks(place: Site) -> Outcome:
    """Devices whose clocks are off by what the site says."""
    place.devices()
    _finish(place.server("--resume"))
    outcome = Outcome()
    outcome.note(f"clock off by {place.clock_off_s:+g} s")
    return outcome


def compare(found: dict[str, Any], expected: dict[str, Any], rounds: int) -> list[str]:
    """What is wrong with a run's result; empty where it is what an undisturbed run gives."""
    wrong = []
    if found["model"] != expected["model"]:
        wrong.append("the model's bits differ from those of an undisturbed run")
    numbers = [one["round"] for one in found["rounds"]]
    if numbers != list(range(1, rounds + 1)):
        wrong.append(f"rounds {numbers}: one was lost, or counted twice")
    for one in found["rounds"]:
        if one["updates"] != len(NAMES) or one["failed"]:
            wrong.append(f"round {one['round']}: {one['updates']} updates, {one['failed']} failed")
    if [one["metrics"] for one in found["rounds"]] != [
        one["metrics"] for one in expected["rounds"]
    ]:
        wrong.append("metrics differ from those of an undisturbed run")
    for name, charged in found["charged"].items():
        if not set(range(1, rounds + 1)) <= set(charged):
            wrong.append(f"{name}: its ledger lacks rounds: {charged}")
    return wrong


def extra_charges(found: dict[str, Any], rounds: int) -> int:
    """How many charges devices made beyond one for each round."""
    return sum(len(charged) - rounds for charged in found["charged"].values())


__all__ = ["PATIENCE_S", "Outcome", "compare", "extra_charges"]
