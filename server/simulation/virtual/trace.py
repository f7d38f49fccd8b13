"""Trace of devices: each client's speed and bandwidth by availability window, from a CSV file."""

from __future__ import annotations

import csv
import io
import math
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedcore.config.simulated import RATE_MAX, RATE_MIN
from fedcore.errors import DataError
from fedcore.files import read_bytes
from fedcore.observability.words import counted

MAX_BYTES = 64 << 20  # 64 MiB: about two million rows
COLUMNS = (
    "client",
    "examples_per_s",
    "download_mbit_s",
    "upload_mbit_s",
    "available_from_s",
    "available_until_s",
)
_SHOWN = 60  # characters of a value in a message


@dataclass(frozen=True)
class AvailabilityWindow:
    """Interval of the virtual clock in which a client is reachable, and its device's rates."""

    examples_per_s: float
    download_mbit_s: float
    upload_mbit_s: float
    available_from_s: float
    """On the virtual clock, on which the first round starts at 0."""
    available_until_s: float
    """Infinite for a device that stays online."""


@dataclass(frozen=True, eq=False)
class Trace:
    """All windows of all clients; takes 40 bytes per window, plus the clients' names."""

    numbers: Mapping[str, int]
    """Index of each client."""
    starts: NDArray[np.int64]
    """Windows of client ``i`` are rows ``starts[i]`` to ``starts[i + 1]``; shape ``(clients +
    1,)``."""
    windows: NDArray[np.float64]
    """One row per window, with the fields of `AvailabilityWindow`; a client's rows are in order
    of time."""


def window_at(trace: Trace, client: str, clock_s: float) -> AvailabilityWindow | None:
    """Returns the window of ``client`` at ``clock_s``: start included, end excluded; else None.

    Raises:
        KeyError: the trace has no such client.
    """
    number = trace.numbers[client]
    rows = trace.windows[trace.starts[number] : trace.starts[number + 1]]
    place = int(np.searchsorted(rows[:, 3], clock_s, side="right")) - 1
    if place < 0 or clock_s >= rows[place, 4]:
        return None
    return AvailabilityWindow(*rows[place].tolist())


def read_trace(path: Path) -> Trace:
    """Reads a trace: a header row with `COLUMNS`, then one row per window of a client.

    Rows may be in any order. A client's windows may touch, but not overlap.

    Raises:
        DataError: the file does not exist, is larger than `MAX_BYTES`, or is not UTF-8 or such a
            table; a value is missing, not a number or out of range; two windows of a client
            overlap. Where a line is at fault, the message names it.
    """
    raw = read_bytes(path, max_bytes=MAX_BYTES, what="this trace of devices")
    numbers: dict[str, int] = {}
    clients, lines, values = array("q"), array("q"), array("d")
    for line, (client, *texts) in _rows(path, raw):
        if not client:
            raise _bad(path, line, "the client has no name")
        values.extend(_window(path, line, texts))
        clients.append(numbers.setdefault(client, len(numbers)))
        lines.append(line)
    if not numbers:
        raise DataError(f"{path}: this trace lists no client. Nothing was simulated; add rows.")
    return _sorted(path, numbers, clients, lines, values)


def _rows(path: Path, raw: bytes) -> Iterator[tuple[int, list[str]]]:
    """Yields rows below the header with their line numbers; skips blank lines."""
    # utf-8-sig: spreadsheets write a byte order mark
    table = csv.reader(io.TextIOWrapper(io.BytesIO(raw), encoding="utf-8-sig", newline=""))
    expected = ",".join(COLUMNS)
    try:
        header = next(table, [])
        if tuple(header) != COLUMNS:
            found = ",".join(header)[: 2 * _SHOWN]
            raise _bad(path, 1, f"the header is {found!r}, expected {expected!r}")
        for row in table:
            if row and len(row) != len(COLUMNS):
                raise _bad(
                    path,
                    table.line_num,
                    f"{counted(len(row), 'value')}, expected {len(COLUMNS)}",
                )
            if row:
                yield table.line_num, row
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: this trace is not UTF-8 text ({error.reason}). Nothing was simulated; save "
            "it as UTF-8."
        ) from None
    except csv.Error as error:
        raise _bad(path, table.line_num, f"not a row of a CSV file ({error})") from None


def _window(path: Path, line: int, texts: list[str]) -> list[float]:
    values = [
        _number(path, line, column, text) for column, text in zip(COLUMNS[1:], texts, strict=True)
    ]
    *rates, start, end = values
    for column, value in zip(COLUMNS[1:4], rates, strict=True):
        if not RATE_MIN <= value <= RATE_MAX:
            allowed = f"from {RATE_MIN:g} to {RATE_MAX:g}"
            raise _bad(path, line, f"{column} = {value:g}, expected {allowed}")
    if not 0 <= start < math.inf:
        raise _bad(path, line, f"available_from_s = {start:g}, expected 0 or later")
    if not end > start:
        raise _bad(
            path, line, f"available_until_s = {end:g} is not after available_from_s = {start:g}"
        )
    return values


def _number(path: Path, line: int, column: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if math.isnan(value):
        raise _bad(path, line, f"{column} = {text[:_SHOWN]!r}, expected a number")
    return value


def _sorted(
    path: Path,
    numbers: dict[str, int],
    clients: array[int],
    lines: array[int],
    values: array[float],
) -> Trace:
    """Returns the trace with each client's windows in order.

    Raises:
        DataError: two windows of a client overlap.
    """
    owner = np.frombuffer(clients, dtype=np.int64)
    windows = np.frombuffer(values, dtype=np.float64).reshape(-1, len(COLUMNS) - 1)
    order = np.lexsort((windows[:, 3], owner))
    owner, windows = owner[order], windows[order]
    clashes = np.flatnonzero((owner[1:] == owner[:-1]) & (windows[1:, 3] < windows[:-1, 4]))
    if clashes.size:
        first = int(clashes[0])
        one, other = sorted((lines[order[first]], lines[order[first + 1]]))
        client = next(name for name, number in numbers.items() if number == owner[first])
        problem = f"client {client[:_SHOWN]!r} already has line {one}, and its windows overlap"
        raise _bad(path, other, problem)
    return Trace(numbers, np.searchsorted(owner, np.arange(len(numbers) + 1)), windows)


def _bad(path: Path, line: int, problem: str) -> DataError:
    return DataError(f"{path}, line {line}: {problem}. Nothing was simulated; correct the trace.")
