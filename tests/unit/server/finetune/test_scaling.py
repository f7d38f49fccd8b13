"""How fine-tuning scales: the arithmetic of the report, and `fedcore finetune --report`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import TensorDataset

import fedcore
from fedcore.config.finetune import Finetune
from fedcore.errors import ConfigError, TrainingError
from server.finetune.costs import Costs, flops_per_example, matrix_peak
from server.finetune.scaling import ScalingReport, report_of
from server.finetune.timing import Timed
from tests.unit.server.finetune.conftest import command

ONE = Timed(1, 10, 320, 20.0, (19.0,), 1_000, True)
TWO = Timed(2, 20, 640, 25.0, (20.0, 24.0), 1_600, True)
COSTS = Costs(1_000_000, 6e6, None, 1e9, None, None)


def report(**changes: Any) -> ScalingReport:
    one, two = replace(COSTS, **changes), replace(COSTS, all_reduce_s=0.25, **changes)
    return report_of([(ONE, one), (TWO, two)], batch_size=32, price_per_hour=3.6)


def test_figures_follow_from_time_and_costs() -> None:
    one, two = report().rows
    assert (one.step_s, one.ideal_s, one.efficiency, one.communication) == (2.0, 2.0, 1.0, None)
    assert (two.step_s, two.ideal_s, two.efficiency) == (1.25, 1.0, 0.8)
    assert two.communication == pytest.approx(0.2)
    assert two.load_balance == pytest.approx(20 / 24)
    assert two.examples_per_s == pytest.approx(25.6)
    assert two.flops_utilisation == pytest.approx(6e6 * 25.6 / 2e9)
    assert two.cost_per_million == pytest.approx(1e-3 * 1e6 / 25.6)  # 0.001 a second


def test_text_counts_in_tokens_and_energy_by_step() -> None:
    one, _ = report(tokens_per_example=128, energy_j=500.0).rows
    assert one.tokens_per_s == pytest.approx(128 * 16)
    assert one.cost_per_million == pytest.approx(1e3 / (128 * 16))
    assert one.energy_per_step_j == 50.0
    found = report(tokens_per_example=128, energy_j=500.0).table()
    assert "tokens/s" in found
    assert "energy: not available" not in found


def test_what_is_not_known_is_left_out() -> None:
    found = report_of([(ONE, replace(COSTS, flops_per_example=None))], batch_size=32,
                      price_per_hour=None, problems=["2 workers: no memory"])  # fmt: skip
    (row,) = found.rows
    assert (row.flops_utilisation, row.cost_per_million) == (None, None)
    assert found.table().splitlines()[-2:] == [
        "energy: not available here",
        "2 workers: no memory",
    ]
    assert json.dumps(found.to_dict(), allow_nan=False)


def test_idle_processes_are_balanced() -> None:
    idle = replace(TWO, busy_s=(0.0, 0.0))
    found = report_of([(ONE, COSTS), (idle, COSTS)], batch_size=32, price_per_hour=None)
    assert found.rows[1].load_balance == 1.0


def test_the_plot_is_a_picture(tmp_path: Path) -> None:
    report().plot(tmp_path / "plot.png")
    with Image.open(tmp_path / "plot.png") as picture:
        assert picture.size == (750, 525)


def test_operations_are_those_of_the_products() -> None:
    data = TensorDataset(torch.zeros(8, 5), torch.zeros(8, dtype=torch.int64))
    loss = nn.functional.cross_entropy
    model: nn.Module = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3))
    cpu: Any = torch.device("cpu")
    found = flops_per_example(model, loss, data, cpu, rows=4)  # type: ignore[arg-type]
    # Forward and both gradients of each layer, but the gradient of the first one's inputs.
    assert found == 2 * (3 * 7 * 3 + 2 * 5 * 7)
    assert all(each.grad is None for each in model.parameters())
    assert matrix_peak(cpu) > 1e8


class Machine:
    """Times with one or two processes; more have no memory."""

    def time_and_cost(
        self, settings: Finetune, *, window_s: float, limit_s: float
    ) -> tuple[Timed, Costs]:
        if settings.processes > 2:
            raise TrainingError("no memory")
        return (ONE if settings.processes == 1 else TWO), COSTS


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def timing(run: Any, start: bytes) -> Iterator[Machine]:
        yield Machine()

    monkeypatch.setattr("server.finetune.scaling.timing_processes", timing)


@pytest.mark.usefixtures("machine")
def test_the_command_measures_and_trains_nothing(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ("--report", "--set", "finetune.processes=3", "--set", "finetune.price_per_hour=2.0")
    assert command(folder, *more) == 0
    said = capsys.readouterr().out
    assert "3 workers: no memory" in said
    assert [line.split()[0] for line in said.splitlines() if "80 %" in line] == ["2"]
    results = folder / "runs" / "run"
    kept = json.loads((results / "finetune_scaling.json").read_text())
    assert [row["workers"] for row in kept["rows"]] == [1, 2]
    assert (results / "finetune_scaling.png").is_file()
    assert not (results / "finetuned.safetensors").exists()
    assert command(folder, *more, "--json") == 0
    *events, last = map(json.loads, capsys.readouterr().out.splitlines())
    assert last["event"] == "scaling"
    assert [each["done"] for each in events if each["event"] == "stage_advanced"] == [1, 2, 3]


@pytest.mark.usefixtures("machine")
def test_what_cannot_be_measured_is_refused(folder: Path) -> None:
    model = folder / "runs" / "run" / "global.safetensors"
    with pytest.raises(ConfigError, match="measured on one machine"):
        fedcore.measure_scaling(
            None, folder / "run.toml", model, progress=False,
            finetune={"nodes": 2, "rendezvous": "a:1"},
        )  # fmt: skip
    found = fedcore.load_task(folder / "task.py")
    with pytest.raises(ConfigError, match="created in memory"):
        fedcore.measure_scaling(found, None, model, progress=False)


def test_a_report_is_not_measured_on_a_machine_that_joins(folder: Path) -> None:
    with pytest.raises(ConfigError, match="--report and --join"):
        command(folder, "--report", "--join")
