from __future__ import annotations

import os
from pathlib import Path

import pytest

from server.finetune.parallel import threads_of
from server.process.cores import usable_cores

CORES = len(os.sched_getaffinity(0))


@pytest.fixture
def group(tmp_path: Path) -> Path:
    """The control group of a process in a container."""
    (tmp_path / "of_process").write_text("0::/pod/container\n")
    folder = tmp_path / "cgroup" / "pod" / "container"
    folder.mkdir(parents=True)
    return folder


def cores(root: Path) -> int:
    return usable_cores(root / "cgroup", root / "of_process")


def test_without_a_quota_every_core_of_the_affinity_counts(tmp_path: Path, group: Path) -> None:
    assert cores(tmp_path) == CORES
    (group / "cpu.max").write_text("max 100000\n")
    assert cores(tmp_path) == CORES


@pytest.mark.parametrize("quota", ["50000 100000", "100000 100000"])
def test_a_quota_of_the_container_or_of_what_holds_it_counts(
    tmp_path: Path, group: Path, quota: str
) -> None:
    (group.parent / "cpu.max").write_text(quota)
    assert cores(tmp_path) == 1


def test_a_quota_of_the_first_version_of_control_groups_counts(tmp_path: Path, group: Path) -> None:
    folder = tmp_path / "cgroup" / "cpu"
    folder.mkdir()
    (folder / "cpu.cfs_period_us").write_text("100000")
    for quota, expected in (("-1", CORES), ("90000", 1)):
        (folder / "cpu.cfs_quota_us").write_text(quota)
        assert cores(tmp_path) == expected


def test_what_is_no_quota_is_none(tmp_path: Path, group: Path) -> None:
    for text in ("", "max", "0 0", "a b", "1 2 3"):
        (group / "cpu.max").write_text(text)
        assert cores(tmp_path) == CORES


def test_threads_of_fine_tuning_are_those_that_the_user_asks_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("server.finetune.parallel.usable_cores", lambda: 8)
    for asked, expected in (("1", 1), ("3", 3), ("2,1", 2), ("", 4), ("0", 4), ("many", 4)):
        monkeypatch.setenv("OMP_NUM_THREADS", asked)
        assert threads_of(2) == expected
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert [threads_of(world) for world in (1, 2, 16)] == [8, 4, 1]
