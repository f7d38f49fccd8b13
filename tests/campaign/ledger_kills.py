"""A device that trains with privacy is killed between its noise and its release, and started again.

::

    python -m tests.campaign.ledger_kills --kills 200 --out runs/campaign/ledger_kills.json

Each life is a process of its own that answers instructions by the device's own loop, with noise
from the operating system; what it releases goes to a file in place of a server. It is told apart by
its bytes: a reply that is sent a second time costs nothing, one that was made again costs again.
After each kill the files are read as an auditor would, and what they record is compared with what
all releases so far have cost.
"""

from __future__ import annotations

import os
import random
import select
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from flwr.app import Message, RecordDict
from flwr.proto.message_pb2 import ObjectTree

from edge_client.agent import loop
from edge_client.agent.run import DeviceSetup
from edge_client.agent.wake import Signals
from edge_client.device_folder import lock_device_folder
from edge_client.ledger.view import read_ledger_files
from fedcore.config.owner import OwnerPolicy
from fedcore.config.run import RunConfig
from fedcore.crypto.kit import Kit
from fedcore.flower.fleet_pull import AnnouncedMessage
from fedcore.flower.identity import assume_identity
from fedcore.flower.quiet import quiet
from fedcore.privacy.accounting import Charge, epsilon_of
from fedcore.task.definition import load_task
from fedcore.task.model import build_model, preprocess_bytes
from fedcore.training import client as client_module
from fedcore.updates.messages import ARRAYS, CONFIG, instruction_config, weights_record
from fedcore.updates.pack import layout_of, pack
from fedcore.updates.seal import content_digest
from server.live.rounds.settings import device_settings
from tests.campaign.kills import run_kills
from tests.e2e.live.conftest import Project

RUN_ID, DELTA = 7, 1e-5
_LIFE_S = 60.0
"""The longest that a life may take to reach its noise."""


@dataclass
class Site:
    """One device, what it is asked, and what it has released."""

    root: Path
    project: Project = field(init=False)
    kit: Kit = field(init=False)

    def __post_init__(self) -> None:
        self.project = Project(self.root)
        self.kit = self.project.device("edge-0")
        self.task = load_task(self.project.task)
        self.run = RunConfig.model_validate(
            {
                "name": "killed",
                "task": "task.py",
                "federation": {"rounds": 10_000},
                "client": {"batch_size": 8},
                "privacy": {
                    "unit": "example",
                    "noise_multiplier": 1.0,
                    "max_epsilon": 1e6,
                    "target_delta": DELTA,
                    "accountant": "rdp",
                },
            }
        )
        model = build_model(self.task, self.run)
        self._layout, self._weights = layout_of(model.model), pack(model.model)
        self._preprocess = preprocess_bytes(model)
        self.released_path = self.root / "released"
        self.released_path.touch()

    def instruction(self, number: int) -> Message:
        config = instruction_config(self._layout, self._preprocess)
        config["server-round"] = number
        content = RecordDict({ARRAYS: weights_record(self._weights), CONFIG: config})
        return Message(content, 2, "train")

    def released(self) -> list[tuple[int, str]]:
        """Round and digest of each reply that left, once for each that is another."""
        lines = self.released_path.read_text().splitlines()
        return list(dict.fromkeys((int(line.split()[0]), line.split()[1]) for line in lines))


@dataclass(frozen=True)
class Link:
    """In place of a server: whatever arrives is written down, and a life ends only if it is killed.

    A line is one write to a file that is appended to: a kill leaves all of it or none.
    """

    site: Site
    node_id: int = 3

    def settings(self, run_id: int) -> dict[str, str]:
        return device_settings(self.site.run, instance="first")

    def fetch(self, found: AnnouncedMessage, *, limit_bytes: int, kept: object) -> Message:
        return found.message

    def answer(self, reply: Message) -> None:
        if reply.has_error():
            raise AssertionError(reply.error.reason)
        number = len({one for one, _ in self.site.released()}) + 1
        line = f"{number} {content_digest(reply.content)}\n".encode()
        opened = os.open(self.site.released_path, os.O_WRONLY | os.O_APPEND)
        os.write(opened, line)
        os.close(opened)


def live(site: Site, told: int) -> None:
    """Answers one instruction after the other; says 'n' for each noise that is drawn, 'r' for each
    release."""
    trained = client_module.train_private

    def training(*arguments: Any, **named: Any) -> Any:
        result = trained(*arguments, **named)
        os.write(told, b"n")
        return result

    client_module.train_private = training
    link, runs = Link(site), dict[int, Any]()
    with lock_device_folder(site.root / "device") as folder:
        device = DeviceSetup(
            site.kit, site.task, site.project.task, OwnerPolicy(max_epsilon=1e6), folder
        )
        while True:
            number = len({one for one, _ in site.released()}) + 1
            found = AnnouncedMessage(site.instruction(number), ObjectTree())
            loop._answer(device, link, Signals(), runs, found)  # type: ignore[arg-type]
            os.write(told, b"r")


def one_life(site: Site, *, rounds: int, wait_s: float) -> bool:
    """Starts a device, kills it ``wait_s`` after its noise in round ``rounds``; says whether that
    was before the release."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(reader)
            live(site, writer)
        except BaseException as error:
            (site.root / "failed").write_text(f"{type(error).__name__}: {error}")
        finally:
            os._exit(1)
    os.close(writer)
    try:
        noises = 0
        while noises < rounds:
            if not select.select([reader], [], [], _LIFE_S)[0]:
                raise AssertionError("no noise was drawn in time")
            noises += (said := os.read(reader, 1)) == b"n"
            if not said:
                raise AssertionError(f"the device ended: {(site.root / 'failed').read_text()}")
        time.sleep(wait_s)
        os.kill(child, signal.SIGKILL)
    finally:
        _, status = os.waitpid(child, 0)
    after = os.read(reader, 64)
    os.close(reader)
    if not os.WIFSIGNALED(status):
        raise AssertionError(f"the device ended: {(site.root / 'failed').read_text()}")
    return b"r" not in after


def recorded_and_released(site: Site) -> tuple[int, int, float, float]:
    """Charges on disk, replies that left, and what each come to; nothing is mended by looking."""
    found = read_ledger_files(site.root / "device", site.kit.folder, os.environ)
    if found.problems:
        raise AssertionError("; ".join(found.problems))
    charges = [one.charge for one in found.runs.get("killed", ())]
    released = len(site.released())
    epsilon = partial(epsilon_of, target_delta=DELTA, accountant="rdp")
    # All charges here are alike: each release costs one of them.
    cost = epsilon(charges[:1] * released) if charges else float("inf") * bool(released)
    return len(charges), released, epsilon(charges), cost


def kill_often(root: Path, kills: int, *, seed: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Kills a device until so many kills fell between noise and release.

    How long that takes depends on the machine's other work, so the longest wait follows it: most
    kills come before the release, spread over all that lies there, and some after it.
    """
    assume_identity(RUN_ID)
    _import_what_a_life_needs()
    site, rng = Site(root), random.Random(seed)
    between = others = under_reported = 0
    longest_s = 0.05
    started = time.monotonic()
    while between < kills:
        before = one_life(site, rounds=rng.randint(1, 2), wait_s=rng.uniform(0, longest_s))
        between, others = between + before, others + (not before)
        longest_s = min(5.0, max(0.01, longest_s * (1.2 if before else 0.6)))
        say(f"{between} of {kills}, {others} after a release; the next within {longest_s:.2f} s")
        charges, released, recorded, cost = recorded_and_released(site)
        if charges < released or recorded < cost:
            under_reported += 1
            say(f"kill {between + others}: {charges} charges for {released} releases")
    rounds = len({number for number, _ in site.released()})
    return {
        "kills_between_noise_and_release": between,
        "kills_after_a_release": others,
        "under_reported": under_reported,
        "rounds": rounds,
        "releases": released,
        "charges": charges,
        "epsilon_recorded": recorded,
        "epsilon_released": cost,
        "seconds": round(time.monotonic() - started, 1),
    }


def _import_what_a_life_needs() -> None:
    """Once, before any life: a first optimiser has torch import for seconds."""
    torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])
    epsilon_of([Charge(1, 1.0, 1 / 3, 3)], target_delta=DELTA, accountant="rdp")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the campaign; 1 if a ledger ever recorded less than was released."""
    quiet()

    def counted_apart(root: Path, kills: int, **options: Any) -> dict[str, Any]:
        os.environ["XDG_STATE_HOME"] = str(root / "counts")
        return kill_often(root, kills, **options)

    return run_kills(
        counted_apart,
        name="ledger_kills",
        description=__doc__,
        kills=200,
        faults="under_reported",
        arguments=arguments,
    )


if __name__ == "__main__":
    sys.exit(main())
