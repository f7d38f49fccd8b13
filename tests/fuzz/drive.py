"""Reads inputs of every format through the project's own boundary, and holds it to what it says.

::

    python -m tests.fuzz.drive --inputs 100000 --only journals --seed 7
    python -m tests.fuzz.drive --replay /tmp/fedcore-fuzz/journals-KeyError.bin

Every input gives a value or an error of ours, whose text a terminal can take; nothing that is
logged is longer than a line may be; memory stays within limits. What does not is written to a file.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import resource
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from types import ModuleType

import hypothesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from fedcore.errors import FedcoreError
from fedcore.observability.lines import OneLine
from tests.fuzz import (
    envelopes,
    instructions,
    journals,
    kits,
    manifests,
    replies,
    rosters,
    run_files,
)

FORMATS: dict[str, ModuleType] = {
    "replies": replies,
    "instructions": instructions,
    "envelopes": envelopes,
    "kits": kits,
    "rosters": rosters,
    "manifests": manifests,
    "run files": run_files,
    "journals": journals,
}
SHARES = {
    "replies": 0.25,
    "instructions": 0.15,
    "envelopes": 0.1,
    "kits": 0.1,
    "rosters": 0.1,
    "manifests": 0.15,
    "run files": 0.1,
    "journals": 0.05,
}
"""Of all inputs. Signatures, and a journal's files, take a hundred times what JSON takes."""
MAX_SAID = 2000
"""Characters of an error, and bytes of a line in a log."""
GROWTH_BYTES = 128 << 20
"""What memory may grow by while one input is read; none has more than two megabytes."""
_BATCH = 5_000
ACCEPTED = "accepted"
_NAMED = re.compile(r"'[^']*'|\S*\d\S*")


@dataclass
class Told:
    """What came of the inputs of one format."""

    inputs: int = 0
    seconds: float = 0.0
    outcomes: Counter[str] = field(default_factory=Counter)
    """How many were accepted, or refused by which error."""
    peak_growth_bytes: int = 0
    """The most that memory grew by while one input was read."""
    reasons: set[str] = field(default_factory=set)
    """What errors say, without the names and numbers in it: how far inputs get shows there."""
    failures: list[str] = field(default_factory=list)
    """What is wrong, with the file of an input that shows it."""

    @property
    def shown(self) -> dict[str, object]:
        """As JSON."""
        return {
            "inputs": self.inputs,
            "seconds": round(self.seconds, 1),
            "inputs_per_s": round(self.inputs / self.seconds) if self.seconds else None,
            "accepted": self.outcomes[ACCEPTED],
            "refused": {
                name: count for name, count in self.outcomes.most_common() if name != ACCEPTED
            },
            "distinct_reasons": len(self.reasons),
            "peak_growth_bytes": self.peak_growth_bytes,
            "failures": self.failures,
        }


class _Lines(logging.Handler):
    """Looks at each line as it would stand in a log."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(OneLine())
        self.wrong: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        line = self.format(record)
        if len(line.encode(errors="surrogatepass")) >= MAX_SAID or not line.isprintable():
            self.wrong.append(f"a log line of {len(line)} characters: {line[:200]!r}")
        if record.exc_info or len(self.wrong) > 10:
            self.wrong.append(f"a traceback is logged: {line[:200]!r}")


def outcome(name: str, raw: bytes) -> tuple[str, str]:
    """Reads one input of a format.

    Returns:
        `ACCEPTED`, or the name of the error that refused it; and what that says.

    Raises:
        AssertionError: the text of the error is no line that a terminal can take.
        Exception: whatever is no error of ours.
    """
    refusal: FedcoreError | None = None
    try:
        FORMATS[name].read(raw)
    except FedcoreError as error:
        refusal = error
    if refusal is None:
        return ACCEPTED, ""
    kind, said = type(refusal).__name__, str(refusal)
    assert said, f"{kind} says nothing"
    assert said.isprintable(), f"{kind} cannot be printed: {said[:300]!r}"
    assert len(said) <= MAX_SAID, f"{kind} of {len(said)} characters: {said[:300]}"
    return kind, said


def fuzz(name: str, count: int, *, seed: int, shrinks: bool, failing: Path) -> Told:
    """Draws ``count`` inputs of a format, in batches that each have a seed of their own.

    Args:
        name: Of the format.
        count: How many.
        seed: Of the first batch; the same seed gives the same inputs.
        shrinks: Whether what fails is made smaller; drawing takes twice as long then.
        failing: Folder for inputs that fail.
    """
    told = Told()
    with _watched() as lines, _bounded_memory():
        started = time.monotonic()
        while told.inputs < count and not told.failures:
            batch = min(_BATCH, count - told.inputs)
            _draw(name, batch, seed + told.inputs // _BATCH, shrinks, failing, told, lines)
        told.seconds = time.monotonic() - started
    return told


def _draw(
    name: str, batch: int, seed: int, shrinks: bool, failing: Path, told: Told, lines: _Lines
) -> None:
    phases = [Phase.generate, Phase.shrink] if shrinks else [Phase.generate]

    @hypothesis.seed(seed)
    @settings(
        max_examples=batch,
        deadline=None,
        database=None,
        phases=phases,
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.randoms(use_true_random=not shrinks))
    def one(rng: Random) -> None:
        raw = FORMATS[name].make(rng)
        before = _peak_bytes(reset=True)
        try:
            found, said = outcome(name, raw)
            grown = _peak_bytes() - before
            assert grown < GROWTH_BYTES, f"memory grew by {grown >> 20} MiB"
            assert not lines.wrong, lines.wrong[0]
        except BaseException as error:
            lines.wrong.clear()
            failing.mkdir(parents=True, exist_ok=True)
            (failing / f"{name.replace(' ', '-')}.bin").write_bytes(raw)
            error.add_note(f"{name}, seed {seed}: {failing / name.replace(' ', '-')}.bin")
            raise
        told.inputs += 1
        told.peak_growth_bytes = max(told.peak_growth_bytes, grown)
        told.outcomes[found] += 1
        told.reasons.add(f"{found}: {_NAMED.sub('', said)[:80]}")

    try:
        one()
    except Exception as error:  # told with the input that shows it, and the other formats go on
        where = failing / f"{name.replace(' ', '-')}.bin"
        told.failures.append(f"{type(error).__name__}: {str(error)[:500]} (seed {seed}, {where})")


@contextmanager
def _watched() -> Iterator[_Lines]:
    """Has every line that anything logs looked at, and none of them shown."""
    lines = _Lines()
    loggers = [logging.getLogger(name) for name in (None, "fedcore", "flwr")]
    held = [(one, one.handlers, one.propagate) for one in loggers]
    try:
        for one in loggers:
            one.handlers, one.propagate = [lines], False
        yield lines
    finally:
        for one, handlers, propagates in held:
            one.handlers, one.propagate = handlers, propagates


@contextmanager
def _bounded_memory() -> Iterator[None]:
    """No input gets the machine into trouble: what asks for gigabytes fails, and is told."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + (4 << 30)
    resource.setrlimit(resource.RLIMIT_AS, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def _peak_bytes(*, reset: bool = False) -> int:
    """The most memory that this process has had, or has now where it is measured again."""
    if reset:
        with suppress(OSError), Path("/proc/self/clear_refs").open("wb", buffering=0) as file:
            file.write(b"5")
    with Path("/proc/self/status").open("rb", buffering=0) as file:
        said = file.read(4096)
    place = said.index(b"VmHWM:") + len(b"VmHWM:")
    return int(said[place : said.index(b"kB", place)]) * 1024


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=10_000, help="of all formats together")
    parser.add_argument("--only", choices=[*FORMATS], help="inputs of this format alone")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--shrink", action="store_true", help="make what fails smaller")
    parser.add_argument(
        "--replay", type=Path, help="read this file, as its name says, and show why"
    )
    parser.add_argument(
        "--failing", type=Path, default=Path(tempfile.gettempdir()) / "fedcore-fuzz"
    )
    options = parser.parse_args(arguments)
    if options.replay:
        print(outcome(options.replay.stem.replace("-", " "), options.replay.read_bytes()))
        return 0
    wrong = False
    for name in [options.only] if options.only else FORMATS:
        count = options.inputs if options.only else round(SHARES[name] * options.inputs)
        told = fuzz(name, count, seed=options.seed, shrinks=options.shrink, failing=options.failing)
        print(json.dumps({"format": name, "seed": options.seed} | told.shown), flush=True)
        wrong |= bool(told.failures)
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
