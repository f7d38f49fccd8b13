"""Training on an NVIDIA GPU gives what training on the CPU gives."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from fedcore.config.run import ClientConfig, Privacy
from fedcore.privacy.accounting import Charge
from fedcore.privacy.draws import SystemDraws
from fedcore.privacy.planning import PrivatePlan, plan
from fedcore.seeds import Simulated, torch_rng
from fedcore.task.definition import Examples
from fedcore.training.device import available
from fedcore.training.local import train
from fedcore.training.memory import free_bytes
from fedcore.training.private import train_private
from fedcore.updates.pack import pack
from tests.ways import way_of

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")


def examples() -> Examples:
    inputs = torch.randn(64, 6, generator=torch_rng(0, "data"))
    return TensorDataset(inputs, inputs[:, :3].argmax(1))  # type: ignore[return-value]


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))


def test_a_gpu_is_chosen_where_there_is_one() -> None:
    assert available("auto").type == "cuda"
    free = free_bytes(CUDA)
    assert free is not None
    assert free > 0


def test_plain_training_equals_that_of_the_cpu() -> None:
    trained = []
    for device in (torch.device("cpu"), CUDA):
        model = network().to(device)
        train(
            model,
            examples(),
            nn.functional.cross_entropy,
            ClientConfig(learning_rate=0.1),
            epochs=3,
            batch_size=16,
            rng=torch_rng(0, "order"),
        )
        trained.append(torch.from_numpy(pack(model)))
    assert torch.allclose(*trained, atol=1e-4)


def test_private_training_with_next_to_no_noise_equals_that_of_the_cpu() -> None:
    still = PrivatePlan(Charge(1, noise_multiplier=1e-9, sample_rate=0.25, steps=8), clip_norm=1.0)
    trained = []
    for device in (torch.device("cpu"), CUDA):
        model = network().to(device)
        train_private(
            nn.Identity(),
            model,
            examples(),
            nn.functional.cross_entropy,
            ClientConfig(learning_rate=0.1),
            still,
            method=way_of(model, nn.functional.cross_entropy, torch.zeros(6)),
            draws=Simulated(0).draws(device),
        )
        trained.append(torch.from_numpy(pack(model)))
    assert torch.allclose(*trained, atol=1e-4)


def test_noise_on_the_gpu_has_the_size_of_the_plan_and_is_fixed_by_the_seed() -> None:
    planned = plan(
        examples(),
        ClientConfig(batch_size=64),
        Privacy(unit="example", noise_multiplier=2.0, clip_norm=1e-6),
        round=1,
        participations=1,
    )
    start = nn.Linear(6, 2000).to(CUDA)
    moved = []
    for _ in range(2):
        model = copy.deepcopy(start)
        train_private(
            nn.Identity(),
            model,
            examples(),
            nn.functional.cross_entropy,
            ClientConfig(batch_size=64, learning_rate=64.0),
            planned,
            method=way_of(model, nn.functional.cross_entropy, torch.zeros(6)),
            draws=Simulated(0).draws(CUDA),
        )
        moved.append(torch.from_numpy(pack(model) - pack(start)))
    assert torch.equal(*moved)
    # 14,000 values: their deviation is within 4 % of the true one but for once in 10**10 seeds.
    assert moved[0].std().item() == pytest.approx(2.0 * 1e-6, rel=0.04)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_noise_of_the_system_reaches_sums_on_the_gpu(dtype: torch.dtype) -> None:
    sums = [torch.full((300, 7), 5.0, dtype=dtype, device=CUDA), torch.zeros((), device=CUDA)]
    SystemDraws().add_noise(sums, deviation=0.5, bound=5.0)
    assert [one.device.type for one in sums] == ["cuda", "cuda"]
    noise = sums[0].cpu().double() - 5
    # 2,100 values: farther out than 4.9 standard errors once in a million runs.
    assert abs(noise.mean().item()) < 4.9 * 0.5 / 2100**0.5
    assert noise.square().mean().sqrt().item() == pytest.approx(0.5, rel=4.9 / 4200**0.5)
    assert sums[1].item() != 0


def test_fine_tuning_in_one_process_improves_the_digits(tmp_path: Path) -> None:
    from fedcore.config.settings import load_run
    from fedcore.task.definition import load_task
    from fedcore.task.model import build_model
    from server.cloud import read_cloud_data
    from server.finetune.launch import fine_tune

    here = Path(__file__).parents[2] / "examples" / "digits" / "run.toml"
    run = load_run(here, ["finetune.processes=1", "finetune.max_metric_drop=1.0"])
    task = load_task(run.path(run.task))
    cloud = read_cloud_data(task, None, holdout=run.finetune.holdout, seed=run.seed)
    assert cloud is not None
    tuned = fine_tune(task, run, build_model(task, run), cloud)
    assert tuned.kept
    assert tuned.after > tuned.before
