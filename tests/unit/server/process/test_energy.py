from __future__ import annotations

from pathlib import Path

from server.process.energy import gpu_joules, joules_between, package_counters


def zone(folder: Path, name: str, microjoules: object, limit: object = 999) -> None:
    (folder / name).mkdir(exist_ok=True)
    (folder / name / "energy_uj").write_text(f"{microjoules}\n")
    (folder / name / "max_energy_range_uj").write_text(f"{limit}\n")


def test_packages_count_and_their_parts_do_not(tmp_path: Path) -> None:
    zone(tmp_path, "intel-rapl:0", 2_000_000, 10_000_000)
    zone(tmp_path, "intel-rapl:1", 9_500_000, 9_999_999)
    zone(tmp_path, "intel-rapl:0:0", 1)
    zone(tmp_path, "intel-rapl:2", "damaged")
    before = package_counters(tmp_path)
    assert set(before) == {"intel-rapl:0", "intel-rapl:1"}
    zone(tmp_path, "intel-rapl:0", 3_500_000, 10_000_000)
    zone(tmp_path, "intel-rapl:1", 500_000, 9_999_999)  # started again
    assert joules_between(before, package_counters(tmp_path)) == 2.5


def test_a_machine_without_counters_says_nothing(tmp_path: Path) -> None:
    assert package_counters(tmp_path) == {}
    assert joules_between({}, {}) is None
    assert gpu_joules(10_000) is None
