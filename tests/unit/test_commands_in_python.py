"""Whatever a command does, a notebook can do in one call."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import fedcore
from fedcore.cli import build_parser

CALLS = {
    "check": "check",
    "client enrol": "enrol",
    "client install": "install_kit",
    "client start": "start_client",
    "device bench": "time_model",
    "device generate": "EdgeModel.generate",
    "device infer": "EdgeModel.predict",
    "device run": "",
    "device serve": "",
    "device status": "list_models",
    "device update": "update_model",
    "doctor": "diagnose",
    "evaluate": "evaluate",
    "finetune": "finetune",
    "new": "new_task",
    "privacy audit": "audit_privacy",
    "privacy export": "export_ledger",
    "privacy plan": "plan_example_privacy",
    "privacy show": "read_ledger",
    "privacy verify": "verify_ledger",
    "provision backup": "Authority.backup",
    "provision device": "Authority.add_device",
    "provision init": "create_authority",
    "provision list": "Authority.members",
    "provision operator": "Authority.add_operator",
    "provision renew": "Authority.renew",
    "provision restore": "restore_authority",
    "provision revoke": "Authority.revoke",
    "provision server": "Authority.add_server",
    "provision sign": "Authority.sign_roster",
    "provision viewer": "Authority.add_viewer",
    "release drift": "measure_drift",
    "release export": "export_release",
    "release gc": "clean_repository",
    "release init": "create_repository",
    "release list": "list_releases",
    "release promote": "promote_canary",
    "release push": "push_release",
    "release refresh": "refresh_repository",
    "release rollback": "roll_back",
    "release rotate": "rotate_keys",
    "release serve": "",
    "release show": "list_rollouts",
    "release verify": "verify_repository",
    "runs compare": "compare_runs",
    "runs list": "list_runs",
    "server backup": "ServerClient.backup",
    "server devices": "ServerClient.devices",
    "server drain": "ServerClient.drain",
    "server evaluate": "ServerClient.evaluate",
    "server pause": "ServerClient.pause",
    "server resume": "ServerClient.resume",
    "server rollback": "roll_back_run",
    "server rounds": "ServerClient.rounds",
    "server start": "start_server",
    "server status": "ServerClient.status",
    "server stop": "ServerClient.stop",
    "server verify": "verify_run",
    "simulate": "simulate",
}
"""The public call of each command."""
NOT_YET = {"device run", "device serve", "release serve"}
"""Commands without one. A new command belongs here only for good reason."""


def leaves(parser: argparse.ArgumentParser, words: tuple[str, ...] = ()) -> Iterator[str]:
    below = [one for one in parser._actions if isinstance(one, argparse._SubParsersAction)]
    if not below:
        yield " ".join(words)
    for action in below:
        for name, one in action.choices.items():
            yield from leaves(one, (*words, name))


def test_each_command_has_a_public_call() -> None:
    assert sorted(leaves(build_parser())) == sorted(CALLS)
    assert {command for command, call in CALLS.items() if not call} == NOT_YET
    for call in filter(None, CALLS.values()):
        name, _, method = call.partition(".")
        assert name in fedcore.__all__
        found = getattr(fedcore, name)
        assert callable(getattr(found, method) if method else found)
