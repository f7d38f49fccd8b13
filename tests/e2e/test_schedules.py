"""A run whose settings change from round to round, in a simulation."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import fedcore
from fedcore.errors import ConfigError
from fedcore.seeds import torch_rng
from server.api.result import Result

_RUN: dict[str, Any] = {
    "name": "tiny",
    "task": "task.py",
    "seed": 3,
    "federation": {"rounds": 3, "cohort": 3},
    "client": {"batch_size": 8},
    "finetune": {"epochs": 0},
    "compression": {"candidates": ("fp32",), "timing_runs": 100},
    "simulation": {"workers": 1},
}


def _data(name: str, folder: Path | None) -> TensorDataset:
    rng = torch_rng(0, name)
    targets = torch.randint(3, (20,), generator=rng)
    inputs = nn.functional.one_hot(targets, 5) + 0.3 * torch.randn(20, 5, generator=rng)
    return TensorDataset(inputs, targets)


TASK = fedcore.Task(
    name="tiny",
    kind="classification",
    model=lambda: nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3)),
    clients=lambda folder: [f"client-{number}" for number in range(6)],
    client_data=_data,  # type: ignore[arg-type]
    test_data=lambda folder: _data("test", folder),  # type: ignore[arg-type, return-value]
    example_input=torch.zeros(5),
)


def run(*, task: fedcore.Task = TASK, **settings: Any) -> Result:
    """Simulates the tiny run with these settings."""
    values = {
        key: value | settings.pop(key, {}) for key, value in _RUN.items() if type(value) is dict
    }
    return fedcore.simulate(task, fedcore.RunConfig.model_validate(_RUN | values), **settings)


class Counting(nn.Module):
    """The same model with a counter, as a checkpoint of another version would not have it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = TASK.model()
        self.register_buffer("count", torch.zeros((), dtype=torch.long))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)  # type: ignore[no-any-return]


class Doubled(fedcore.Algorithm):
    """Doubles the learning rate of the round."""

    def configure(self, round: Any, clients: Any, state: Any) -> fedcore.ClientSettings:
        return fedcore.ClientSettings(learning_rate=2 * round.client.learning_rate)

    def step(self, round: Any, weights: Any, mean: Any, state: Any) -> Any:
        return mean, state


def _bits(result: Result) -> bytes:
    return b"".join(one.numpy().tobytes() for one in result.federated.state_dict().values())


@pytest.mark.parametrize("training", ["loop", "vectorised"])
def test_each_round_trains_with_its_own_values_and_records_them(training: str) -> None:
    schedule = {"learning_rate": (0.2, 0.1), "epochs": (2, 1, 1)}
    how = {"simulation": {"training": training}}
    scheduled = run(client={"schedule": schedule}, **how)
    rows = scheduled.history.rows()
    assert [(row["learning_rate"], row["epochs"]) for row in rows] == [(0.2, 2), (0.1, 1), (0.1, 1)]
    first = run(client={"learning_rate": 0.2, "epochs": 2}, federation={"rounds": 1}, **how)
    same = run(client={"schedule": schedule}, federation={"rounds": 1}, **how)
    assert _bits(first) == _bits(same) != _bits(scheduled)
    assert "learning_rate" not in first.history.rows()[0]


def test_what_an_algorithm_sends_takes_precedence_over_the_schedule() -> None:
    client = {"schedule": {"learning_rate": (0.2, 0.1), "epochs": (2, 1)}}
    how = {"federation": {"rounds": 2}, "simulation": {"training": "loop"}}
    found = run(client=client, strategy=Doubled(), **how)
    assert [one.client for one in found.record.rounds] == [
        {"learning_rate": 0.4, "epochs": 2},
        {"learning_rate": 0.2, "epochs": 1},
    ]
    client = {"schedule": {"learning_rate": (0.4, 0.2), "epochs": (2, 1)}}
    assert _bits(run(client=client, **how)) == _bits(found)


def _kept(folder: Path, rounds: int, *, resume: bool = False, **settings: Any) -> Result:
    federation = {"rounds": rounds, "strategy": "FedAdam"} | settings.pop("federation", {})
    return run(runs=folder, resume=resume, federation=federation, **settings)


@pytest.mark.parametrize("unit", ["none", "example"])
def test_a_complete_run_goes_on_to_more_rounds_with_the_bits_of_a_longer_one(
    tmp_path: Path, unit: str
) -> None:
    privacy = {"unit": unit, "noise_multiplier": 1.0, "target_delta": 1e-3, "max_epsilon": 1e3}
    client = {"schedule": {"learning_rate": {"kind": "step", "every": 2, "factor": 0.5}}}
    how: dict[str, Any] = {"client": client, "privacy": privacy}
    first = _kept(tmp_path / "short", 2, **how)
    longer = _kept(tmp_path / "short", 5, resume=True, **how)
    whole = _kept(tmp_path / "whole", 5, **how)
    assert _bits(longer) == _bits(whole) != _bits(first)
    rows, expected = (one.history.rows() for one in (longer, whole))
    assert [row["learning_rate"] for row in rows] == [row["learning_rate"] for row in expected]
    assert [row["round"] for row in rows] == [1, 2, 3, 4, 5]
    assert longer.summary["rounds"] == 5
    assert '"rounds": 5' in (tmp_path / "short" / "tiny" / "run.json").read_text()
    with pytest.raises(ConfigError, match="this run is complete: its results are in summary"):
        _kept(tmp_path / "short", 5, resume=True, **how)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"client": {"schedule": {"learning_rate": "cosine"}}}, "is a cosine over all rounds"),
        (
            {"privacy": {"unit": "example", "target_delta": 1e-3}},
            "'auto' without privacy.participations plans noise for all rounds",
        ),
        ({"client": {"epochs": 2}}, "client.epochs (1 then, 2 now)"),
        ({"federation": {"rounds": 1}}, "but round 2 of this run is complete"),
        ({"strategy": Doubled()}, "may use the number of rounds"),
    ],
)
def test_where_the_bits_would_differ_a_run_is_not_extended(
    tmp_path: Path, settings: dict[str, Any], said: str
) -> None:
    changed = "federation" in settings or "epochs" in settings.get("client", {})
    _kept(tmp_path, 2, **({} if changed else dict(settings)))
    checkpoint = (tmp_path / "tiny" / "checkpoint.safetensors").read_bytes()
    with pytest.raises(ConfigError) as caught:
        _kept(tmp_path, 4, resume=True, **dict(settings))
    assert said in str(caught.value)
    assert (tmp_path / "tiny" / "checkpoint.safetensors").read_bytes() == checkpoint
    assert (tmp_path / "tiny" / "summary.json").exists()


def test_a_checkpoint_of_other_weights_is_refused_and_removes_no_results(tmp_path: Path) -> None:
    _kept(tmp_path, 2)
    results = {path.name for path in (tmp_path / "tiny").iterdir()}
    with pytest.raises(ConfigError, match=r"has 75 weights and other numbers .* expected 76"):
        _kept(tmp_path, 4, resume=True, task=replace(TASK, model=Counting))
    assert {path.name for path in (tmp_path / "tiny").iterdir()} == results
    assert "summary.json" in results
