"""What is done to servers, devices, networks and disks; each leaves a result to be compared."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path

from server.live.journal.head import HEAD, JOURNAL, RECORDS
from server.live.journal.journal import ACCEPTED, ACCEPTING, COMMITTED, POINTS
from tests.campaign import device_main
from tests.campaign.proxy import Proxy
from tests.campaign.server_main import SENT
from tests.campaign.site import BEHIND, NAMES, Site, Started

_GOES_ON = (ACCEPTED, COMMITTED)
_OFTEN = (SENT, ACCEPTING, ACCEPTED)
"""Points that a round passes several times."""
_AUTHENTICATED = "authenticated as node"


@dataclass
class Outcome:
    """What a scenario measured and found, beside the run's result."""

    counts: dict[str, int] = field(default_factory=dict)
    listening_s: list[float] = field(default_factory=list)
    """From the start of a new server's process until its ports were open."""
    answered_s: list[float] = field(default_factory=list)
    """Until the first device was let in."""
    asked_s: list[float] = field(default_factory=list)
    """Until devices were asked for what the interrupted round lacked, if it lacked anything."""
    resumed_s: list[float] = field(default_factory=list)
    """Until the interrupted round went on: an update was accepted in it, or it was committed."""
    resumed_cpu_s: list[float] = field(default_factory=list)
    """CPU that the process took until then, which does not depend on who else uses the machine."""
    back_s: list[float] = field(default_factory=list)
    """From the start of a new device's process until it was let in."""
    held_up_s: dict[str, list[float]] = field(default_factory=dict)
    """From a device's end until its round was over without it, by how it ended."""
    wrong: list[str] = field(default_factory=list)

    def note(self, what: str) -> None:
        self.counts[what] = self.counts.get(what, 0) + 1


Enough = Callable[[], bool]
"""Whether the time for faults is over."""


def undisturbed(place: Site) -> Outcome:
    place.devices()
    _finish(place.server())
    return Outcome()


def _finish(server: Started, code: int = 0) -> None:
    found = server.end()
    if found != code:
        raise AssertionError(f"exit {found}, expected {code}: {server.tail()}")


def _measure(server: Started, outcome: Outcome) -> None:
    """Waits until a round goes on, or the server has ended; notes how long that took."""
    first = server.until(lambda: server.said(*_GOES_ON), dead=True)
    if not first:
        return
    moment, words = first[0]
    outcome.resumed_s.append(moment - server.born)
    outcome.resumed_cpu_s.append(float(words[-1]))
    outcome.listening_s.append(server.logged("listening on")[0] - server.born)
    outcome.asked_s += [asked - server.born for asked, _ in server.said(SENT)[:1] if asked < moment]
    # A round whose replies are all in the journal goes on before any device is back.
    outcome.answered_s += [came - server.born for came, _ in server.said("arrived")[:1]]


def _killed(one: Started) -> bool:
    """Whether a process died as it was told; False when it ended well before."""
    one.end()
    if one.process.returncode == 0:
        return False
    if one.process.returncode != -signal.SIGKILL:
        raise AssertionError(f"exit {one.process.returncode}: {one.tail()}")
    return True


def kill_servers(place: Site, kills: int, rng: random.Random, enough: Enough) -> Outcome:
    """Half at points of the journal, half at moments spread evenly over a round or a start."""
    outcome, devices = Outcome(), place.devices()
    points = cycle(rng.sample([*POINTS, SENT], len(POINTS) + 1))
    for number in range(kills + 1):
        last = number == kills or enough()
        how, die = ("", "") if last else _death(number, points, rng)
        server = place.server("--resume", die=die)
        if how == _STARTING:
            time.sleep(rng.uniform(0, 2.0))
        else:
            _measure(server, outcome if number else Outcome())  # the first resumes nothing
        if last:
            _finish(server)
            break
        if how == _ANY_TIME:
            time.sleep(rng.uniform(0, 4 * place.slow_s))  # training, and what a round costs beside
        if not die:
            server.kill()
        if not _killed(server):
            break  # every round was over before its time came
        outcome.note(f"server killed {how}")
        for name, device in devices.items():
            if device.process.poll() is not None:
                raise AssertionError(f"{name} ended: {device.tail()}")
    return outcome


_STARTING, _ANY_TIME = "while it started", "at any time"


def _death(number: int, points: Iterator[str], rng: random.Random) -> tuple[str, str]:
    """How a server dies, in words, and as it is told."""
    if number % 2 == 0:
        point = next(points)
        # Past the first update, so that the start is measured; now and then at once, too.
        nth = 1 if rng.random() < 0.15 else rng.randint(2, 4 if point in _OFTEN else 2)
        return f"at {point}", f"{point}:{nth}"
    return (_STARTING if number % 16 == 15 else _ANY_TIME), ""


def kill_devices(place: Site, kills: int, rng: random.Random, enough: Enough) -> Outcome:
    """Each at a moment spread over rounds, and then where it writes or sends; started at once."""
    outcome, devices = Outcome(), place.devices()
    points = cycle(rng.sample(device_main.POINTS, len(device_main.POINTS)))
    server = place.server("--resume")
    server.until(lambda: server.said(*_GOES_ON))
    point = ""
    for number in range(kills):
        name = NAMES[number // 2 % len(NAMES)]
        one = devices[name]
        if point:
            one.until(lambda: server.process.poll() is not None, dead=True)
        else:
            time.sleep(rng.uniform(0, 4 * place.slow_s))
        if server.process.poll() is not None:
            break  # every round was over before its time came
        one.kill()
        outcome.note(f"device killed: {point or 'at any time'}")
        last = number + 1 == kills or enough()
        point = next(points) if not point and not last else ""
        again = devices[name] = place.device(name, die=f"{point}:1" if point else "")
        _note_back(again, outcome)
        if last:
            break
    _finish(server)
    return outcome


def _note_back(device: Started, outcome: Outcome) -> None:
    device.until(lambda: device.logged(_AUTHENTICATED), dead=True)
    outcome.back_s.append(device.logged(_AUTHENTICATED)[0] - device.born)


def bury_devices(place: Site, times: int, rng: random.Random, enough: Enough) -> Outcome:
    """A device dies, stops or is cut off while its round waits for it, which ends without it.

    The quorum is two of three, and the first device is behind a proxy.
    """
    outcome, name = Outcome(), NAMES[0]
    with Proxy("127.0.0.1", BEHIND, (place.project.port, place.wake_port)) as proxy:
        devices = place.devices()
        server = place.server("--resume")
        for number in range(3 * times):
            if enough():
                break
            begun = len(server.said(SENT))
            server.until(lambda begun=begun: len(server.said(SENT)) > begun)  # nobody has answered
            over, one = len(server.said(COMMITTED)), devices[name]
            time.sleep(rng.uniform(0, place.slow_s / 2))
            how, ended = _ENDS[number % len(_ENDS)], time.time()
            if how == "killed":
                one.kill()
            elif how == "stopped":
                one.process.send_signal(signal.SIGSTOP)
            else:
                proxy.mode = "drop"
            server.until(lambda over=over: len(server.said(COMMITTED)) > over)
            outcome.held_up_s.setdefault(how, []).append(server.said(COMMITTED)[over][0] - ended)
            outcome.note(f"device {how} in its round")
            if how == "killed":
                devices[name] = place.device(name)
                _note_back(devices[name], outcome)
            elif how == "stopped":
                one.process.send_signal(signal.SIGCONT)
            else:
                proxy.mode = "pass"
                proxy.cut()
        _finish(server)
    return outcome


_ENDS = ("killed", "stopped", "cut off silently")


def kill_finishing(place: Site, kills: int, rng: random.Random, enough: Enough) -> Outcome:
    """The server, or a process that fine-tunes, dies after the rounds; one release comes of it."""
    outcome, _ = Outcome(), place.devices()
    for number in range(kills + 1):
        server = place.server("--resume")
        if number == kills or enough():
            _finish(server)
            break
        begun = server.until(
            lambda server=server: "stage_started" in server.log.read_text(), dead=True
        )
        time.sleep(rng.uniform(0, 2.0))
        below = server.below()
        if begun and below and number % 2:
            os.kill(rng.choice(below), signal.SIGKILL)
            what, code = "a process of its", server.end()
        else:
            server.kill()
            what, code = "server", server.end()
        if code == 0:
            break  # it was over before
        outcome.note(f"{what} killed after the rounds")
        end = time.monotonic() + 10.0
        while left := [pid for pid in below if _lives(pid)]:
            if time.monotonic() > end:
                raise AssertionError(f"processes {left} outlived their server")
            time.sleep(0.1)
    found = place.published()
    if len(found) != 1:
        outcome.wrong.append(f"{len(found)} models were released, expected one")
    return outcome


def _lives(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


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
    with Proxy("127.0.0.1", BEHIND, ports) as proxy:
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
            if server.process.poll() is not None:
                raise AssertionError(f"the run was over before {mode}: {server.tail()}")
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
    names = cycle([JOURNAL, f"{JOURNAL}-wal", HEAD, RECORDS, "a value"])
    harms: Iterator[Callable[[Path, random.Random], None]] = cycle([*[_truncate] * 5, *[_flip] * 5])
    for _ in range(times):
        server = place.server("--resume", die=f"{ACCEPTED}:{rng.randint(1, 5)}")
        if not _killed(server):
            raise AssertionError(f"the run was over: {server.tail()}")
        name, harm = next(names), next(harms)
        path = journal / name
        if name == "a value":
            path = rng.choice(sorted((journal / "values").iterdir()))
        if not path.exists() or not path.stat().st_size:
            continue
        backup = place.root / "backup"
        shutil.rmtree(backup, ignore_errors=True)
        shutil.copytree(journal, backup)
        harm(path, rng)
        what = f"{name}: {'cut short' if harm is _truncate else 'changed'}"
        server = place.server("--resume")
        if not server.until(lambda server=server: server.said(*_GOES_ON), dead=True):
            # The rounds that are kept may share a value; whoever is told so has a backup.
            if name != "a value" or "No round's weights are intact" not in server.tail():
                raise AssertionError(f"{what}: exit {server.end()}: {server.tail()}")
            what = f"{what}, said so, and restored from a backup"
            shutil.rmtree(journal)
            shutil.copytree(backup, journal)
        server.kill()
        outcome.note(what)
    _finish(place.server("--resume"))
    return outcome


def fill_disks(place: Site, times: int) -> Outcome:
    """No file may grow past what the journal's next value needs; then there is room again."""
    outcome = Outcome()
    place.devices()
    for _ in range(times):
        _killed(place.server("--resume", die=f"{ACCEPTED}:3"))
        full = place.server("--resume", "--largest-file", "100000")
        end = time.monotonic() + 20.0
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
    """Clocks of devices, or the server's, are off by what the site says."""
    place.devices()
    _finish(place.server("--resume"))
    outcome = Outcome()
    if place.clock_off_s:
        outcome.note(f"clocks of devices off by {place.clock_off_s:+g} s")
    if place.server_clock_off_s:
        outcome.note(f"clock of the server off by {place.server_clock_off_s:+g} s")
    return outcome
