"""Answers to ``status`` and ``devices``: the state of a run and of its devices, as JSON objects."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from fedcore import __version__
from fedcore.config.run import RunConfig
from fedcore.crypto.roster import Roster, ServerIdentity
from fedcore.flower.fleet import node_id_of
from server.live.network.serve import Listening

_REASONS = 20
"""Devices whose reasons for leaving are in the answer to ``status``; ``devices`` has all."""


def status_answer(
    run: RunConfig,
    identity: ServerIdentity,
    roster: Roster,
    listening: Listening | None,
    *,
    state: str,
    stage: str,
    training: str,
    waits: str,
    rounds: Sequence[Mapping[str, Any]],
    notes: Sequence[str],
    drained: Collection[str],
    up_s: float,
) -> dict[str, Any]:
    """Returns the state of a run.

    Args:
        run: The run's configuration.
        identity: The server's identity.
        roster: The project's members.
        listening: The network server; None once devices are no longer served.
        state: The run's state, in a word.
        stage: Current step after the rounds; empty during the rounds.
        training: How far a training in the cloud has come; empty where none is under way.
        waits: What the current round waits for; empty where it waits for nothing or not for long.
        rounds: Records of the most recent rounds, the latest last.
        notes: The most recent notes.
        drained: Names of drained devices.
        up_s: Uptime of the process, in seconds.
    """
    devices = devices_answer(roster, drained, listening)
    address, kit = listening and listening.address, identity.kit
    return {
        "run": run.name,
        "state": state,
        "stage": stage or None,
        "training": training or None,
        "waits": waits or None,
        "round": rounds[-1]["round"] if rounds else 0,
        "rounds": run.federation.rounds,
        "last": rounds[-1] if rounds else None,
        "notes": list(notes),
        "devices": {
            "members": len(devices),
            "there": sum(device["there"] for device in devices),
            "drained": len(drained),
        },
        "left": dict([(one["name"], one["reason"]) for one in devices if one["reason"]][:_REASONS]),
        "project": kit.project,
        "listens": address and f"{address.host}:{address.port}",
        "wakes": address and address.wake_port,
        "certificate_not_after": f"{kit.not_after:%Y-%m-%dT%H:%M:%SZ}",
        "roster": {"version": roster.version, "damage": roster.damage},
        "up_s": round(up_s, 1),
        "version": __version__,
    }


def devices_answer(
    roster: Roster, drained: Collection[str], listening: Listening | None
) -> list[dict[str, Any]]:
    """Returns the state of each of the project's devices, sorted by name.

    All count as disconnected if ``listening`` is None.
    """
    present = listening.presence.devices() if listening else ()
    seen = {device.node_id: device for device in present}
    found = []
    for member in roster.members():
        if member.role != "device":
            continue
        node_id = node_id_of(member.public)
        device = seen.get(node_id)
        found.append(
            {
                "name": member.name,
                "node_id": node_id,
                "there": device is not None and device.online,
                "awake": device is not None and device.awake,
                "owes": device is not None and device.owes,
                "reason": (device.reason if device is not None else "") or None,
                "drained": member.name in drained,
                "num_examples": member.num_examples,
                "certificate_not_after": f"{member.not_after:%Y-%m-%dT%H:%M:%SZ}",
            }
        )
    return sorted(found, key=lambda one: str(one["name"]))
