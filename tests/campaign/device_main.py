"""A device whose randomness is a seed, whose clock may be wrong, and which dies at a point it is
told: for the campaign alone."""

from __future__ import annotations

import argparse
import os
import secrets
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flwr.app import Message

SPOOLED, KEPT, SENDING, SENT = "spooled", "kept", "sending", "sent"
POINTS = (SPOOLED, KEPT, SENDING, SENT)
"""A reply is on disk; so is the state with its cost; it is about to leave; the server has it."""


def main() -> int:
    parser = argparse.ArgumentParser()
    for name in ("kit", "task", "folder"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--clock-off-s", type=float, default=0.0)
    parser.add_argument("--die", default="", help="POINT:COUNT")
    options = parser.parse_args()
    if options.clock_off_s:  # what signs and dates; OpenSSL asks the system itself
        right = time.time
        time.time = lambda: right() + options.clock_off_s
    from fedcore.cli import build_parser
    from fedcore.crypto.kit import load_kit
    from fedcore.errors import FedcoreError
    from fedcore.rpc.tls import require_tls_1_3

    build_parser("client")  # the time of it belongs to a start
    kit = load_kit(options.kit)
    require_tls_1_3()
    from edge_client import device_folder as state
    from edge_client.agent.announce import announce
    from fedcore.flower.fleet_client import FleetLink
    from fedcore.flower.quiet import quiet
    from fedcore.observability.lines import log_lines

    quiet()
    log_lines(sys.stderr)
    fatal, _, count = options.die.partition(":")
    left = int(count or 1)

    def reached(point: str) -> None:
        nonlocal left
        if point == fatal:
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    write, answer = state.write_atomic, FleetLink.answer

    def writing(path: Path, raw: bytes, *, mode: int) -> None:
        write(path, raw, mode=mode)
        reached(SPOOLED if path.suffix == ".reply" else KEPT)

    def answering(link: FleetLink, reply: Message) -> None:
        reached(SENDING)
        answer(link, reply)
        reached(SENT)

    with state.lock_device_folder(options.folder) as folder:
        instance = secrets.token_hex(16)
        announce(kit, options.task, folder, instance)  # as the product does, before torch
        from edge_client.agent.loop import run_device
        from edge_client.agent.run import DeviceSetup
        from edge_client.agent.wake import Signals
        from fedcore.config.owner import OPEN_POLICY
        from fedcore.seeds import Simulated
        from fedcore.task.definition import load_task

        if fatal:
            state.write_atomic = writing
            FleetLink.answer = answering  # type: ignore[method-assign]
        task, randomness = load_task(options.task), Simulated(options.seed)
        device = DeviceSetup(kit, task, options.task, OPEN_POLICY, folder, randomness, instance)
        try:
            run_device(device, Signals())
        except FedcoreError as error:
            os.write(2, f"{type(error).__name__}: {error}\n".encode())
            return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
