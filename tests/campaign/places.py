"""Where files lie that somebody may remove or change: a publisher with a device, an authority, a
server with an interrupted run, and a device that trains; and the commands that read them."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from edge_client.device_folder import DeviceFolder, lock_device_folder
from edge_client.ledger.book import MARK, count_path
from edge_client.ledger.ledger import DeviceLedger
from fedcore.cli import main
from fedcore.config.owner import OPEN_POLICY, OwnerPolicy
from fedcore.config.run import Privacy, RunConfig
from fedcore.config.settings import load_run
from fedcore.crypto.kit import REQUEST, load_kit
from fedcore.errors import FedcoreError
from fedcore.files import sha256_hex
from fedcore.flower.identity import assume_identity
from fedcore.flower.records import record_bytes
from fedcore.observability.foreign import say
from fedcore.privacy.accounting import Charge
from fedcore.privacy.ledger import Ledger, ledger_in, put_ledger
from fedcore.task.definition import load_task
from fedcore.task.model import build_model
from fedcore.updates.messages import Update, update_content
from fedcore.updates.pack import layout_of
from server.live.journal.journal import create
from server.live.operators.drained import write_drained
from server.operator_log import AUDIT, Audit
from server.report.folder import restore_mark
from server.rounds.checkpointing.run_identity import identity_of
from server.rounds.cohort import Cohort
from server.rounds.strategies.flower import make_strategy
from server.rounds.strategies.state import strategy_state_of
from tests.adversarial.conftest import World, initialised
from tests.campaign.harms import Command
from tests.e2e.live.conftest import TASK, Project
from tests.unit.server.live.journal.journals import answer, asked, progress, record
from tests.unit.server.provision.conftest import Desk

_RUN = """
name = "trial"
task = "task.py"
seed = 1

[federation]
rounds = 9
cohort = 3
"""
_LARGE = 20_000
"""Weights: so many that a journal has them in files of their own."""


@dataclass(frozen=True)
class Place:
    """A folder to do harm in."""

    name: str
    build: Callable[[Path], None]
    parts: dict[str, tuple[Command, ...]]
    """The folders whose files are harmed, one after the other, and what is run then."""

    def files(self, root: Path, part: str) -> Iterator[Path]:
        """Its files, relative to ``root``; a link's target stands where it lies itself."""
        for path in sorted((root / part).rglob("*")):
            if path.is_file() and not path.is_symlink():
                yield path.relative_to(root)


def verb(*words: str, until: str = "") -> Command:
    """A command line of fedcore's."""
    name = " ".join(word for word in words[:2] if not word.startswith("-"))
    return Command(name, lambda: main(words), until)


def _typed(work: Callable[[], object]) -> Callable[[], int]:
    """What a verb does around a call of the library's."""

    def worked() -> int:
        try:
            say(json.dumps(work()))
        except FedcoreError as error:
            say(f"{type(error).__name__}: {error}", to=sys.stderr)
            return error.exit_code
        return 0

    return worked


def _build_releases(root: Path) -> None:
    world = initialised(root)
    world.publish(1.0)
    world.update()
    world.publish(2.0)
    (root / "x.json").write_text("[[1, 0, 0]]")


def _publish() -> object:
    return World(Path()).publish(3.0).version


_REPOSITORY = ("--repository", "repository", "--keys", "keys", "--json")
_STORE = ("--store", "store", "--json")
_MODEL = ("--model", "digits")
_UPDATE = verb("device", "update", *_STORE, *_MODEL, "--repository", "repository")
RELEASES = Place(
    "releases",
    _build_releases,
    {
        "repository": (
            verb("release", "list", *_REPOSITORY),
            verb("release", "refresh", *_REPOSITORY),
            Command("publish", _typed(_publish)),
            _UPDATE,
        ),
        "keys": (
            verb("release", "list", *_REPOSITORY),
            verb("release", "refresh", *_REPOSITORY, "--offline"),
            Command("publish", _typed(_publish)),
        ),
        "store": (
            verb("device", "status", *_STORE),
            verb("device", "infer", *_STORE, *_MODEL, "--input", "x.json"),
            _UPDATE,
        ),
    },
)


def _build_authority(root: Path) -> None:
    desk = Desk(root / "authority")
    object.__setattr__(desk.act, "now", datetime.now(UTC).replace(microsecond=0))
    desk.begin()
    desk.certify("edge-0")
    desk.certify("edge-1")
    desk.holder(root / "holder", "anna", "operator")
    (root / "kit").mkdir()
    main(["client", "enrol", "edge-2", "--kit", str(root / "kit")])
    shutil.copy(root / "kit" / REQUEST, root / "new.pem")


_AUTHORITY = ("--authority", "authority", "--json")
AUTHORITY = Place(
    "authority",
    _build_authority,
    {
        "authority": (
            verb("provision", "list", *_AUTHORITY),
            verb("provision", "revoke", *_AUTHORITY, "edge-0"),
            verb("provision", "device", *_AUTHORITY, "edge-2", "--request", "new.pem"),
            verb("provision", "backup", *_AUTHORITY, "backup.sealed"),
            verb("doctor", "--identity", "authority/server"),
        ),
    },
)


def _build_server(root: Path) -> None:
    project = Project(root)
    project.task.write_text(TASK.replace("WEIGHTS = 0", f"WEIGHTS = {_LARGE}"))
    for number in range(3):
        project.device(f"edge-{number}")
    (root / "run.toml").write_text(_RUN)
    run = load_run(root / "run.toml")
    with closing(Audit(root / "server" / AUDIT)) as audit:
        audit.record(by="uid 0", action="start")
        audit.record(by="uid 0", action="pause")
    write_drained(root / "server", ["edge-2"])
    project.server().roster()  # whose version it notes
    folder = root / "runs" / "trial"
    restore_mark(folder, run)
    journal = folder / "journal"
    assume_identity(1)
    task = load_task(project.task)
    size = layout_of(build_model(task, run).model).size
    chosen = make_strategy("FedAvg", {}, cohort=3, size=size)
    same = {"preprocess": b"", "strategy": strategy_state_of(chosen.strategy)}
    with closing(create(journal, identity_of(run, OPEN_POLICY))) as begun:
        begun.commit(progress(0, size, **same), None)
        for number in (1, 2):
            begun.record_cohort("train", Cohort([5, 6], dict.fromkeys([5, 6], 7)))
            begun.accept(answer(asked(5), number, size))
            begun.commit(progress(number, size, **same), record(number))


_START = verb(
    *("server", "start", "run.toml", "--resume", "--identity", "server", "--json"),
    *("--listen", "127.0.0.1:0"),
    until="Resumed after round",
)
_DOCTOR = verb("doctor", "--identity", "server", "--json")
SERVER = Place(
    "server",
    _build_server,
    {
        "server": (_START, _DOCTOR),
        "runs": (_START, verb("server", "rollback", "1", "run.toml", "--identity", "server")),
    },
)


def _build_device(root: Path) -> None:
    assume_identity(1)
    project = Project(root)
    project.device("edge-0")
    os.environ["XDG_STATE_HOME"] = str(root / "counts")
    for run, times in (("one", 3), ("two", 2)):
        _charge(root, run, times)


def _charge(root: Path, run: str, times: int) -> None:
    kit = load_kit(root / "edge-0")
    with lock_device_folder(kit.folder / "device") as folder:
        folder.was_admitted(kit.public)
        folder.record_admission(kit.public)
        ledger, state = _ledger(root, run), folder.state(run)
        ledger.open(state)
        for _ in range(times):
            before = ledger_in(state).charges
            put_ledger(state, Ledger((*before, Charge(len(before) + 1, 1.2, 0.1, 10))))
            ledger.commit(state)
            update = Update(np.ones(5, np.float32), 3, {"train_loss": 0.5})
            folder.store_reply(run, state, f"{run}{len(before)}", update_content(update))


def _ledger(root: Path, run: str) -> DeviceLedger:
    kit = load_kit(root / "edge-0")
    counted = count_path(kit.public, os.environ)
    privacy = Privacy(unit="example", max_epsilon=1e6)
    config = RunConfig(name=run, task="task.py", privacy=privacy)
    folder = DeviceFolder(kit.folder / "device")
    return DeviceLedger(folder, kit.folder / MARK, counted, config, OwnerPolicy(), None)


def _opened() -> object:
    """What a device knows before it answers: whose it is, what it has spent, what it answered."""
    os.environ["XDG_STATE_HOME"] = str(Path("counts").absolute())
    kit = load_kit(Path("edge-0"))
    ledger = _ledger(Path(), "one")
    with lock_device_folder(kit.folder / "device") as folder:
        before = folder.was_admitted(kit.public)
        folder.record_admission(kit.public)
        state = folder.state("one")
        others = ledger.open(state)
        replies = {key: folder.reply(key, state) for key in ("one0", "one1", "one2")}
        return {
            "let in": before,
            "spent": [charge.round for charge in ledger_in(state).charges],
            "others": len(others.charges),
            "replies": {
                key: None if one is None else sha256_hex(record_bytes(one))[:8]
                for key, one in replies.items()
            },
        }


DEVICE = Place(
    "device",
    _build_device,
    {
        "edge-0": (Command("a device's state", _typed(_opened)),),
        "counts": (Command("a device's state", _typed(_opened)),),
    },
)
PLACES = (RELEASES, AUTHORITY, SERVER, DEVICE)
