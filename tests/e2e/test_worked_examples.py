"""The worked examples run on made-up files of the form that their data have."""

from __future__ import annotations

import wave
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import fedcore

EXAMPLES = Path(__file__).parents[2] / "examples"
RNG = np.random.default_rng(0)


def hospitals(folder: Path) -> None:
    (folder / "heart_disease").mkdir()
    for name in ("cleveland", "hungarian", "switzerland", "va"):
        rows = RNG.integers(0, 5, size=(30, 14)).astype(str)
        rows[::7, 11] = "?"
        text = "\n".join(",".join(row) for row in rows)
        (folder / "heart_disease" / f"processed.{name}.data").write_text(text + "\n")


def air(folder: Path) -> None:
    (folder / "beijing_air").mkdir()
    for name in ("Dongsi", "Huairou"):
        hours = np.arange(3 * 365 * 24 + 200)
        rows = np.tile(np.sin(hours / 24)[:, None] + 2, (1, 18)).round(3).astype(str)
        rows[5::50, 5] = "NA"
        text = "\n".join(["heading", *(",".join(row) for row in rows)])
        path = folder / "beijing_air" / f"PRSA_Data_{name}_20130301-20170228.csv"
        path.write_text(text + "\n")


def text(folder: Path) -> None:
    (folder / "shakespeare_plays").mkdir()
    said = "KING HENRY\tSo shaken as we are,\n\tFind we a time for {0}\n\tAnd breathe short\n\n"
    prose = "FOOL\tIt is a word that\n\tis said of {0} and\n\tof nobody else.\n\n"
    plays = ("asyoulikeit", "hamlet", "kinghenryv", "othello", "tempest", "twelfthnight")
    for play in (*plays, "macbeth", "kinglear"):
        speeches = "".join((said if n % 2 else prose).format(f"{play} x" * n) for n in range(12))
        (folder / "shakespeare_plays" / f"{play}.txt").write_text(f"TITLE\n\n{speeches}")


def spoken_digits(folder: Path) -> None:
    (folder / "spoken_digits").mkdir()
    for speaker in ("george", "jackson", "lucas", "nicolas", "theo", "yweweler"):
        for digit in range(10):
            path = folder / "spoken_digits" / f"{digit}_{speaker}_0.wav"
            with wave.open(str(path), "wb") as file:
                file.setnchannels(1)
                file.setsampwidth(2)
                file.setframerate(8000)
                file.writeframes(RNG.integers(-999, 999, 3000).astype("<i2").tobytes())


@pytest.mark.slow
@pytest.mark.parametrize("write", [hospitals, air, text, spoken_digits])
def test_an_example_runs_for_a_round(
    write: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path)
    monkeypatch.setenv("FEDCORE_DATA", str(tmp_path))
    folder = EXAMPLES / write.__name__
    assert len((folder / "task.py").read_text().splitlines()) <= 60
    result = fedcore.simulate(
        None,
        folder / "run.toml",
        progress=False,
        federation={"rounds": 1},
        simulation={"training": "loop", "workers": 1},
        compression={"timing_runs": 100},
    )
    (round_,) = result.history.rounds
    assert round_.updates == round_.cohort > 1
    assert 0 <= result.metrics[result.record.primary]["federated"] < 10


def test_an_example_without_its_data_says_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FEDCORE_DATA", raising=False)
    for name in ("hospitals", "air", "text", "spoken_digits"):
        with pytest.raises(fedcore.FedcoreError, match="set the environment variable FEDCORE_DATA"):
            fedcore.simulate(None, EXAMPLES / name / "run.toml", progress=False)
