"""A client of a round, trained again from Python."""

from __future__ import annotations

import traceback
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import fedcore
from fedcore.errors import ConfigError
from fedcore.seeds import torch_rng

NAMES = ("anna", "ben", "cleo")
SETTINGS = {
    "federation": {"rounds": 3},
    "simulation": {"training": "loop", "workers": 1},
    "finetune": {"epochs": 0},
    "compression": {"timing_runs": 100, "candidates": ("fp32",)},
}


def data(name: str) -> TensorDataset:
    inputs = torch.randn(8, 4, generator=torch_rng(0, name))
    return TensorDataset(inputs, inputs.argmax(1))


def data_but_bens(name: str, folder: Path | None) -> TensorDataset:
    if name == "ben":
        raise ValueError("no such column")
    return data(name)


def task_of(client_data: object = lambda name, folder: data(name)) -> fedcore.Task:
    return fedcore.Task(
        name="tiny",
        kind="classification",
        model=lambda: nn.Sequential(nn.Linear(4, 4)),
        clients=lambda folder: NAMES,
        client_data=client_data,  # type: ignore[arg-type]
        test_data=lambda folder: data("test"),
        example_input=torch.zeros(4),
    )


def test_a_client_trains_as_it_did_in_the_round(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    result = fedcore.simulate(task_of(), progress=False, runs=tmp_path, **SETTINGS)
    capfd.readouterr()
    kept = sorted(path.name for path in (tmp_path / "tiny").iterdir())
    notes: list[str] = []
    losses = []
    for name in NAMES:
        found = fedcore.replay(
            task_of(), round=2, client=name, runs=tmp_path, on_note=notes.append, **SETTINGS
        )
        assert (found.ok, found.round, found.client, found.num_examples) == (True, 2, name, 8)
        losses.append(found.metrics["train_loss"])
    assert sum(losses) / 3 == pytest.approx(result.history.rounds[1].train_loss, rel=1e-6)
    assert f"client {NAMES[-1]!r} trained on 8 examples in " in found.line
    assert set(notes) <= {"Simulating rounds 1 to 1 again."}
    assert sorted(path.name for path in (tmp_path / "tiny").iterdir()) == kept
    said = capfd.readouterr()
    assert (said.out, said.err) == ("", "")


def test_a_failure_is_a_value_with_the_tasks_own_traceback(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    found = fedcore.replay(task_of(data_but_bens), round=1, client="ben", runs=tmp_path, **SETTINGS)
    assert not found.ok
    assert "no such column" in found.reason
    assert found.error is not None
    chain = "".join(traceback.format_exception(found.error))
    assert "data_but_bens" in chain
    assert found.line == f"round 1: {found.reason}"
    assert capfd.readouterr().out == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("round_", "client", "said"),
    [
        (0, "anna", "replay 0:anna: this run has rounds 1 to 3"),
        (4, "anna", "rounds 1 to 3"),
        (-1, "anna", "expected ROUND:CLIENT"),
        (1, "ana", "Did you mean 'anna'"),
    ],
)
def test_what_there_is_not_is_refused(tmp_path: Path, round_: int, client: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        fedcore.replay(task_of(), round=round_, client=client, runs=tmp_path, **SETTINGS)
