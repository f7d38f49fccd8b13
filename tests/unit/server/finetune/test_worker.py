"""One process of fine-tuning, run in this one as torchrun would start it."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fedcore.config.run import RunConfig
from fedcore.errors import InsufficientMemory, TrainingDiverged, TrainingError
from fedcore.task.definition import load_task
from fedcore.task.model import build_model, checkpoint_bytes
from server.finetune.job import Job, trained
from server.finetune.worker import work

TASK = """
import time
import torch
from torch import nn
from torch.utils.data import TensorDataset
from fedcore import Task

rng = torch.Generator().manual_seed(0)
targets = torch.randint(3, (90,), generator=rng)
data = TensorDataset(
    nn.functional.one_hot(targets, 5) + 0.3 * torch.randn(90, 5, generator=rng), targets
)


def loss(outputs, targets):
    value = nn.functional.cross_entropy(outputs, targets)
    {loss}
    return value


task = Task(
    name="tiny",
    kind="classification",
    model=lambda: nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.2), nn.ReLU(), nn.Linear(8, 3)),
    clients=lambda folder: ["anna"],
    client_data=lambda client, folder: data,
    cloud_data=lambda folder: data,
    test_data=lambda folder: data,
    example_input=torch.zeros(5),
    loss=loss,
)
"""


@pytest.fixture(autouse=True)
def _one_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    told = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_PORT": str(port)}
    for name, value in (told | {"MASTER_ADDR": "localhost"}).items():
        monkeypatch.setenv(name, value)
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    yield
    torch.set_num_threads(threads)
    torch.set_rng_state(state)


def make_job(folder: Path, *, loss: str = "", starts: int = 1, **settings: Any) -> Job:
    (folder / "task.py").write_text(TASK.replace("{loss}", loss))
    finetune = {"epochs": 3, "batch_size": 16} | settings
    run = RunConfig.model_validate({"name": "run", "task": "task.py", "finetune": finetune})
    task = load_task(folder / "task.py")
    paths = [folder / f"start-{number}.safetensors" for number in range(starts)]
    for number, path in enumerate(paths):
        start = build_model(task, run.model_copy(update={"seed": number}))
        path.write_bytes(checkpoint_bytes(start))
    started = tuple(map(str, paths))
    models = tuple(f"round {number}" for number in range(starts))
    places = (None,) * starts
    return Job(run.model_dump_json(), str(folder), started, str(folder), models, places)


def told(job: Job) -> dict[str, Any]:
    said: dict[str, Any] = json.loads(job.error_file(0).read_text())
    return said


def test_each_start_is_trained_into_a_file_beside_it(tmp_path: Path) -> None:
    job = make_job(tmp_path, starts=2)
    work(job)
    for start in map(Path, job.starts):
        before, after = load_file(start), load_file(trained(start))
        assert before.keys() == after.keys()
        moved = [name for name in before if not torch.equal(before[name], after[name])]
        assert moved == list(before)
        assert all(torch.isfinite(tensor).all() for tensor in after.values())
    assert not job.error_file(0).exists()


def test_every_optimiser_and_the_bound_of_gradients_apply(tmp_path: Path) -> None:
    results = []
    for name, settings in {
        "plain": {},
        "nesterov": {"nesterov": True},
        "clipped": {"max_grad_norm": 1e-3},
        "adamw": {"optimizer": "adamw", "weight_decay": 0.5},
        "adam": {"optimizer": "adam", "weight_decay": 0.5},
    }.items():
        (tmp_path / name).mkdir()
        job = make_job(tmp_path / name, epochs=1, remember=0.0, **settings)
        work(job)
        before, after = (load_file(path) for path in (job.starts[0], trained(Path(job.starts[0]))))
        results.append(torch.cat([(after[key] - before[key]).flatten() for key in before]))
    moved = [one.norm().item() for one in results]
    assert len(set(moved)) == 5
    assert moved[2] < 0.01 * moved[0]


def test_the_seed_fixes_every_bit(tmp_path: Path) -> None:
    results = []
    for number in (1, 2):
        folder = tmp_path / str(number)
        folder.mkdir()
        job = make_job(folder)
        torch.manual_seed(number)  # what came before has no influence
        work(job)
        results.append(trained(Path(job.starts[0])).read_bytes())
    assert results[0] == results[1]


def test_a_job_survives_being_sent(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    assert job.config.base == tmp_path
    assert job.config.finetune.batch_size == 16


def test_a_loss_that_turns_nan_is_told_as_what_it_is(tmp_path: Path) -> None:
    job = make_job(tmp_path, loss="value = value * float('nan')")
    with pytest.raises(TrainingDiverged):
        work(job)
    assert told(job)["type"] == "TrainingDiverged"
    assert "the loss was nan" in told(job)["message"]
    assert not trained(Path(job.starts[0])).exists()


def test_an_error_of_the_tasks_code_is_told_with_the_way_out(tmp_path: Path) -> None:
    job = make_job(tmp_path, loss="raise OSError('no such disk')")
    with pytest.raises(OSError, match="no such disk"):
        work(job)
    assert told(job) == {
        "type": "TrainingError",
        "message": "fine-tuning: process 0 failed: OSError: no such disk. The federated model "
        "is kept; correct the task, or set finetune.epochs to 0.",
        "final": True,
    }


def test_a_batch_that_does_not_fit_memory_is_told_with_the_way_out(tmp_path: Path) -> None:
    job = make_job(tmp_path, loss="torch.empty(1 << 56, dtype=torch.uint8)")
    with pytest.raises(InsufficientMemory, match=r"memory ran out .* finetune\.accumulate_steps"):
        work(job)
    assert told(job)["type"] == "InsufficientMemory"
    assert told(job)["final"]
    assert not torch.distributed.is_initialized()


def test_more_time_than_allowed_ends_it_in_the_middle_of_an_epoch(tmp_path: Path) -> None:
    job = make_job(tmp_path, loss="time.sleep(0.05)", timeout_s=0.08, epochs=1000)
    with pytest.raises(TrainingError, match=r"0 of 1000 epochs were completed within .* = 0\.08"):
        work(job)
    assert told(job)["type"] == "TrainingError"
    assert not torch.distributed.is_initialized()


def test_what_is_done_in_time_is_kept(tmp_path: Path) -> None:
    job = make_job(tmp_path, epochs=1, timeout_s=60.0)
    work(job)
    assert trained(Path(job.starts[0])).exists()
