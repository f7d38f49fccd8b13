"""``fedcore privacy show | verify | export``: what they tell, and that they change nothing."""

from __future__ import annotations

import argparse
import builtins
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from edge_client.device_folder import lock_device_folder
from edge_client.ledger import commands as ledger_commands
from edge_client.ledger.book import COUNT, LEDGER, MARK
from fedcore.errors import ConfigError, DataError, DeviceError, PrivacyError, ResourceError
from fedcore.observability.words import epsilon_floor_text, epsilon_text
from tests.unit.edge_client.ledger.sites import DELTA, OWNER, Site, epsilon


def test_show_tells_runs_rounds_totals_and_what_fits(
    site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    before = site.files()
    words = ("--kit", site.kit, "--owner", site.owner, "--accountant", "rdp")
    assert site.run(ledger_commands.show, *words) == 0
    said = capsys.readouterr().out
    assert site.files() == before
    whole = epsilon(3, 1.2, DELTA, more=20)
    digits, left_text = epsilon_text(epsilon(3, 1.2)), epsilon_floor_text(8 - whole)
    assert f"run digits: epsilon {digits} at delta 1e-05" in said
    assert f"      3      10           0.1   1.2       {digits}" in said
    assert "... 8 more; --json has them all" in said
    told = f"device, all runs: epsilon {epsilon_text(whole)} at delta 1e-06; {left_text} of 8"
    assert told in said

    assert site.run(ledger_commands.show, *words, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    wards = told["runs"][1]
    assert [round(one["epsilon"], 9) for one in wards["charges"]] == [
        round(epsilon(count, 2.0), 9) for count in range(1, 21)
    ]
    left = wards["rounds_left"]
    assert epsilon(3, 1.2, DELTA, more=20 + left) <= 8 < epsilon(3, 1.2, DELTA, more=21 + left)
    (total,) = told["totals"]
    assert (total["epsilon"], total["left"]) == (pytest.approx(whole), pytest.approx(8 - whole))


def test_show_without_an_owner_or_a_charge(
    site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert site.run(ledger_commands.show, "--state", site.state) == 0
    assert "budgets are unknown" in capsys.readouterr().out
    (tmp_path / "new").mkdir()
    assert site.run(ledger_commands.show, "--state", tmp_path / "new") == 0
    assert "Nothing was charged" in capsys.readouterr().out
    assert list((tmp_path / "new").iterdir()) == []


def test_where_the_ledger_is_must_be_said_and_be_there(site: Site) -> None:
    with pytest.raises(ConfigError, match="expected --state or --kit"):
        site.run(ledger_commands.show)
    with pytest.raises(DataError, match="there is no such folder"):
        site.run(ledger_commands.verify, "--state", site.root / "nosuch")


@pytest.mark.parametrize(("verb", "option"), [("show", "--plot"), ("export", "--out")])
def test_where_a_result_goes_is_looked_at_before_any_work(
    site: Site, verb: str, option: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("--kit", site.kit, "--accountant", "rdp", option)
    made = site.root / "new" / "deep" / "result.png"
    assert site.run(getattr(ledger_commands, verb), *words, made) == 0
    made.write_bytes(b"old")
    assert site.run(getattr(ledger_commands, verb), *words, made) == 0
    assert made.read_bytes() != b"old"

    def work(*_: Any) -> Any:
        raise AssertionError("the ledger was read")

    monkeypatch.setattr("edge_client.ledger.reading.read_ledger_files", work)
    (site.root / "folder.png").mkdir()
    for where, said in ((site.root / "folder.png", "a folder"), (made / "in.png", "is a file")):
        with pytest.raises(ResourceError, match=said):
            site.run(getattr(ledger_commands, verb), *words, where)


def test_a_named_data_set_has_a_line_of_its_own(
    site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    data = site.root / "ward"
    data.mkdir()
    site.owner.write_text(
        f'{OWNER}[[datasets]]\nname = "ward"\npath = "{data}"\nmax_epsilon = 2.0\n'
    )
    words = ("--kit", site.kit, "--owner", site.owner)
    assert site.run(ledger_commands.show, *words, "--json") == 0
    device, ward = json.loads(capsys.readouterr().out)["totals"]
    assert (ward["name"], ward["max_epsilon"]) == ("ward", 2.0)
    assert ward["epsilon"] == pytest.approx(device["epsilon"]), "what has no name counts there"


def test_a_plot_is_a_picture(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("--kit", site.kit, "--owner", site.owner, "--accountant", "rdp", "--plot")
    assert site.run(ledger_commands.show, *words, site.root / "plot.png") == 0
    assert (site.root / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert site.run(ledger_commands.show, *words, site.root / "made" / "plot.SVG") == 0
    assert b"<svg" in (site.root / "made" / "plot.SVG").read_bytes()
    with pytest.raises(ConfigError, match=r"ends in \.png, \.pdf or \.svg"):
        site.run(ledger_commands.show, *words, site.root / "plot.gif")
    importing = builtins.__import__

    def without(name: str, *more: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return importing(name, *more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ResourceError, match="a plot needs matplotlib"):
        site.run(ledger_commands.show, *words, site.root / "other.png")


def test_verify_is_content_with_what_a_device_leaves(
    site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    before = site.files()
    assert site.run(ledger_commands.verify, "--kit", site.kit) == 0
    said = capsys.readouterr()
    assert "23 charges of 2 runs, and all agrees" in said.out
    assert (said.err, "note" in said.out) == ("", False)
    assert site.files() == before


def _restore(site: Site, backup: Path) -> None:
    shutil.rmtree(site.state)
    shutil.copytree(backup, site.state)


@pytest.mark.parametrize(
    ("harm", "code", "told"),
    [
        (lambda site: (site.state / LEDGER).unlink(), 0, "ledger.json lacks 20 of the charges"),
        (lambda site: (site.kit / MARK).unlink(), 0, "ledger.mark is not there"),
        (lambda site: site.counted.unlink(), 0, "ledger.count is not there"),
        (
            lambda site: (site.state / "state" / "wards.state").unlink(),
            0,
            "",
        ),
        (lambda site: _restore(site, site.root / "backup"), 5, "says that 23 were made"),
        (lambda site: (site.state / LEDGER).write_text("{"), 5, "ledger.json: "),
        (lambda site: (site.kit / MARK).write_text("{"), 5, "ledger.mark: "),
        (lambda site: site.counted.write_text("{"), 5, "ledger.count: "),
        (
            lambda site: (site.state / "state" / "wards.state").write_bytes(b"\xff\xff"),
            5,
            "does not contain the record",
        ),
        (
            lambda site: (site.state / LEDGER).write_text(
                (site.state / LEDGER).read_text().replace("2.0", "9.0")
            ),
            5,
            "differs between ledger.json and the run's state",
        ),
    ],
    ids=[
        "copy gone",
        "mark gone",
        "count gone",
        "state gone",
        "rolled back",
        "torn copy",
        "torn mark",
        "torn count",
        "torn state",
        "changed",
    ],
)
def test_verify_says_what_is_damaged_and_what_is_mended(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], harm: Any, code: int, told: str
) -> None:
    site = Site(tmp_path)
    site.charge("digits", 3)
    shutil.copytree(site.state, site.root / "backup")
    site.charge("wards", 20, noise=2.0)
    harm(site)
    before = site.files()
    assert site.run(ledger_commands.verify, "--kit", site.kit) == code
    said = capsys.readouterr()
    assert told in said.out + said.err
    assert ("all agrees" in said.out) == (not told)
    mends = "next start corrects that; nothing was changed here" in said.out
    assert mends == bool(told and code == 0)
    assert not any(word in said.out + said.err for word in ("is mended", "written again"))
    assert site.files() == before
    assert site.run(ledger_commands.verify, "--kit", site.kit, "--json") == code
    found = json.loads(capsys.readouterr().out)
    assert bool(found["problems"]) == (code == 5)
    assert site.run(ledger_commands.show, "--kit", site.kit) == code
    if code == 5:
        assert told in capsys.readouterr().out
        assert site.run(ledger_commands.export, "--kit", site.kit, "--out", tmp_path / "out") == 5
        assert told in capsys.readouterr().out


def test_verify_says_each_thing_once(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    for path in (site.state / LEDGER, site.kit / MARK, site.counted):
        path.unlink()
    assert site.run(ledger_commands.verify, "--kit", site.kit) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines[:-1]] == ["behind"] * 4
    assert sum(line.count("next start corrects") for line in lines) == 1
    site.charge("digits", 0)
    shutil.rmtree(site.state)
    site.state.mkdir()
    assert site.run(ledger_commands.verify, "--kit", site.kit) == 5
    said = capsys.readouterr().out
    assert said.count("The epsilon spent is unknown") == 1
    assert f"{site.kit / MARK} says that 23 were made and {site.counted} says that 23" in said
    assert "remove ledger.mark and ledger.count." in said


def test_show_without_an_owners_file_says_that_budgets_are_not_known(
    site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    assert site.run(ledger_commands.show, "--kit", site.kit, "--accountant", "rdp") == 0
    said = capsys.readouterr().out
    assert "No owner's file was given, so budgets are unknown" in said
    assert "sets no budget" not in said
    site.owner.write_text("")
    words = ("--kit", site.kit, "--owner", site.owner, "--accountant", "rdp")
    assert site.run(ledger_commands.show, *words) == 0
    said = capsys.readouterr().out
    assert "; the owner sets no budget" in said
    assert "unknown" not in said


def test_a_damaged_ledger_says_so_with_its_figures(
    site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    (site.state / LEDGER).unlink()
    (site.state / "state" / "wards.state").write_bytes(b"\xff")
    words = ("--kit", site.kit, "--owner", site.owner, "--accountant", "rdp")
    assert site.run(ledger_commands.show, *words) == PrivacyError.exit_code
    said = capsys.readouterr()
    lines = said.out.splitlines()
    assert lines[0].startswith("damaged: ")
    assert "wards.state" in lines[0]
    least = epsilon_text(epsilon(3, 1.2))
    assert f"run digits: epsilon at least {least} at delta 1e-05" in lines
    assert lines[-1].startswith("device, all runs: epsilon at least ")
    assert lines[-1].endswith("; how much is left of 8 is unknown")
    assert "budget allows" not in said.out
    assert "listed on standard output" in said.err

    assert site.run(ledger_commands.show, *words, "--json") == PrivacyError.exit_code
    told = json.loads(capsys.readouterr().out)
    assert told["damaged"]
    assert any("wards.state" in one for one in told["problems"])
    assert [(one["left"], one["whole"]) for one in told["totals"]] == [(None, False)]
    assert [run["rounds_left"] for run in told["runs"]] == [None]


def test_a_ledger_of_which_nothing_can_be_read_is_not_called_empty(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / LEDGER).write_text("{")
    assert site_free_show(tmp_path) == PrivacyError.exit_code
    said = capsys.readouterr().out
    assert "Nothing was charged" not in said
    assert "the epsilon spent is unknown" in said
    assert said.startswith("damaged: ")


def site_free_show(state: Path) -> int:
    parser = argparse.ArgumentParser()
    ledger_commands.show.arguments(parser)
    return ledger_commands.show.run(parser.parse_args(["--state", str(state)]))


@pytest.mark.parametrize("verb", ["show", "verify", "export"])
def test_the_folder_of_another_kit_is_not_looked_at_as_this_ones(
    site: Site, tmp_path_factory: pytest.TempPathFactory, verb: str
) -> None:
    with lock_device_folder(site.state) as folder:
        folder.record_admission(site.public)
    other = Site(tmp_path_factory.mktemp("other"))
    other.charge("digits", 30)
    before = site.files() | other.files()
    words = ("--kit", other.kit, "--state", site.state)
    with pytest.raises(DeviceError, match="--kit") as refused:
        site.run(getattr(ledger_commands, verb), *words)
    assert refused.value.exit_code == 11
    assert not any(name in str(refused.value) for name in (MARK, COUNT, LEDGER))
    assert "pass this device's own folder with --state" in str(refused.value)
    assert site.files() | other.files() == before
    assert site.run(getattr(ledger_commands, verb), "--kit", site.kit) == 0


def test_the_verbs_are_found_without_torch_or_flower() -> None:
    code = (
        "import sys; import edge_client.ledger.commands; "
        "print([one for one in ('torch', 'flwr', 'opacus') if one in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_what_messages_advise_of_a_damaged_file_mends_the_ledger(
    site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    """`docs/faults.md` and `docs/deployment.md` send people there."""
    whole = {path: raw for path, raw in site.files().items() if path != site.owner}
    damaged = (site.state / LEDGER, site.kit / MARK, site.state / "state" / "wards.state")
    for path in damaged:
        path.write_bytes(b"\xff")
        assert site.run(ledger_commands.verify, "--kit", site.kit) == PrivacyError.exit_code
        said = capsys.readouterr().out
        assert str(path) in said
        assert "remove it" in said
        with pytest.raises((DataError, PrivacyError), match="remove it"):
            site.charge("digits", 1)
        assert site.files()[path] == b"\xff"
        path.unlink()
        site.charge("digits", 0)
        site.charge("wards", 0)
        assert site.run(ledger_commands.verify, "--kit", site.kit) == 0
        assert "23 charges of 2 runs, and all agrees" in capsys.readouterr().out
        assert {one for one in whole if one not in site.files()} <= {path}
