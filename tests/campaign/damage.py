"""Each file of a publisher, an authority, a server and devices is removed or damaged in turn.

::

    python -m tests.campaign.damage --out damage.json
    python -m tests.campaign.damage --only releases --few 3

Every harm of `tests.campaign.harms` is done to each file while nothing runs, and each command that
may read it is run in a fresh copy.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tests.campaign.harms import HARMS, copied, run, verdict
from tests.campaign.places import PLACES, Place
from tests.campaign.site import ROOT

_SUITES = "GRPC_SSL_CIPHER_SUITES"


def _warm() -> None:
    """Imports what the commands need: each of them is forked from this process."""
    from fedcore.cli import build_parser
    from fedcore.crypto import sealing

    build_parser()
    sealing._COST = 1 << 10  # half a second for each guess is half a second for each command


def harmed(place: Place, root: Path, every: int, seed: int) -> Iterator[dict[str, Any]]:
    """What came of each harm to each file, of which one in ``every`` is tried."""
    whole, number = root / place.name, seed
    whole.mkdir(parents=True)
    place.build(whole)
    for part, commands in place.parts.items():
        usual = {one.name: run(one, copied(whole, root / "work" / place.name)) for one in commands}
        for one in commands:
            first = usual[one.name]
            if first.code not in (130 if one.until else 0, int(one.name == "doctor")):
                raise AssertionError(f"{one.name}: exit {first.code}: {first.err or first.out}")
        for file in place.files(whole, part):
            for harm, do in HARMS.items():
                for command in commands:
                    number += 1
                    if number % every:
                        continue
                    copy = copied(whole, root / "work" / place.name)
                    if harm == "flipped" and not (copy / file).stat().st_size:
                        continue
                    do(copy / file)
                    done = run(command, copy)
                    what, why = verdict(done, usual[command.name], file.name)
                    yield {
                        "place": place.name,
                        "file": str(file),
                        "harm": harm,
                        "command": command.name,
                        "verdict": what,
                        "exit": done.code,
                        "seconds": round(done.seconds, 2),
                        "why": why,
                        "said": done.err.strip()[-300:],
                    }


def damage_everything(few: int, out: Path) -> dict[str, Any]:
    """All of it in a process of its own, as a part of the campaign.

    Args:
        few: One case in so many is tried.
        out: File for every case.
    """
    started = time.monotonic()
    words = ["-m", "tests.campaign.damage", "--few", str(few), "--out", str(out)]
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
    ended = f"it ended ({done.returncode}): {done.stderr[-2000:]}"
    told = json.loads(out.read_text()) if out.exists() else {"verdicts": {}, "wrong": [ended]}
    return {
        "name": "files",
        "seconds": round(time.monotonic() - started, 1),
        "counts": told["verdicts"],
        "longest_s_of_a_command": told.get("longest_s"),
        "wrong": [one if isinstance(one, str) else json.dumps(one) for one in told["wrong"]],
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=[place.name for place in PLACES])
    parser.add_argument("--few", type=int, default=1, help="one case in so many")
    parser.add_argument("--seed", type=int, default=0, help="which of them")
    parser.add_argument("--out", type=Path, help="every case goes here, as JSON")
    options = parser.parse_args(arguments)
    if _SUITES not in os.environ:  # it was read when grpc was imported
        os.environ[_SUITES] = "ECDHE-RSA-AES128-GCM-SHA256"
        os.execv(sys.executable, [sys.executable, "-m", "tests.campaign.damage", *sys.argv[1:]])
    os.environ["FEDCORE_PASSPHRASE"] = "passphrase of a campaign"
    logging.disable(logging.NOTSET)
    _warm()
    started, cases = time.monotonic(), list[dict[str, Any]]()
    with tempfile.TemporaryDirectory(prefix="fedcore-damage-") as made:
        os.environ["XDG_STATE_HOME"] = str(Path(made) / "counts")
        for place in PLACES:
            if options.only in (None, place.name):
                for case in harmed(place, Path(made), options.few, options.seed):
                    cases.append(case)
                    if case["why"]:
                        print(json.dumps(case), file=sys.stderr, flush=True)
    told = {
        "cases": len(cases),
        "seconds": round(time.monotonic() - started, 1),
        "verdicts": dict(Counter(f"{one['place']}: {one['verdict']}" for one in cases)),
        "files": len({(one["place"], one["file"]) for one in cases}),
        "longest_s": max((one["seconds"] for one in cases), default=0.0),
        "wrong": [one for one in cases if one["why"]],
    }
    if options.out:
        options.out.write_text(json.dumps(told | {"all": cases}, indent=1) + "\n")
    print(json.dumps(told), flush=True)
    return int(bool(told["wrong"]))


if __name__ == "__main__":
    sys.exit(main())
