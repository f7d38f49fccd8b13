from __future__ import annotations

from fedcore.config.run import RunConfig
from server.report.settings import shown_settings


def test_main_settings_and_those_that_differ_are_shown_and_paths_are_not() -> None:
    run = RunConfig.model_validate(
        {
            "name": "run",
            "task": "task.py",
            "federation": {"strategy": "FedAdam", "strategy_options": {"eta": 0.1}, "quorum": 0.9},
        }
    )
    shown = shown_settings(run)
    assert [*shown][:3] == ["seed", "federation.strategy", "federation.rounds"]
    assert shown["federation.strategy"] == "FedAdam"
    assert shown["federation.quorum"] == 0.9
    assert shown["federation.strategy_options.eta"] == 0.1
    assert not {"name", "task", "federation.deadline_s"} & shown.keys()
