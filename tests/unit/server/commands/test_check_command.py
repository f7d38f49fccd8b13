"""``fedcore check`` with settings of its own."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from fedcore.errors import ConfigError
from fedcore.task.templates import new_task
from server.commands.check_command import check


def parsed(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    check.arguments(parser)
    return parser.parse_args(words)


@pytest.mark.parametrize("file", ["task.py", "run.toml"])
def test_settings_apply_to_a_check(
    file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    new_task(tmp_path / "churn", kind="regression")
    path = str(tmp_path / "churn" / file)
    impossible = ["--set", "federation.cohort=99", "--json"]
    assert check.run(parsed(path, *impossible)) == 3
    (found,) = json.loads(capsys.readouterr().out)["findings"]
    assert found["detail"].startswith("federation.cohort = 99: task 'churn' has 9 clients.")
    with pytest.raises(ConfigError, match=r"unknown key 'client\.epoch'"):
        check.run(parsed(path, "--set", "client.epoch=3"))
