from __future__ import annotations

import math
from pathlib import Path

import pytest

from fedcore.errors import DataError
from server.simulation.virtual.trace import (
    COLUMNS,
    MAX_BYTES,
    AvailabilityWindow,
    read_trace,
    window_at,
)

HEADER = ",".join(COLUMNS)


def write(folder: Path, *rows: str, header: str = HEADER) -> Path:
    path = folder / "devices.csv"
    path.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    return path


def test_windows_are_found_whatever_the_order_of_rows(tmp_path: Path) -> None:
    rows = ["a,1,2,3,50,60", "b,4,5,6,0,inf", "a,7,8,9,10,50", "a,1,1,1,0,5"]
    for order in (rows, rows[::-1]):
        trace = read_trace(write(tmp_path, *order))
        assert window_at(trace, "a", 0.0) == AvailabilityWindow(1.0, 1.0, 1.0, 0.0, 5.0)
        assert window_at(trace, "a", 5.0) is None
        assert window_at(trace, "a", 10.0) == AvailabilityWindow(7.0, 8.0, 9.0, 10.0, 50.0)
        assert window_at(trace, "a", 50.0) == AvailabilityWindow(1.0, 2.0, 3.0, 50.0, 60.0)
        assert window_at(trace, "a", 60.0) is None
        assert window_at(trace, "b", 1e12) == AvailabilityWindow(4.0, 5.0, 6.0, 0.0, math.inf)


def test_names_may_be_quoted_and_hold_commas_and_letters_of_any_script(tmp_path: Path) -> None:
    trace = read_trace(write(tmp_path, '"Müller, 3",1,1,1,0,inf', "端末,1,1,1,0,inf", ""))
    assert set(trace.numbers) == {"Müller, 3", "端末"}


def test_what_a_spreadsheet_saves_is_read(tmp_path: Path) -> None:
    path = tmp_path / "devices.csv"
    path.write_bytes(b"\xef\xbb\xbf" + HEADER.encode() + b"\r\na,1,1,1,0,5\r\n")
    assert window_at(read_trace(path), "a", 1.0) == AvailabilityWindow(1.0, 1.0, 1.0, 0.0, 5.0)


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ("a,1,1,1,0", "5 values, expected 6"),
        ("a,1,1,1,0,5,9", "7 values, expected 6"),
        (",1,1,1,0,5", "the client has no name"),
        ("a,fast,1,1,0,5", "examples_per_s = 'fast', expected a number"),
        ("a,,1,1,0,5", "examples_per_s = '', expected a number"),
        ("a,nan,1,1,0,5", "examples_per_s = 'nan', expected a number"),
        ("a,1,1,1,0,NaN", "available_until_s = 'NaN'"),
        ("a,0,1,1,0,5", "examples_per_s = 0, expected from 1e-06 to 1e[+]12"),
        ("a,1,-1,1,0,5", "download_mbit_s = -1,"),
        ("a,1,1,inf,0,5", "upload_mbit_s = inf,"),
        ("a,1,1,1,-1,5", "available_from_s = -1, expected 0 or later"),
        ("a,1,1,1,inf,inf", "available_from_s = inf,"),
        ("a,1,1,1,5,5", "available_until_s = 5 is not after available_from_s = 5"),
        ("a,1,1,1,5,4", "available_until_s = 4 is not after"),
        ("z,1,1,1,0,5", "client 'z' already has line 2, and its windows overlap"),
        ("z,1,1,1,9,11", "client 'z' already has line 2"),
        ("z,1,1,1,11,12", "client 'z' already has line 2"),
    ],
)
def test_a_bad_row_is_refused_with_its_line(tmp_path: Path, row: str, problem: str) -> None:
    path = write(tmp_path, "z,1,1,1,0,20", "", "b,1,1,1,0,20", row)
    with pytest.raises(DataError, match=rf"devices\.csv, line 5: {problem}.*Nothing was simulated"):
        read_trace(path)


@pytest.mark.parametrize("header", ["", "client,speed", ",".join(reversed(COLUMNS)), "x" * 9999])
def test_another_header_is_refused_with_the_right_one(tmp_path: Path, header: str) -> None:
    with pytest.raises(DataError, match=f"line 1: the header is .*expected '{HEADER}'") as caught:
        read_trace(write(tmp_path, "a,1,1,1,0,5", header=header))
    assert len(str(caught.value)) < 600


def test_a_trace_of_nobody_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="lists no client"):
        read_trace(write(tmp_path))


def test_what_is_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "devices.csv"
    path.write_bytes(HEADER.encode() + b"\n\xff\xfe,1,1,1,0,5\n")
    with pytest.raises(DataError, match="not UTF-8 text"):
        read_trace(path)


def test_a_quote_that_never_closes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"line \d+: not a row of a CSV file"):
        read_trace(write(tmp_path, '"a,1,1,1,0,5', *["b,1,1,1,0,5"] * 20_000))


def test_a_file_past_the_limit_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "devices.csv"
    with path.open("wb") as stream:
        stream.truncate(MAX_BYTES + 1)
    with pytest.raises(DataError, match=f"more than the {MAX_BYTES} allowed"):
        read_trace(path)


def test_a_missing_trace_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"devices\.csv: this trace of devices does not exist"):
        read_trace(tmp_path / "devices.csv")
