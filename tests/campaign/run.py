"""The fault campaign: everything is killed, stopped, cut off, torn and filled, and compared.

::

    python -m tests.campaign.run --server-kills 200 --device-kills 100 --out runs/campaign
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from fedcore import __version__
from tests.campaign import scenarios
from tests.campaign.scenarios import Outcome, compare, extra_charges
from tests.campaign.site import Site, site

WITHIN_S = 5.0
Scenario = Callable[[Site], Outcome]


def campaign(options: argparse.Namespace, root: Path) -> dict[str, Any]:
    """Runs every scenario that is asked for, each against an undisturbed run of as many rounds."""
    rng = random.Random(options.seed)
    server_kills, device_kills, times = options.server_kills, options.device_kills, options.others
    planned: list[tuple[str, int, Scenario, dict[str, Any]]] = []
    if server_kills:
        rounds = server_kills + 4
        kill = lambda place: scenarios.kill_servers(place, server_kills, rng)  # noqa: E731
        planned.append(("server killed", rounds, kill, {}))
    if device_kills:
        rounds = 3 * device_kills + 4
        kill = lambda place: scenarios.kill_devices(place, device_kills, rng)  # noqa: E731
        planned.append(("device killed", rounds, kill, {"slow_s": 0.3}))
    if times:
        behind = {"server_host": "127.0.0.3"}
        planned += [
            ("stopped", 8, lambda place: scenarios.stop_and_go_on(place, rng), {"slow_s": 0.3}),
            ("network", 30, lambda place: scenarios.bad_network(place, rng), behind),
            (
                *("journal torn", 3 * times + 4),
                lambda place: scenarios.tear_journals(place, times, rng),
                {"private": False},
            ),
            ("disk full", times + 6, lambda place: scenarios.fill_disks(place, 2), {}),
            ("clock fast", 3, scenarios.wrong_clocks, {"clock_off_s": 590.0}),
            ("clock slow", 3, scenarios.wrong_clocks, {"clock_off_s": -590.0}),
        ]
    expected: dict[tuple[int, bool], dict[str, Any]] = {}
    results = []
    for name, rounds, scenario, more in planned:
        key = (rounds, more.get("private", True))
        if key not in expected:
            where = root / f"undisturbed-{len(expected)}"
            with site(where, rounds, slow_s=0.0, private=key[1]) as place:
                scenarios.undisturbed(place)
                expected[key] = place.result()
        results.append(_one(root, name, rounds, scenario, more, expected[key]))
        print(_line(results[-1]), flush=True)
    return {
        "version": __version__,
        "machine": {"system": platform.platform(), "python": platform.python_version()},
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "arguments": {key: value for key, value in vars(options).items() if key != "out"},
        "passed": not any(result["wrong"] for result in results),
        "scenarios": results,
    }


def _one(
    root: Path,
    name: str,
    rounds: int,
    scenario: Scenario,
    more: dict[str, Any],
    expected: dict[str, Any],
) -> dict[str, Any]:
    started = time.monotonic()
    outcome, extra = Outcome(), None
    try:
        with site(root / name.replace(" ", "-"), rounds, **more) as place:
            outcome = scenario(place)
            found = place.result()
            outcome.wrong += compare(found, expected, rounds)
            extra = extra_charges(found, rounds)
    except (AssertionError, OSError) as error:
        outcome.wrong.append(str(error))
    resumed = figures(outcome.resumed_s)
    if resumed and resumed["p95"] > WITHIN_S:
        outcome.wrong.append(f"resumed in {resumed['p95']:.2f} s (p95), bound {WITHIN_S:g} s")
    return {
        "name": name,
        "rounds": rounds,
        "seconds": round(time.monotonic() - started, 1),
        "counts": outcome.counts,
        "resumed_s": resumed,
        "imports_s": figures(outcome.imports_s),
        "back_s": figures(outcome.back_s),
        "charges_beyond_one_a_round": extra,
        "wrong": outcome.wrong,
        "samples": {key: value for key, value in asdict(outcome).items() if key.endswith("_s")},
    }


def figures(samples: Sequence[float]) -> dict[str, float] | None:
    """Count, median, 95th percentile and maximum, in seconds."""
    if not samples:
        return None
    p50, p95 = np.percentile(samples, [50, 95])
    values = {"p50": float(p50), "p95": float(p95), "max": max(samples)}
    return {"n": len(samples)} | {key: round(value, 3) for key, value in values.items()}


def _line(result: dict[str, Any]) -> str:
    def seconds(which: str) -> str:
        held = result[which]
        return f"{held['p50']:.2f}/{held['p95']:.2f}/{held['max']:.2f}" if held else "-"

    return (
        f"{result['name']:<14} {sum(result['counts'].values()):>5} {seconds('resumed_s'):>18} "
        f"{seconds('back_s'):>18} {result['charges_beyond_one_a_round']!s:>7} "
        f"{result['seconds']:>7.0f} s  {'; '.join(result['wrong']) or 'ok'}"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--server-kills", type=int, default=200)
    parser.add_argument("--device-kills", type=int, default=100)
    parser.add_argument("--others", type=int, default=8, help="torn journals; 0 for kills alone")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/campaign"))
    options = parser.parse_args(arguments)
    print("scenario       faults  resumed p50/p95/max    back p50/p95/max   extra    took  outcome")
    root = Path(tempfile.mkdtemp(prefix="fedcore-campaign-"))
    result = campaign(options, root)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "campaign.json").write_text(json.dumps(result, indent=2) + "\n")
    print(f"{'passed' if result['passed'] else 'FAILED'}: {options.out / 'campaign.json'}")
    if result["passed"]:
        shutil.rmtree(root)
    else:
        print(f"logs are kept in {root}")
    return 0 if result["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
