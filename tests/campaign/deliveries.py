"""Attacks on delivery, and updates that are killed.

::

    python -m tests.campaign.deliveries --attacks 1000 --kills 200

A seed gives the attack. None may make a device serve anything but a version that was published for
it, and never an older one than it had; each refusal is an error of fedcore's.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

from edge_client.delivery import network, resuming
from edge_client.delivery import store as installed
from edge_client.delivery.network import DeliveryEndpoint, DeliveryLink
from fedcore.errors import FedcoreError
from fedcore.files import write_json
from server.release.registry.keys import ONLINE
from tests.adversarial.conftest import World, initialised
from tests.campaign.hostile_delivery import Behaviour, hostile
from tests.delivering import HOST, Delivering

CACHES = ("models", "incoming", "trust/metadata")


@dataclass
class Scene:
    """A device with version 2, a publisher with version 3, and what a thief may have."""

    world: World
    old: Path
    """The repository when version 1 was current."""
    foreign: Path
    """Another publisher's repository, with later versions."""
    stolen: Path
    """A repository with later versions, of keys that were replaced since; the device knows."""
    link: DeliveryLink
    behaviour: Behaviour
    now: datetime | None = None

    def reset(self) -> None:
        shutil.rmtree(self.world.store, ignore_errors=True)
        shutil.copytree(self.world.folder / "saved", self.world.store, symlinks=True)
        self.behaviour.repository = self.world.repository
        self.behaviour.change = lambda name, raw: raw
        self.behaviour.manner = "plain"
        self.now = None


Attack = Callable[[Scene, random.Random], None]


def rollback(scene: Scene, rng: random.Random) -> None:
    scene.behaviour.repository = scene.old


def wiped_cache(scene: Scene, rng: random.Random) -> None:
    scene.behaviour.repository = scene.old
    for cache in rng.sample(CACHES, rng.randint(1, len(CACHES))):
        shutil.rmtree(scene.world.store / cache, ignore_errors=True)


def freeze(scene: Scene, rng: random.Random) -> None:
    scene.now = datetime.now(UTC) + timedelta(days=rng.randint(8, 300))


def mix_and_match(scene: Scene, rng: random.Random) -> None:
    files = sorted(path.name for path in (scene.old / "metadata").iterdir())
    others = [scene.old, scene.stolen, scene.foreign]

    def change(name: str, raw: bytes) -> bytes:
        if not name.startswith("metadata/") or rng.random() < 0.4:
            return raw
        role = name.rpartition("/")[2].split(".")[-2]
        same = [each for each in files if role in each]
        path = rng.choice(others) / "metadata" / rng.choice(same or files)
        return path.read_bytes() if path.is_file() else raw

    scene.behaviour.change = change


def _one_file(scene: Scene, rng: random.Random, harm: Callable[[bytes], bytes]) -> None:
    kinds = ("timestamp", "snapshot", "releases", "targets", "release.json", "onnx", "golden")
    kind = rng.choice(kinds)
    scene.behaviour.change = lambda name, raw: harm(raw) if kind in name else raw


def tampered(scene: Scene, rng: random.Random) -> None:
    def harm(raw: bytes) -> bytes:
        changed = bytearray(raw)
        changed[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
        return bytes(changed)

    _one_file(scene, rng, harm)


def oversized(scene: Scene, rng: random.Random) -> None:
    more = rng.choice((1, 100, 100_000, 6_000_000))
    _one_file(scene, rng, lambda raw: raw + rng.randbytes(more))


def truncated(scene: Scene, rng: random.Random) -> None:
    _one_file(scene, rng, lambda raw: raw[: rng.randrange(len(raw))])


def swapped(scene: Scene, rng: random.Random) -> None:
    paths = [path for path in (scene.world.repository / "targets").rglob("*.*") if path.is_file()]
    _one_file(scene, rng, lambda raw: rng.choice(paths).read_bytes())


def wrong_key(scene: Scene, rng: random.Random) -> None:
    scene.behaviour.repository = scene.foreign


def revoked_key(scene: Scene, rng: random.Random) -> None:
    scene.behaviour.repository = scene.stolen


def _manner(manner: str) -> Attack:
    def attack(scene: Scene, rng: random.Random) -> None:
        scene.behaviour.manner = manner

    return attack


ATTACKS: dict[str, Attack] = {
    "rollback": rollback,
    "wiped cache": wiped_cache,
    "freeze": freeze,
    "mix and match": mix_and_match,
    "tampered": tampered,
    "oversized": oversized,
    "truncated": truncated,
    "swapped": swapped,
    "wrong key": wrong_key,
    "revoked key": revoked_key,
    "endless stream": _manner("endless"),
    "slow stream": _manner("slow"),
    "empty chunks": _manner("empty"),
    "huge message": _manner("huge"),
    "never whole": _manner("short"),
}


@dataclass
class Attacked:
    """What came of the attacks."""

    counts: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)


@contextmanager
def scene_in(folder: Path) -> Iterator[Scene]:
    """Loses and replaces the online keys after the first of three versions; starts the server."""
    world = initialised(folder / "world")
    world.publish(1.0)
    world.update()
    thief = World(folder / "theft")
    shutil.copytree(world.repository, thief.repository)
    shutil.copytree(world.keys, thief.keys)
    for factor in (8.0, 9.0):
        thief.publish(factor)
    world.rotate(*ONLINE)
    world.update()
    shutil.copytree(world.repository, folder / "old")
    world.publish(2.0)
    world.update()
    shutil.copytree(world.store, world.folder / "saved", symlinks=True)
    world.publish(3.0)
    foreign = initialised(folder / "foreign")
    for factor in (5.0, 6.0, 7.0, 8.0):
        foreign.publish(factor)
    project = Delivering(folder / "project")
    behaviour = Behaviour(world.repository)
    kit = project.device("edge-1")
    with (
        hostile(project, behaviour) as port,
        DeliveryLink(kit, DeliveryEndpoint(HOST, port)) as link,
    ):
        yield Scene(world, folder / "old", foreign.repository, thief.repository, link, behaviour)


def attack(folder: Path, count: int, seed: int) -> Attacked:
    """Makes so many attacks, each kind in turn."""
    done = Attacked()
    with scene_in(folder) as scene:
        for number in range(count):
            name = list(ATTACKS)[number % len(ATTACKS)]
            rng = random.Random(f"{seed}/{number}")
            scene.reset()
            ATTACKS[name](scene, rng)
            done.counts[name] += 1
            _attempt(scene, done, f"{name} {seed}/{number}")
    return done


def _attempt(scene: Scene, done: Attacked, what: str) -> None:
    world = scene.world
    wiped = not (world.store / "models").exists()
    try:
        world.update(scene.link.source, now=scene.now)
    except FedcoreError as error:
        done.refused[type(error).__name__] += 1
    except Exception as error:
        done.wrong.append(f"{what}: {type(error).__name__}: {error}")
    try:
        factor = world.answers()
    except FedcoreError as error:
        if not wiped:
            done.wrong.append(f"{what}: nothing serves: {error}")
        return
    if factor not in (2.0, 3.0):
        done.wrong.append(f"{what}: it serves factor {factor}")


def quick(monkey: Callable[[object, str, object], None]) -> None:
    """Shortens waits for a server that does not answer, which otherwise take minutes."""
    monkey(network, "_METADATA_S", 0.4)
    monkey(network, "_FETCH_S", 0.4)
    monkey(resuming, "PAUSE_S", 0.001)
    monkey(network, "_LINGER_S", 0.01)
    monkey(network, "_DRAIN_S", 0.1)
    monkey(resuming, "ATTEMPTS", 2)


def kill_updates(folder: Path, count: int, seed: int) -> Attacked:
    """Kills so many updates at random moments; a version serves, and the next update succeeds."""
    world = initialised(folder / "killed")
    world.publish(1.0)
    world.update()
    world.publish(2.0, padding=2_000_000)
    shutil.copytree(world.store, world.folder / "saved", symlinks=True)
    rng, done = random.Random(seed), Attacked()
    lasts_s, number = 1.0, 0
    while done.counts["killed"] < count:
        number += 1
        shutil.rmtree(world.store)
        shutil.copytree(world.folder / "saved", world.store, symlinks=True)
        child = os.fork()
        if child == 0:
            try:
                world.update()
            finally:
                os._exit(0)
        time.sleep(rng.uniform(0.0, lasts_s))
        os.kill(child, signal.SIGKILL)
        killed = os.WIFSIGNALED(os.waitpid(child, 0)[1])
        # How long an update takes changes with the machine's other work.
        lasts_s *= 1.05 if killed else 0.8
        done.counts["killed" if killed else "ended before"] += 1
        try:
            version = installed.serving(world.store, "digits")
            if world.answers() != float(version.manifest.version) or version.damage:
                done.wrong.append(f"kill {number}: a wrong answer")
            if world.update().version != 2 or world.answers() != 2.0:
                done.wrong.append(f"kill {number}: the next update did not succeed")
        except FedcoreError as error:
            done.wrong.append(f"kill {number}: {error}")
    return done


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--attacks", type=int, default=1000)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/campaign"))
    options = parser.parse_args(arguments)
    folder = Path(tempfile.mkdtemp(prefix="fedcore-deliveries-"))
    quick(setattr)
    results = {}
    for name, work, count in (
        ("killed updates", kill_updates, options.kills),  # before there are threads to fork
        ("attacks", attack, options.attacks),
    ):
        began = time.monotonic()
        done = work(folder, count, options.seed)
        results[name] = {
            "seconds": round(time.monotonic() - began, 1),
            "counts": dict(done.counts),
            "refused": dict(done.refused),
            "wrong": done.wrong,
        }
        print(name, results[name], flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    write_json(options.out / "deliveries.json", {"seed": options.seed, **results})
    shutil.rmtree(folder)
    return 1 if any(each["wrong"] for each in results.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
