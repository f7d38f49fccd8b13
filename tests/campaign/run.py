"""The fault campaign: everything is killed, stopped, cut off, torn and filled, and compared.

::

    python -m tests.campaign.run --server-kills 200 --device-kills 100 --minutes 90

Each call adds to ``campaign.json``, so that several short ones make a long one. What faults are
left when the minutes are over is not begun; what has begun ends as it should.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from fedcore import __version__
from tests.campaign import in_use, scenarios
from tests.campaign.compare import compare, extra_charges
from tests.campaign.damage import damage_everything
from tests.campaign.fuzzing import fuzz_everything
from tests.campaign.hostile import send_hostile
from tests.campaign.scenarios import Outcome
from tests.campaign.site import NAMES, ROOT, site
from tests.prefork import Prefork

RESUMED_S, BACK_S, HELD_UP_S = 5.0, 5.0, 10.0
"""Bounds: a server's and a device's return (95th percentile), and the longest that a round waits
for a device that is gone."""
_BATCH = 25
"""Kills in one run; the next run begins in a folder of its own."""
_CLOCK_OFF_S = 600.0
Scenario = Callable[[Any], Outcome]


@dataclass(frozen=True)
class Planned:
    """A run, and what is done to it."""

    name: str
    rounds: int
    scenario: Scenario
    place: dict[str, Any] = field(default_factory=dict)
    exact: bool = True
    """Whether it must give the bits of an undisturbed run: no round ends without a device."""


def planned(options: argparse.Namespace, enough: Callable[[], bool]) -> Iterator[Planned]:
    """One run after the other, until every count is reached or it is ``enough``."""
    rng = random.Random(options.seed)
    behind, slow = {"proxied": NAMES}, {"slow_s": 0.3}
    for kills in _batches(options.server_kills):
        yield Planned(
            *("server killed", 2 * _BATCH + 6),
            lambda place, kills=kills: scenarios.kill_servers(place, kills, rng, enough),
        )
    for kills in _batches(options.device_kills):
        yield Planned(
            *("device killed", 2 * _BATCH + 6),
            lambda place, kills=kills: scenarios.kill_devices(place, kills, rng, enough),
            slow,
        )
    if options.buried:
        yield Planned(
            *("device gone", 3 * options.buried + 2),
            lambda place: scenarios.bury_devices(place, options.buried, rng, enough),
            {"proxied": NAMES[:1], "quorum": 0.6, "slow_s": 1.0},
            exact=False,
        )
    if not options.others:
        return
    times = options.others
    yield Planned("stopped", 8, lambda place: scenarios.stop_and_go_on(place, rng), slow)
    yield Planned("network", 80, lambda place: scenarios.bad_network(place, rng), behind)
    yield Planned(
        *("journal torn", 3 * times + 4),
        lambda place: scenarios.tear_journals(place, times, rng),
        {"private": False},
    )
    yield Planned(
        *("files damaged in use", 60),
        lambda place: in_use.damage_in_use(place, rng),
        {"private": False},
    )
    yield Planned("disk full", 10, lambda place: scenarios.fill_disks(place, 2))
    for _ in range((times + 1) // 2):  # each is over after a few kills: what is done stays done
        yield Planned(
            *("after the rounds", 2),
            lambda place: scenarios.kill_finishing(place, times, rng, enough),
            {"releases": True},
        )
    for which in ("clock_off_s", "server_clock_off_s"):
        for off_s in (_CLOCK_OFF_S, -_CLOCK_OFF_S):
            yield Planned("clock wrong", 3, scenarios.wrong_clocks, {which: off_s})


def _batches(kills: int) -> Iterator[int]:
    while kills > 0:
        yield min(kills, _BATCH)
        kills -= _BATCH


def campaign(
    options: argparse.Namespace, root: Path, prefork: Prefork | None
) -> Iterator[dict[str, Any]]:
    """What came of each run. An undisturbed one of as many rounds is run where there was none."""
    end = time.monotonic() + 60 * options.minutes
    expected: dict[tuple[Any, ...], dict[str, Any]] = {}
    started = {"prefork": prefork}

    def enough() -> bool:
        return time.monotonic() >= end

    for number, plan in enumerate(planned(options, enough)):
        if enough():
            return
        same = {name: plan.place[name] for name in ("private", "releases") if name in plan.place}
        key = (plan.rounds, *same.items())
        if plan.exact and key not in expected:
            folder = root / f"undisturbed-{number}"
            with site(folder, plan.rounds, slow_s=0.0, **same, **started) as place:
                scenarios.undisturbed(place)
                expected[key] = place.result()
        plan = replace(plan, place=plan.place | started)
        yield _one(root / f"{number}-{plan.name.replace(' ', '-')}", plan, expected.get(key))
    if options.hostile and not enough():
        yield send_hostile(options.hostile, root / "hostile.json")
    if options.files and not enough():
        yield damage_everything(options.files, root / "files.json")
    if options.fuzz and not enough():
        yield fuzz_everything(options.fuzz, options.seed, options.out / "fuzz")


def _one(folder: Path, plan: Planned, expected: dict[str, Any] | None) -> dict[str, Any]:
    started, load = time.monotonic(), os.getloadavg()[0]
    outcome, extra = Outcome(), None
    try:
        with site(folder, plan.rounds, **plan.place) as place:
            outcome = plan.scenario(place)
            found = place.result()
        bits = expected if plan.exact else None
        outcome.wrong += compare(found, plan.rounds, bits, whole=plan.exact)
        extra = extra_charges(found, plan.rounds)
    except (AssertionError, OSError) as error:
        outcome.wrong.append(f"{folder}: {error}")
    return {
        "name": plan.name,
        "rounds": plan.rounds,
        "seconds": round(time.monotonic() - started, 1),
        "load_before": round(load, 1),
        "same_bits": not outcome.wrong if plan.exact else None,
        "charges_beyond_one_a_round": extra,
        **asdict(outcome),
    }


def totals(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What all runs of a name came to, and what is wrong with them together."""
    found: dict[str, Any] = {}
    for name in dict.fromkeys(one["name"] for one in results):
        runs = [one for one in results if one["name"] == name]
        samples: dict[str, list[float]] = {}
        counts: dict[str, int] = {}
        for one in runs:
            held = {f"held_up_s, {how}": some for how, some in one.get("held_up_s", {}).items()}
            flat = {key: some for key, some in one.items() if key.endswith("_s") and some}
            flat.pop("held_up_s", None)
            for key, some in (flat | held).items():
                samples.setdefault(key, []).extend(some)
            for key, number in one["counts"].items():
                counts[key] = counts.get(key, 0) + number
        wrong = [text for one in runs for text in one["wrong"]]
        taken = {key: figures(some) for key, some in samples.items()}
        for key, which, bound_s in (
            ("resumed_s", "p95", RESUMED_S),
            ("back_s", "p95", BACK_S),
            *((key, "max", HELD_UP_S) for key in taken if key.startswith("held_up_s")),
        ):
            if key in taken and taken[key][which] > bound_s:
                wrong.append(f"{key}: {taken[key][which]:.2f} s ({which}), bound {bound_s:g} s")
        found[name] = {
            "runs": len(runs),
            "faults": sum(counts.values()),
            "counts": counts,
            "runs_compared": len([one for one in runs if one.get("same_bits") is not None]),
            "runs_with_the_same_bits": len([one for one in runs if one.get("same_bits")]),
            "charges_beyond_one_a_round": sum(
                one.get("charges_beyond_one_a_round") or 0 for one in runs
            ),
            **taken,
            "wrong": wrong,
        }
    return found


def figures(samples: Sequence[float]) -> dict[str, float]:
    """Count, median, 95th percentile and maximum, in seconds."""
    p50, p95 = np.percentile(samples, [50, 95])
    values = {"p50": float(p50), "p95": float(p95), "max": max(samples)}
    return {"n": len(samples)} | {key: round(value, 3) for key, value in values.items()}


def code_digest() -> str:
    """Of all code that a campaign runs: results of another are not added to."""
    digest = hashlib.sha256()
    for folder in ("fedcore", "edge_client", "server", "tests/campaign", "tests/fuzz"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def earlier(path: Path, code: str) -> list[dict[str, Any]]:
    """The results that a file holds, of the same code."""
    if not path.is_file():
        return []
    held = json.loads(path.read_text())
    return list(held["results"]) if held["code"] == code else []


def _table(found: dict[str, Any]) -> Iterator[str]:
    for name, one in found.items():
        same = f"{one['runs_with_the_same_bits']} of {one['runs_compared']} runs bit for bit"
        yield f"{name}: {one['faults']} faults, {same}: {'; '.join(one['wrong']) or 'ok'}"
        for key, value in one.items():
            if isinstance(value, dict) and "p50" in value:
                yield (
                    f"    {key:<28} n {value['n']:>4}   p50 {value['p50']:>6.2f}   "
                    f"p95 {value['p95']:>6.2f}   max {value['max']:>6.2f}"
                )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--server-kills", type=int, default=200)
    parser.add_argument("--device-kills", type=int, default=100)
    parser.add_argument("--buried", type=int, default=8, help="devices that die, stop, are cut off")
    parser.add_argument("--others", type=int, default=8, help="torn journals; 0 for kills alone")
    parser.add_argument("--hostile", type=int, default=1300, help="messages of each hostile class")
    parser.add_argument("--files", type=int, default=1, help="one harmed file in so many; 0: none")
    parser.add_argument("--fuzz", type=int, default=10**6, help="inputs of all formats together")
    parser.add_argument("--minutes", type=float, default=120.0, help="no fault begins after them")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--prefork",
        action="store_true",
        help="fork processes from one that has imported what they need: quicker, but no real start",
    )
    parser.add_argument("--out", type=Path, default=Path("runs/campaign"))
    options = parser.parse_args(arguments)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.default_int_handler)  # what runs is ended, too
    root = Path(tempfile.mkdtemp(prefix="fedcore-campaign-"))
    options.out.mkdir(parents=True, exist_ok=True)
    path, code = options.out / "campaign.json", code_digest()
    results, passed = earlier(path, code), True
    prefork = Prefork() if options.prefork else None
    for result in campaign(options, root, prefork):
        arguments_ = {key: value for key, value in vars(options).items() if key != "out"}
        when = datetime.now(UTC).isoformat(timespec="seconds")
        results.append(result | {"when": when, "arguments": arguments_})
        found = totals(results)
        passed = not any(one["wrong"] for one in found.values())
        written = {
            "version": __version__,
            "code": code,
            "machine": {
                "system": platform.platform(),
                "python": platform.python_version(),
                "cores": os.cpu_count(),
            },
            "passed": passed,
            "totals": found,
            "results": results,
        }
        path.write_text(json.dumps(written, indent=1) + "\n")
        print(f"{result['name']}: {result['seconds']:.0f} s, {result['wrong'] or 'ok'}", flush=True)
    if prefork is not None:
        prefork.close()
    print("\n".join(_table(totals(results))))
    print(f"{'passed' if passed else 'FAILED'}: {path}")
    if passed:
        shutil.rmtree(root)
    else:
        print(f"logs are kept in {root}")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
