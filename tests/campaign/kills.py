"""Command line of the campaigns that kill one process again and again."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any


def run_kills(
    kill_often: Callable[..., dict[str, Any]],
    *,
    name: str,
    description: str | None,
    kills: int,
    faults: str,
    arguments: Sequence[str] | None,
) -> int:
    """Runs a campaign, and prints its result as JSON; 1 if anything went wrong.

    Args:
        kill_often: Called with a folder, the number of kills, ``seed`` and ``say``.
        name: The campaign's module.
        description: Text of ``--help``.
        kills: Number of kills unless the command line says another.
        faults: Entry of the result that must be empty or zero.
        arguments: The command line; that of this process when None.
    """
    parser = argparse.ArgumentParser(prog=f"tests.campaign.{name}", description=description)
    parser.add_argument("--kills", type=int, default=kills)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, help="write the result there, as JSON")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="fedcore-kills-") as root:
        say = partial(print, file=sys.stderr, flush=True)
        result = kill_often(Path(root), options.kills, seed=options.seed, say=say)
    text = json.dumps(result, indent=1)
    print(text)
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text + "\n")
    return 1 if result[faults] else 0
