from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from edge_client.inference import inputs
from edge_client.inference.inputs import parse_inputs, read_text
from fedcore.artifacts.manifest import Manifest, manifest_bytes, parse_manifest
from fedcore.errors import DataError, TrustError


def test_a_list_of_inputs_becomes_a_batch(manifest: Manifest) -> None:
    batch = parse_inputs(b"[[1, 2.5, -3], [0, 0, 0]]", manifest, where="x")
    np.testing.assert_array_equal(batch, np.array([[1, 2.5, -3], [0, 0, 0]], np.float32))
    assert batch.dtype == np.float32


def test_one_input_is_a_batch_of_one(manifest: Manifest) -> None:
    for raw in (b"[1, 2.5, -3]", b"[[1, 2.5, -3]]"):
        assert parse_inputs(raw, manifest, where="x").tolist() == [[1, 2.5, -3]]
    scalar = manifest.model_copy(update={"input_shape": ()})
    for raw in (b"7", b"[7]"):
        assert parse_inputs(raw, scalar, where="x").tolist() == [7]


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"null",
        b"5",
        b"[]",
        b"{}",
        b"[1, 2]",
        b"[[[1, 2, 3]]]",
        b"[[1, 2]]",
        b"[[1, 2], [1, 2, 3]]",
        b'[["1", "2", "3"]]',
        b"[[1, 2, NaN]]",
        b"[[1, 2, 1e39]]",
        b"[[1, 2, Infinity]]",
        b"[[true, false, true]]",
        b"[[1, 2, null]]",
        b"[" * 100_000,
        b"[" * 70 + b"1" + b"]" * 70,
        b"\xff\xfe",
        b"[[1, 2, " + b"9" * 5000 + b"]]",
    ],
)
def test_anything_else_is_refused(manifest: Manifest, raw: bytes) -> None:
    with pytest.raises(DataError, match=r"x\.json"):
        parse_inputs(raw, manifest, where="x.json")


def test_a_whole_number_beyond_any_float_is_refused(manifest: Manifest) -> None:
    for first in ("9" * 400, "-" + "9" * 400):
        with pytest.raises(DataError, match="a whole number that float64 cannot hold"):
            parse_inputs(f"[{first}, 0, 0]".encode(), manifest, where="x")


def test_text_among_many_numbers_takes_no_room_for_each(manifest: Manifest) -> None:
    """NumPy would make an array of texts, each as long as the longest: 4 TB here."""
    raw = json.dumps([["x" * 5_000_000, *[0] * 200_000]]).encode()
    for given in (raw, json.dumps([[0.0], [["x" * 5_000_000, *[0] * 200_000]]]).encode()):
        with pytest.raises(DataError, match="text among the numbers"):
            parse_inputs(given, manifest, where="x")


def test_a_model_of_booleans_takes_them_and_zeros_and_ones(manifest: Manifest) -> None:
    model = manifest.model_copy(update={"input_dtype": "bool"})
    for raw in (b"[true, false, true]", b"[1, 0, 1]"):
        batch = parse_inputs(raw, model, where="x")
        assert batch.dtype == np.bool_
        assert batch.tolist() == [[True, False, True]]
    with pytest.raises(DataError, match="cannot represent"):
        parse_inputs(b"[1, 0, 2]", model, where="x")


def test_whole_numbers_stay_whole(manifest: Manifest) -> None:
    pixels = manifest.model_copy(update={"input_dtype": "uint8"})
    assert parse_inputs(b"[[0, 7, 255]]", pixels, where="x").tolist() == [[0, 7, 255]]
    for wrong in (b"[[0, 7, 256]]", b"[[0, -1, 5]]", b"[[0, 0.5, 5]]"):
        with pytest.raises(DataError, match="uint8"):
            parse_inputs(wrong, pixels, where="x")


def test_standard_input_is_read_up_to_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "MAX_INPUT_BYTES", 10)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"x" * 10)))
    assert read_text("-") == b"x" * 10
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"x" * 11)))
    with pytest.raises(DataError, match="standard input"):
        read_text("-")


def test_a_file_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.json"):
        read_text(str(tmp_path / "none.json"))


@pytest.mark.parametrize("raw", [b"[[1, NaN, 3]]", b"[[1, null, 3]]", b"[1, null, 3]"])
def test_missing_numbers_are_taken_where_the_model_takes_them(
    manifest: Manifest, raw: bytes
) -> None:
    for missing in ("all", (1,), (0, 1)):
        taken = manifest.model_copy(update={"missing": missing})
        (row,) = parse_inputs(raw, taken, where="x").tolist()
        assert (row[0], np.isnan(row[1]), row[2]) == (1, True, 3)
    for missing in (None, (2,)):
        refusing = manifest.model_copy(update={"missing": missing})
        with pytest.raises(DataError, match="got nan in input 0, column 1: this model takes no"):
            parse_inputs(raw, refusing, where="x")


def test_infinity_is_no_missing_number(manifest: Manifest) -> None:
    taken = manifest.model_copy(update={"missing": "all"})
    for raw in (b"[[1, 2, 3], [1, -Infinity, 3]]", b"[[1, 2, 3], [1, -1e39, 3]]"):
        with pytest.raises(DataError, match="in input 1, column 1: float32 cannot represent"):
            parse_inputs(raw, taken, where="x")
    with pytest.raises(DataError):
        parse_inputs(b'[[1, null, "3"]]', taken, where="x")


def test_the_manifest_lists_what_may_be_missing_and_else_says_nothing_of_it(
    manifest: Manifest,
) -> None:
    assert b"missing" not in manifest_bytes(manifest)
    for missing in ("all", (0, 2)):
        taken = manifest.model_copy(update={"missing": missing})
        assert parse_manifest(manifest_bytes(taken)) == taken
    raw = manifest_bytes(manifest.model_copy(update={"missing": "all"}))
    for wrong in ('"some"', "[]", "[-1]", str(2**31), str([0] * 5000)):
        with pytest.raises(TrustError):
            parse_manifest(raw.replace(b'"missing":"all"', f'"missing":{wrong}'.encode()))
