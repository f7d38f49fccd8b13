"""A file of a server or a device that runs is damaged, and put back once it was noticed, or not."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

from server.live.journal.head import HEAD, RECORDS
from server.live.journal.journal import COMMITTED
from tests.campaign.harms import HARMS
from tests.campaign.scenarios import Outcome
from tests.campaign.site import NAMES, Site, Started

_CODES = range(2, 12)
_HARMS = ("pipe", "gone", "empty", "loop")
Files = Callable[[Site], list[Path]]


def _named(folder: str, *names: str) -> Files:
    return lambda place: [place.root / folder / name for name in names]


OF_SERVER: dict[str, Files] = {
    "roster": _named("server", "roster.json"),
    "kit": _named("server", "kit.json"),
    "key": _named("server", "key.pem"),
    "audit log": _named("server", "audit.jsonl"),
    "journal's copy": _named("runs/trial/journal", HEAD),
    "records' copy": _named("runs/trial/journal", RECORDS),
    "a value": lambda place: sorted((place.folder / "journal" / "values").iterdir()),
}
OF_DEVICE: dict[str, Files] = {
    "kit": _named(NAMES[0], "kit.json"),
    "key": _named(NAMES[0], "key.pem"),
    "a reply": lambda place: sorted((place.root / f"{NAMES[0]}-data" / "spool").glob("*.reply")),
}


def damage_in_use(place: Site, rng: random.Random) -> Outcome:
    """Rounds go on, or whoever met the damage ends with a documented code and one sentence.

    What was damaged is put back then; the run comes to the bits that an undisturbed one gives.
    """
    outcome, devices = Outcome(), place.devices()
    server = place.server("--resume")
    for who, files in (("server", OF_SERVER), ("device", OF_DEVICE)):
        for name, found in files.items():
            if server.process.poll() == 0:
                return outcome
            server.until(lambda server=server: server.said(COMMITTED))
            there = [path for path in found(place) if path.is_file()]
            if not there:
                continue
            path, harm = there[-1], rng.choice(_HARMS)
            backup = place.root / "whole"
            shutil.copy2(path, backup)
            HARMS[harm](path)
            before = len(server.said(COMMITTED))
            one = server if who == "server" else devices[NAMES[0]]
            ended = not _goes_on(server, one, before)
            outcome.note(f"{who}: {name}: {harm}: {'ended, and said why' if ended else 'went on'}")
            _put_back(backup, path)
            if ended and who == "server":
                server = place.server("--resume")
            elif ended:
                devices[NAMES[0]] = place.device(NAMES[0])
    # A log that was put back is no more the one that a server writes to: it says so as it ends.
    if server.end() not in (0, *_CODES) or "Traceback" in server.tail():
        raise AssertionError(f"exit {server.process.returncode}: {server.tail()}")
    again = place.server("--resume")
    if again.end() != 0:
        raise AssertionError(f"exit {again.process.returncode}: {again.tail()}")
    return outcome


def _goes_on(server: Started, one: Started, before: int) -> bool:
    """Waits for two further rounds, or for the end of the one whose file was damaged."""

    def done() -> bool:
        return len(server.said(COMMITTED)) >= before + 2 or one.process.poll() is not None

    server.until(done, dead=True)
    code = one.process.poll()
    if code in (None, 0):
        return True
    said = one.tail()
    if code not in _CODES or "Traceback" in said:
        raise AssertionError(f"exit {code}: {said}")
    return False


def _put_back(backup: Path, path: Path) -> None:
    new = path.with_name(f".{path.name}.whole")
    shutil.copy2(backup, new)
    if path.is_dir():
        path.rmdir()
    new.replace(path)
