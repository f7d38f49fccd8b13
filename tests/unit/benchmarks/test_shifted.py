"""The benchmark of clouds that do not look like the devices: its checks, and two of its runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.shifted import CLOUD, GUARDED, Ended, checks_of, main, rows_of, run_once, table
from benchmarks.shifted_tasks import CLIENTS, WORKLOADS

BY_NAME = {workload.name: workload for workload in WORKLOADS}


def ended(**changed: Any) -> Ended:
    values: dict[str, Any] = {
        "workload": "writers",
        "variant": GUARDED,
        "seed": 0,
        "federated": 0.8,
        "finetuned": 0.82,
        "chosen": 0.81,
        "published": 0.81,
        "candidate": "fp32",
        "kept": True,
        "withheld": False,
        "seconds": 1.0,
    }
    return Ended(**values | changed)


@pytest.mark.parametrize(
    ("workload", "published", "holds"),
    [
        ("writers", (0.81, 0.80), True),
        ("writers", (0.83, 0.789), True),  # better on average
        ("writers", (0.795, 0.8), False),
        ("labels", (0.79, 0.79), True),
        ("labels", (0.83, 0.789), False),  # a seed is worse
    ],
)
def test_each_promise_can_break(workload: str, published: tuple[float, float], holds: bool) -> None:
    runs = [
        ended(workload=workload, published=each, seed=seed) for seed, each in enumerate(published)
    ]
    (check,) = checks_of(runs)
    assert check.holds is holds


def test_where_the_cloud_is_unlike_the_devices_no_gain_is_promised_and_no_baseline_counts() -> None:
    runs = [ended(workload="labels", published=0.795), ended(workload="labels", variant=CLOUD)]
    (check,) = checks_of(runs)
    assert check.holds
    assert checks_of(runs[1:]) == []
    gains = [row for row in rows_of(runs) if row.metric == "gain"]
    assert [row.median for row in gains] == pytest.approx([-0.005, 0.01])
    shown = {"rows": [row.__dict__ for row in rows_of(runs)], "checks": [check.__dict__]}
    assert "holds  labels: worst gain of a seed: -0.0050" in table(shown)


def test_the_gain_of_an_error_is_the_part_that_is_gone() -> None:
    assert ended(workload="engines", federated=0.12, published=0.09).gain == pytest.approx(0.25)
    assert ended(workload="engines", federated=0.12, published=0.15).gain == pytest.approx(-0.25)


def test_it_asks_for_its_data(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("FEDCORE_DATA", raising=False)
    assert main(["--out", str(tmp_path), "--seeds", "0"]) == 4
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_clients_gain_from_a_cloud_like_them(data_folder: Path) -> None:
    found = run_once(BY_NAME["writers"], GUARDED, seed=0, folder=data_folder)
    assert found.kept
    assert found.gain > 0.01


def test_cloud_clients_test_and_unseen_are_different_people(data_folder: Path) -> None:
    def images(examples: Any) -> set[bytes]:
        return {each.numpy().tobytes() for each in examples.tensors[0]}

    drawn = BY_NAME["writer"].make(data_folder, 1)
    task, loader = drawn.task, drawn.task.cloud_data
    assert loader is not None
    assert task.test_data is not None
    names = task.clients(data_folder)
    assert len(names) == CLIENTS
    clients = set().union(*(images(task.client_data(name, None)) for name in names))
    groups = [clients, *map(images, (loader(None), task.test_data(None), drawn.unseen))]
    assert len(set().union(*groups)) == sum(map(len, groups))
    again = BY_NAME["labels"].make(data_folder, 1).task.client_data(names[0], None)
    assert images(again) == images(task.client_data(names[0], None))  # one federation a seed
    other = BY_NAME["writer"].make(data_folder, 2).task.client_data(names[0], None)
    assert not images(other) & images(again)


def test_engines_of_cloud_clients_and_nobody_are_different(data_folder: Path) -> None:
    def windows(examples: Any) -> set[bytes]:
        return {each.numpy().tobytes() for each in examples.tensors[0]}

    drawn = BY_NAME["engines"].make(data_folder, 0)
    task = drawn.task
    assert task.cloud_data is not None
    assert task.cloud_heldout is not None
    clients = [windows(task.client_data(name, None)) for name in task.clients(None)]
    groups = [*clients, *map(windows, (task.cloud_data(None), task.cloud_heldout(None)))]
    assert len(clients) == 45
    groups.append(windows(drawn.unseen))
    assert len(set().union(*groups)) == sum(map(len, groups))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_guards_keep_what_the_cloud_alone_would_spoil(data_folder: Path) -> None:
    guarded, cloud = (
        run_once(BY_NAME["labels"], variant, seed=0, folder=data_folder)
        for variant in (GUARDED, CLOUD)
    )
    assert guarded.federated == cloud.federated > 0.8
    assert cloud.chosen < cloud.federated - 0.03
    assert guarded.chosen > guarded.federated - 0.01
