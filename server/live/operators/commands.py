"""Command-line verbs that steer or inspect a running server, such as ``fedcore server pause``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from fedcore.cli import Command, json_option, show
from fedcore.observability.foreign import say
from fedcore.observability.words import counted, figure

if TYPE_CHECKING:
    from server.live.operators.protocol import Verb
    from server.live.operators.server_client import RunState, ServerClient
    from server.records import RoundRecord


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


def _client(options: argparse.Namespace) -> ServerClient:
    from server.live.operators.server_client import ServerClient

    return ServerClient(options.identity, options.kit)


def _shown(verb: Verb, text: Callable[[ServerClient], str]) -> Callable[[argparse.Namespace], int]:
    """Returns a command that prints text, or with ``--json`` the server's answer."""

    def run(options: argparse.Namespace) -> int:
        client = _client(options)
        say(json.dumps(client.ask(verb), indent=2) if options.json else text(client))
        return 0

    return run


def _status(client: ServerClient) -> str:
    found = client.status()
    state = f"{found.state}: {found.stage}" if found.stage else found.state
    listens = f"{found.listens}, wakes on {found.wakes}" if found.listens else "no more"
    rounds, members = counted(found.rounds, "round"), counted(found.devices.members, "member")
    lines = [
        f"Run:     {found.run}, {state}; {found.round} of {rounds}",
        f"Devices: {found.devices.there} connected of {members}; {found.devices.drained} drained",
        f"Listens: {listens}; up {found.up_s:.0f} s",
        f"Project: {found.project}, fedcore {found.version}; certificate until "
        f"{found.certificate_not_after:%Y-%m-%d}, roster version {found.roster.version}",
    ]
    if found.last:
        lines.insert(1, f"Last:    {_round(found.last)}")
    if found.training:
        lines.insert(1, f"Trains:  {found.training}")
    if found.waits:
        lines.insert(1, f"Waits:   {found.waits}")
    lines += [f"Left:    {name}: {reason}" for name, reason in found.left.items()]
    if found.roster.damage:
        lines.append(f"Roster:  could not be reloaded: {found.roster.damage}")
    return "\n".join([*lines, *(f"Note:    {note}" for note in found.notes)])


def _round(one: RoundRecord) -> str:
    metrics = ", ".join(f"{name} {figure(value)}" for name, value in one.metrics.items())
    return (
        f"round {one.round}: {one.updates} of {counted(one.cohort, 'update')}, "
        f"{one.failed} failed, {one.seconds:.2f} s{', ' if metrics else ''}{metrics}"
    )


def _rounds(client: ServerClient) -> str:
    return "\n".join(map(_round, client.rounds())) or "No round is complete yet."


def _devices(client: ServerClient) -> str:
    lines = []
    for one in client.devices():
        there = "awake" if one.awake else "polls" if one.there else "away"
        drained = ", drained" if one.drained else ""
        drained += ", owes a reply: left out until it calls" if one.owes else ""
        until = f"{one.certificate_not_after:%Y-%m-%d}"
        why = f"; {one.reason}" if one.reason else ""
        lines.append(f"{one.name:<24} {there}{drained}; certificate until {until}{why}")
    return "\n".join(lines) or "The project has no devices yet."


def _state(found: RunState) -> str:
    return f"{found.run}: {found.state}"


def _drain(options: argparse.Namespace) -> int:
    drained = _client(options).drain(options.device, undo=options.undo)
    text = f"{options.device}: {'drained' if drained else 'selected again'}"
    return show(options, text, {"device": options.device, "drained": drained})


def _backup(options: argparse.Namespace) -> int:
    done = _client(options).backup(options.file)
    text = f"Backup: {done.file}, {counted(done.files, 'file')}, {done.bytes} bytes"
    return show(options, text, asdict(done))


def _evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    _where(parser)
    parser.add_argument(
        "model",
        type=Path,
        metavar="MODEL",
        help="checkpoint of the run's model, e.g. runs/churn/global.safetensors",
    )


def _evaluate(options: argparse.Namespace) -> int:
    done = _client(options).evaluate(options.model)
    return show(options, f"{done.text}\n\nKept in {done.file}", asdict(done))


OPERATOR_VERBS = {
    "status": Command(
        "Show the state of a running server.",
        _where,
        _shown("status", _status),
        "fedcore server status --json",
    ),
    "rounds": Command(
        "List the completed rounds, the last 1000.",
        _where,
        _shown("rounds", _rounds),
        "fedcore server rounds --kit anna",
    ),
    "devices": Command(
        "List the project's devices, and which are connected or drained.",
        _where,
        _shown("devices", _devices),
        "fedcore server devices",
    ),
    "pause": Command(
        "Pause after the current round.",
        _where,
        _shown("pause", lambda client: _state(client.pause())),
        "fedcore server pause",
    ),
    "resume": Command(
        "Continue after a pause.",
        _where,
        _shown("resume", lambda client: _state(client.resume())),
        "fedcore server resume",
    ),
    "stop": Command(
        "Stop the server after the current round, or during the steps after the rounds; the "
        "run can be resumed.",
        _where,
        _shown("stop", lambda client: _state(client.stop())),
        "fedcore server stop --kit anna",
    ),
    "drain": Command(
        "Exclude a device from further rounds, until undone.",
        _drain_arguments,
        _drain,
        "fedcore server drain edge-017",
    ),
    "evaluate": Command(
        "Have the connected devices evaluate a model on the data that they hold back, between two "
        "rounds.",
        _evaluate_arguments,
        _evaluate,
        "fedcore server evaluate runs/churn/global.safetensors",
    ),
    "backup": Command(
        "Write the run's folder to one file, between two rounds.",
        _backup_arguments,
        _backup,
        "fedcore server backup orchard.tar",
    ),
}
