from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import fsspec
import pytest

from server.release.publish import publish
from tests.unit.edge_client.conftest import matmul_draft
from tests.unit.server.commands.test_release_commands import run
from tests.unit.server.release.conftest import NOW


def test_push_says_what_it_uploads_and_what_it_repaired(
    publisher: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    publisher.publish(b"one")
    to = "memory://fleet-of-commands/releases"
    arguments = ["push", "--repository", str(publisher.repository), "--keys", str(publisher.keys)]
    assert run(*arguments, "--to", to) == 0
    shown = capsys.readouterr()
    assert f"{to}: 9 files of version 2 are there as they were signed; 9 uploaded" in shown.out
    assert len(shown.err.splitlines()) == 9
    assert "uploading metadata/timestamp.json (" in shown.err
    files = fsspec.filesystem("memory")
    files.pipe_file("/fleet-of-commands/releases/metadata/2.snapshot.json", b"{}")
    files.pipe_file("/fleet-of-commands/releases/targets/models/old", b"{}")
    run(*arguments, "--to", to)
    shown = capsys.readouterr()
    assert "Repaired:   metadata/2.snapshot.json was another one" in shown.out
    assert "Not needed: 1 object below targets" in shown.out
    run(*arguments, "--to", to, "--json")
    assert json.loads(capsys.readouterr().out)["uploaded"] == []
    files.rm("/fleet-of-commands", recursive=True)


def test_export_names_the_files(
    publisher: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    publish(matmul_draft(1.0), repository=publisher.repository, keys=publisher.keys, created=NOW)
    arguments = ["export", "--repository", str(publisher.repository), "--keys", str(publisher.keys)]
    arguments += ["--model", "digits", "--out"]
    assert run(*arguments, str(tmp_path / "a"), "--layout", "triton") == 0
    shown = capsys.readouterr().out
    assert f"{tmp_path}/a/digits: digits version 1, sha256 " in shown
    assert "at most 3 inputs together\n  1/manifest.json\n" in shown
    run(*arguments, str(tmp_path / "b"), "--layout", "plain", "--version", "1", "--json")
    assert json.loads(capsys.readouterr().out)["max_batch_size"] == 3
