from __future__ import annotations

import json
import math
import re
from dataclasses import asdict
from pathlib import Path

import pytest
from flwr.common.constant import HEARTBEAT_DEFAULT_INTERVAL, HEARTBEAT_PATIENCE
from pydantic import ValidationError

from fedcore.config.run import FederationConfig, RunConfig
from fedcore.config.settings import load_run
from fedcore.config.simulated import DeviceClass, Simulation
from fedcore.errors import ConfigError, DataError
from server.simulation.virtual.devices import (
    SILENCE_S,
    Fate,
    VirtualDevice,
    VirtualFleet,
    class_of,
    device_of,
    fate,
    first_of,
    is_reached,
    read_fleet,
    resolve_round,
)

DOCS = Path(__file__).parents[5] / "docs" / "simulation.md"
HEADER = "client,examples_per_s,download_mbit_s,upload_mbit_s,available_from_s,available_until_s\n"
PHONE = DeviceClass(
    name="phone",
    examples_per_s=100.0,
    download_mbit_s=8.0,
    upload_mbit_s=2.0,
    latency_s=0.5,
)


def run_with(simulation: Simulation, *, base: Path = Path(), quorum: float = 0.1) -> RunConfig:
    federation = FederationConfig(quorum=quorum)
    return RunConfig(
        name="x", task="t.py", seed=7, simulation=simulation, federation=federation, base=base
    )


def fleet_of(*classes: DeviceClass) -> VirtualFleet:
    return VirtualFleet(7, classes)


def traced(folder: Path, rows: str, clients: tuple[str, ...] = ("a",)) -> VirtualFleet:
    (folder / "devices.csv").write_text(HEADER + rows)
    fleet = read_fleet(run_with(Simulation(trace="devices.csv"), base=folder), clients)
    assert fleet is not None
    return fleet


def meets(fleet: VirtualFleet, client: str = "a", *, number: int = 1, clock_s: float = 0.0) -> Fate:
    """A client with 200 examples, 2 epochs, 1 MB down and 0.5 MB up."""
    return fate(
        fleet,
        client,
        number,
        clock_s=clock_s,
        examples=200,
        epochs=2,
        bytes_down=1_000_000,
        bytes_up=500_000,
    )


def done(client: str, finish_s: float) -> Fate:
    return Fate(client, "done", 1.0, 2.0, finish_s, lost_s=math.inf, bytes_down=100, bytes_up=10)


def lost(client: str, at_s: float) -> Fate:
    return Fate(client, "dropped", 1.0, 20.0, 30.0, lost_s=at_s, bytes_down=100, bytes_up=0)


def away(client: str) -> Fate:
    return Fate(client, "unavailable", 0.0, 0.0, 0.0, lost_s=0.0, bytes_down=0, bytes_up=0)


def test_a_device_waits_downloads_trains_and_uploads_one_after_the_other() -> None:
    one = meets(fleet_of(PHONE))
    assert one.outcome == "done"
    assert one.start_s == pytest.approx(0.5 + 1.0)  # 8 Mbit at 8 Mbit/s
    assert one.trained_s == pytest.approx(1.5 + 4.0)  # 400 passes at 100/s
    assert one.finish_s == pytest.approx(5.5 + 2.0)  # 4 Mbit at 2 Mbit/s
    assert (one.bytes_down, one.bytes_up) == (1_000_000, 500_000)


def test_without_spread_all_devices_of_a_class_are_alike() -> None:
    fleet = fleet_of(PHONE)
    assert {device_of(fleet, f"c{i}") for i in range(50)} == {VirtualDevice(100.0, 8.0, 2.0, 0.5)}


def test_with_spread_a_device_is_poor_in_both_directions_or_in_none() -> None:
    fleet = fleet_of(PHONE.model_copy(update={"bandwidth_spread": 1.0, "speed_spread": 1.0}))
    devices = [device_of(fleet, f"c{i}") for i in range(50)]
    assert len({device.examples_per_s for device in devices}) == 50
    assert len({device.download_mbit_s for device in devices}) == 50
    for device in devices:
        assert device.download_mbit_s / device.upload_mbit_s == pytest.approx(4.0)
        assert device.latency_s == 0.5


def test_a_client_keeps_its_device_and_meets_another_fate_in_each_round() -> None:
    fleet = fleet_of(PHONE.model_copy(update={"availability": 0.5, "dropout": 0.5}))
    fates = [meets(fleet, number=number) for number in range(1, 40)]
    assert {one.outcome for one in fates} == {"done", "unavailable", "dropped"}
    assert {one.finish_s for one in fates if one.outcome != "unavailable"} == {7.5}


def test_a_device_that_vanishes_does_so_before_it_finishes_and_uploads_nothing() -> None:
    fleet = fleet_of(PHONE.model_copy(update={"dropout": 0.5}))
    dropped = [one for n in range(1, 60) if (one := meets(fleet, number=n)).outcome == "dropped"]
    assert len(dropped) > 10
    assert all(0 < one.lost_s < one.finish_s for one in dropped)
    assert all((one.bytes_down, one.bytes_up) == (1_000_000, 0) for one in dropped)


def test_who_is_not_reached_is_asked_for_none_of_its_data() -> None:
    fleet = fleet_of(PHONE.model_copy(update={"availability": 0.5}))
    for number in range(1, 40):
        one = meets(fleet, number=number)
        assert is_reached(fleet, "a", number, clock_s=0.0) == (one.outcome != "unavailable")
        if one.outcome == "unavailable":
            assert (one.bytes_down, one.bytes_up, one.lost_s) == (0, 0, 0.0)


def test_no_registered_client_is_looked_at_where_there_is_no_trace() -> None:
    clients = iter(["a"])
    assert read_fleet(run_with(Simulation(devices=(PHONE,))), clients) == VirtualFleet(7, (PHONE,))
    assert next(clients) == "a"


def test_a_run_that_describes_no_devices_has_no_fleet() -> None:
    assert read_fleet(run_with(Simulation()), ["a"]) is None


def test_a_trace_says_what_a_client_is_in_each_of_its_windows(tmp_path: Path) -> None:
    fleet = traced(tmp_path, "a,50,8,2,100,200\na,100,8,2,0,60\n")
    assert meets(fleet).trained_s == pytest.approx(1.0 + 4.0)
    assert meets(fleet, clock_s=100.0).trained_s == pytest.approx(1.0 + 8.0)


@pytest.mark.parametrize(
    ("clock_s", "outcome"),
    [
        (0.0, "unavailable"),
        (9.999, "unavailable"),
        (10.0, "done"),
        (23.0, "done"),  # finishes at the very end
        (23.001, "dropped"),
        (29.999, "dropped"),
        (30.0, "unavailable"),
        (1e9, "unavailable"),
    ],
)
def test_a_window_opens_and_closes(tmp_path: Path, clock_s: float, outcome: str) -> None:
    fleet = traced(tmp_path, "a,100,8,2,10,30\n")  # takes 7 s
    assert meets(fleet, clock_s=clock_s).outcome == outcome


def test_who_is_lost_when_its_window_closes_is_lost_then(tmp_path: Path) -> None:
    one = meets(traced(tmp_path, "a,100,8,2,10,30\n"), clock_s=25.0)
    assert one.lost_s == pytest.approx(5.0)
    assert one.bytes_up == 0


def test_a_client_without_a_row_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"devices\.csv: client 'b' has no row .* lists 1 client"):
        traced(tmp_path, "a,100,8,2,0,inf\n", clients=("a", "b"))


def test_a_trace_may_name_clients_that_the_run_has_not(tmp_path: Path) -> None:
    fleet = traced(tmp_path, "a,100,8,2,0,inf\nz,100,8,2,0,inf\n")
    assert meets(fleet).outcome == "done"


def test_a_round_ends_with_its_last_finisher_when_all_answer() -> None:
    ended = resolve_round([done("a", 5.0), done("b", 9.0), done("c", 7.0)], deadline_s=60.0)
    assert ended.finishers == ("a", "b", "c")
    assert ended.wasted_clients == ()
    assert ended.record.simulated_s == 9.0
    assert (ended.record.bytes_down, ended.record.bytes_up) == (300, 30)
    assert ended.record.bytes_wasted == 0


def test_a_straggler_keeps_the_round_waiting_until_the_deadline() -> None:
    ended = resolve_round([done("a", 5.0), done("b", 60.0), done("c", 60.5)], deadline_s=60.0)
    assert ended.finishers == ("a", "b")
    assert ended.wasted_clients == ("c",)
    assert ended.record.simulated_s == 60.0
    assert ended.record.stragglers == 1
    assert ended.record.bytes_up == 30  # the straggler's upload crossed the network for nothing
    assert ended.record.bytes_wasted == 110


def test_the_first_updates_end_a_round_that_asked_more() -> None:
    fates = [done("a", 50.0), away("b"), done("c", 7.0), done("d", 70.0), done("e", 9.0)]
    enough = first_of(fates, 2, deadline_s=60.0)
    assert [one.client for one in enough] == ["c", "e"]
    ended = resolve_round(fates, deadline_s=60.0, enough=enough)
    assert ended.finishers == ("c", "e")
    assert ended.wasted_clients == ("a", "d")
    assert ended.record.simulated_s == 9.0, "nobody else is waited for"
    assert (ended.record.stragglers, ended.record.unavailable) == (2, 1)
    assert ended.record.bytes_wasted == 220
    assert [one.client for one in first_of(fates, 9, deadline_s=60.0)] == ["c", "e", "a"]


def test_of_updates_that_arrive_together_those_asked_first_are_taken() -> None:
    fates = [done(name, 5.0) for name in "abc"]
    ended = resolve_round(fates, deadline_s=60.0, enough=first_of(fates, 2, deadline_s=60.0))
    assert ended.finishers == ("a", "b")
    assert ended.record.stragglers == 1


def test_a_lost_device_keeps_the_round_waiting_until_its_silence_is_noticed() -> None:
    ended = resolve_round([done("a", 5.0), lost("b", 25.0)], deadline_s=600.0)
    assert ended.record.simulated_s == 25.0 + SILENCE_S
    assert (
        resolve_round([done("a", 90.0), lost("b", 25.0)], deadline_s=600.0).record.simulated_s
        == 90.0
    )
    assert (
        resolve_round([done("a", 5.0), lost("b", 1.0)], deadline_s=20.0).record.simulated_s == 20.0
    )


def test_nobody_waits_for_a_device_that_was_never_reached() -> None:
    ended = resolve_round([done("a", 5.0), away("b")], deadline_s=600.0)
    assert (ended.record.simulated_s, ended.record.unavailable) == (5.0, 1)
    assert resolve_round([away("a"), away("b")], deadline_s=600.0).record.simulated_s == 0.0


def test_who_is_lost_is_counted_by_how() -> None:
    fates = [lost("a", 0.5), away("b"), lost("c", 10.0), lost("d", 25.0), done("e", 3.0)]
    ended = resolve_round(fates, deadline_s=60.0)
    assert ended.finishers == ("e",)
    assert ended.wasted_clients == ("c", "d")  # a vanished while it was downloading
    record = ended.record
    assert (record.unavailable, record.dropped, record.stragglers) == (1, 3, 0)
    assert (record.bytes_down, record.bytes_up, record.bytes_wasted) == (400, 10, 300)


def test_a_round_of_nobody_takes_no_time() -> None:
    assert resolve_round([], deadline_s=60.0).record.simulated_s == 0.0


def test_without_a_deadline_nobody_is_late_and_the_round_still_ends() -> None:
    ended = resolve_round([done("a", 1e9), away("b")], deadline_s=math.inf)
    assert ended.finishers == ("a",)
    assert ended.record.simulated_s == 1e9


def test_the_record_can_be_written_as_json() -> None:
    record = resolve_round([done("a", 1.0), away("b"), lost("c", 2.0)], deadline_s=60.0).record
    assert json.loads(json.dumps(asdict(record), allow_nan=False)) == asdict(record)


def test_silence_lasts_as_long_as_flower_takes_to_notice_it() -> None:
    assert SILENCE_S == HEARTBEAT_PATIENCE * HEARTBEAT_DEFAULT_INTERVAL


@pytest.mark.parametrize(
    "wrong",
    [
        {"examples_per_s": 0.0},
        {"examples_per_s": math.inf},
        {"examples_per_s": math.nan},
        {"share": 0.0},
        {"speed_spread": -0.1},
        {"speed_spread": 3.1},
        {"download_mbit_s": -1.0},
        {"upload_mbit_s": 0.0},
        {"bandwidth_spread": 9.0},
        {"latency_s": -1.0},
        {"availability": 0.0},
        {"availability": 1.1},
        {"dropout": 1.0},
        {"dropout": -0.1},
        {"name": "Two Words"},
    ],
    ids=str,
)
def test_a_class_out_of_range_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        DeviceClass.model_validate({"name": "x", "examples_per_s": 1.0, **wrong})


def test_a_class_needs_a_speed() -> None:
    with pytest.raises(ValidationError, match=r"examples_per_s\n +Field required"):
        DeviceClass.model_validate({"name": "x"})


def test_classes_share_no_name() -> None:
    with pytest.raises(ValidationError, match="contains two classes of the same name"):
        run_with(Simulation(devices=(PHONE, PHONE)))


def test_classes_and_a_trace_contradict_each_other() -> None:
    with pytest.raises(ValidationError, match=r"'t\.csv' contradicts simulation\.devices"):
        run_with(Simulation(devices=(PHONE,), trace="t.csv"))


def test_devices_that_would_miss_the_quorum_in_most_rounds_are_refused() -> None:
    poor = PHONE.model_copy(update={"name": "poor", "availability": 0.5, "dropout": 0.2})
    devices = Simulation(devices=(PHONE, poor))  # (1 + 0.4) / 2 answer
    assert run_with(devices, quorum=0.7).simulation is devices
    with pytest.raises(ValidationError, match=r"0\.71 contradicts .* 0\.7 of a cohort responds"):
        run_with(devices, quorum=0.71)


def test_a_misspelt_key_of_a_class_is_refused_with_the_nearest(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(
        'name = "x"\ntask = "t.py"\n[[simulation.devices]]\nname = "a"\nexample_per_s = 1.0\n'
    )
    with pytest.raises(ConfigError, match=r"Did you mean .*examples_per_s'"):
        load_run(path)


def test_the_documented_classes_and_trace_are_read(tmp_path: Path) -> None:
    text = DOCS.read_text()
    toml = re.search(r"```toml\n(\[federation\].*?)```", text, re.DOTALL)
    table = re.search(r"```csv\n(.*?)```", text, re.DOTALL)
    assert toml
    assert table
    (tmp_path / "run.toml").write_text(f'name = "x"\ntask = "t.py"\n{toml[1]}')
    fleet = read_fleet(load_run(tmp_path / "run.toml"), [])
    assert fleet is not None
    assert {class_of(fleet, f"c{i}").name for i in range(50)} == {"phone", "gateway"}
    fleet = traced(tmp_path, table[1].removeprefix(HEADER), clients=("edge-017", "edge-018"))
    assert meets(fleet, "edge-017", clock_s=3600.0).outcome == "unavailable"
    assert meets(fleet, "edge-018", clock_s=3600.0).outcome == "done"
