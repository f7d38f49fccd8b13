"""Several machines that train together, as groups of processes on this one."""

from __future__ import annotations

import socket
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedcore.config.run import RunConfig
from fedcore.errors import ConfigError, TrainingError
from fedcore.task.model import build_model, checkpoint_bytes
from server.finetune.agent import launch
from server.finetune.control import Group
from server.finetune.job import Job
from server.finetune.nodes import check_alike, share_weights, shared_place
from tests.unit.server.finetune.conftest import Grouped, make_run, make_task


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def run_of(rank: int = 0, **settings: Any) -> RunConfig:
    return make_run(nodes=2, rendezvous="localhost:29400", processes=1 + rank, **settings)


def test_the_node_with_the_model_is_found_wherever_it_is(in_group: Grouped) -> None:
    def work(rank: int, world: int, joining: tuple[int, ...]) -> int:
        return check_alike(Group(rank, world), run_of(rank), joins=rank in joining)

    for joining, source in (((0,), 1), ((1, 2), 0), ((), 0)):
        assert in_group(3, partial(work, joining=joining)) == [source] * 3
    with pytest.raises(ConfigError, match="every node joins"):
        in_group(2, partial(work, joining=(0, 1)))


def test_other_settings_are_refused(in_group: Grouped) -> None:
    def work(rank: int, world: int) -> int:
        return check_alike(Group(rank, world), run_of(rank, epochs=2 + rank), joins=False)

    with pytest.raises(ConfigError, match="different settings"):
        in_group(2, work)


def test_weights_and_the_name_of_checkpoints_come_from_the_node_with_the_model(
    in_group: Grouped, tmp_path: Path
) -> None:
    def work(rank: int, world: int, shared: bool) -> Any:
        group, model = Group(rank, world), build_model(make_task(), make_run())
        with torch.no_grad():
            for each in model.parameters():
                each.add_(rank)
        share_weights(group, model, source=1)
        folder = tmp_path if shared else tmp_path / str(rank)
        place = shared_place(group, str(folder / f"{rank:032x}"), source=1)
        return checkpoint_bytes(model), place

    (one, place), (other, same) = in_group(2, partial(work, shared=True))
    assert one == other
    assert place == same == tmp_path / f"{1:032x}"
    with pytest.raises(ConfigError, match="do not share the folder"):
        in_group(2, partial(work, shared=False))
    assert np.isfinite(len(one))


@pytest.mark.parametrize(
    ("host", "hosts"),
    [("localhost", True), ("127.0.0.2", False), ("nowhere.invalid", True)],
    ids=["the host waits", "nobody is there", "a name that nobody knows"],
)
def test_a_rendezvous_that_never_fills_ends_with_the_remedy(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], host: str, hosts: bool
) -> None:
    port = free_port()
    run = make_run(nodes=2, rendezvous=f"{host}:{port}", rendezvous_s=2.0)
    job = Job(run.model_dump_json(), str(tmp_path), (), str(tmp_path), (), (), joins=not hosts)
    started_s = time.monotonic()
    with pytest.raises(TrainingError, match=rf"2 nodes did not meet at {host}:{port} within"):
        launch(job)
    assert time.monotonic() - started_s < 60
    assert "frame #" not in capfd.readouterr().err  # nor a stack of torch's store
    with socket.socket() as again:  # the port is free again
        again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        again.bind(("127.0.0.1", port))


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"processes": 9}, "batch_size = 8 is less than the 9 processes"),
        ({"processes": 3, "nodes": 3, "rendezvous": "a:1"}, "less than the 9 processes"),
        ({"nodes": 2}, "needs finetune.rendezvous"),
        ({"nodes": 2, "rendezvous": "nowhere"}, "rendezvous"),
    ],
)
def test_a_world_that_does_not_fit_is_refused(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        make_run(**settings)


def test_more_processes_than_gpus_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    run = make_run(processes=2)
    with pytest.raises(ConfigError, match="needs a GPU of its own, and there are 1"):
        launch(Job(run.model_dump_json(), str(tmp_path), (), str(tmp_path), (), ()))
