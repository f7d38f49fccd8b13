"""Command-line verbs that steer or inspect a running server, such as ``fedcore server pause``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fedcore.cli import Command, json_option
from fedcore.observability.foreign import say
from fedcore.observability.words import counted, figure

Shown = Callable[[Mapping[str, Any]], str]


def _where(parser: argparse.ArgumentParser) -> None:
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--identity",
        type=Path,
        default=Path("authority/server"),
        metavar="DIR",
        help=("folder of a server on this machine, e.g. --identity server (default: %(default)s)"),
    )
    where.add_argument(
        "--kit",
        type=Path,
        metavar="DIR",
        help="connect over the network, with the operator's or viewer's kit in this folder, e.g. "
        "--kit anna",
    )
    json_option(parser)


def _drain_arguments(parser: argparse.ArgumentParser) -> None:
    _where(parser)
    parser.add_argument("device", metavar="DEVICE", help="name of the device, e.g. edge-017")
    parser.add_argument("--undo", action="store_true", help="let rounds select the device again")


def _backup_arguments(parser: argparse.ArgumentParser) -> None:
    _where(parser)
    parser.add_argument("file", type=Path, metavar="FILE", help="file to write, e.g. orchard.tar")


def _send(options: argparse.Namespace, shown: Shown, **request: Any) -> int:
    from server.live.operators.client import ask_local, ask_remote

    if options.kit is None:
        answer = ask_local(options.identity, request)
    else:
        from fedcore.crypto.kit import load_kit

        answer = ask_remote(load_kit(options.kit), request)
    say(json.dumps(answer, indent=2) if options.json else shown(answer))
    return 0


def _status(options: argparse.Namespace) -> int:
    return _send(options, _shown_status, verb="status")


def _shown_status(answer: Mapping[str, Any]) -> str:
    devices, last = answer["devices"], answer["last"]
    rounds = counted(answer["rounds"], "round")
    state = f"{answer['state']}: {answer['stage']}" if answer["stage"] else answer["state"]
    listens = f"{answer['listens']}, wakes on {answer['wakes']}" if answer["listens"] else "no more"
    lines = [
        f"Run:     {answer['run']}, {state}; {answer['round']} of {rounds}",
        f"Devices: {devices['there']} connected of {counted(devices['members'], 'member')}; "
        f"{devices['drained']} drained",
        f"Listens: {listens}; up {answer['up_s']:.0f} s",
        f"Project: {answer['project']}, fedcore {answer['version']}; certificate until "
        f"{answer['certificate_not_after'][:10]}, roster version {answer['roster']['version']}",
    ]
    if last:
        lines.insert(1, f"Last:    {_shown_round(last)}")
    if answer["waits"]:
        lines.insert(1, f"Waits:   {answer['waits']}")
    if answer["roster"]["damage"]:
        lines.append(f"Roster:  could not be reloaded: {answer['roster']['damage']}")
    return "\n".join([*lines, *(f"Note:    {note}" for note in answer["notes"])])


def _shown_round(one: Mapping[str, Any]) -> str:
    metrics = ", ".join(f"{name} {figure(value)}" for name, value in one["metrics"].items())
    return (
        f"round {one['round']}: {one['updates']} of {counted(one['cohort'], 'update')}, "
        f"{one['failed']} failed, {one['seconds']:.2f} s{', ' if metrics else ''}{metrics}"
    )


def _rounds(options: argparse.Namespace) -> int:
    return _send(
        options,
        lambda answer: (
            "\n".join(map(_shown_round, answer["rounds"])) or "No round is complete yet."
        ),
        verb="rounds",
    )


def _devices(options: argparse.Namespace) -> int:
    return _send(options, _shown_devices, verb="devices")


def _shown_devices(answer: Mapping[str, Any]) -> str:
    lines = []
    for one in answer["devices"]:
        there = "awake" if one["awake"] else "polls" if one["there"] else "away"
        drained = ", drained" if one["drained"] else ""
        drained += ", owes a reply: left out until it calls" if one["owes"] else ""
        until = one["certificate_not_after"][:10]
        lines.append(f"{one['name']:<24} {there}{drained}; certificate until {until}")
    return "\n".join(lines) or "The project has no devices yet."


def _steer(verb: str) -> Callable[[argparse.Namespace], int]:
    def run(options: argparse.Namespace) -> int:
        return _send(options, lambda answer: f"{answer['run']}: {answer['state']}", verb=verb)

    return run


def _drain(options: argparse.Namespace) -> int:
    return _send(
        options,
        lambda answer: (
            f"{answer['device']}: {'drained' if answer['drained'] else 'selected again'}"
        ),
        verb="drain",
        device=options.device,
        undo=options.undo,
    )


def _backup(options: argparse.Namespace) -> int:
    return _send(
        options,
        lambda answer: (
            f"Backup: {answer['file']}, {counted(answer['files'], 'file')}, {answer['bytes']} bytes"
        ),
        verb="backup",
        file=str(options.file.absolute()),
    )


OPERATOR_VERBS = {
    "status": Command(
        "Show the state of a running server.", _where, _status, "fedcore server status --json"
    ),
    "rounds": Command(
        "List the completed rounds, the last 1000.",
        _where,
        _rounds,
        "fedcore server rounds --kit anna",
    ),
    "devices": Command(
        "List the project's devices, and which are connected or drained.",
        _where,
        _devices,
        "fedcore server devices",
    ),
    "pause": Command(
        "Pause after the current round.",
        _where,
        _steer("pause"),
        "fedcore server pause",
    ),
    "resume": Command("Continue after a pause.", _where, _steer("resume"), "fedcore server resume"),
    "stop": Command(
        "Stop the server after the current round, or during the steps after the rounds; the "
        "run can be resumed.",
        _where,
        _steer("stop"),
        "fedcore server stop --kit anna",
    ),
    "drain": Command(
        "Exclude a device from further rounds, until undone.",
        _drain_arguments,
        _drain,
        "fedcore server drain edge-017",
    ),
    "backup": Command(
        "Write the run's folder to one file, between two rounds.",
        _backup_arguments,
        _backup,
        "fedcore server backup orchard.tar",
    ),
}
