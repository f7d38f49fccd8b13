"""``fedcore client start``: the device at work."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from fedcore.cli import Command
from fedcore.crypto.kit import load_kit
from fedcore.errors import CertificateRefused
from fedcore.owner import OPEN_POLICY, load_owner
from fedcore.rpc.tls import only_tls_1_3


def _start_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--kit",
        type=Path,
        required=True,
        metavar="DIR",
        help="the folder that `fedcore client install` put the kit into, as --kit kit",
    )
    parser.add_argument(
        "--task",
        type=Path,
        required=True,
        help="the task installed here, the same file as the server's, as --task task.py",
    )
    parser.add_argument(
        "--owner", type=Path, help="what the owner of this device allows, as --owner owner.toml"
    )
    parser.add_argument(
        "--folder",
        type=Path,
        metavar="DIR",
        help="where this device keeps its ledger and finished updates (default: DIR/device in the "
        "folder of the kit)",
    )


def _start(options: argparse.Namespace) -> int:
    kit = load_kit(options.kit)
    if kit.role != "device":
        raise CertificateRefused(
            f"{options.kit}: this is the identity of the {kit.role} {kit.name!r}, expected a "
            "device's. Nothing was started; enrol this machine as a device."
        )
    owner = load_owner(options.owner) if options.owner else OPEN_POLICY
    only_tls_1_3()  # before Flower, which imports grpc
    from edge_client.node.loop import Device, run_device
    from edge_client.node.state import own
    from edge_client.node.wake import Signals
    from fedcore.flower.quiet import quiet
    from fedcore.observability.lines import log_lines
    from fedcore.task import load_task

    quiet()
    log_lines(sys.stderr)
    task = load_task(options.task)
    with own(options.folder or options.kit / "device") as folder:
        try:
            run_device(Device(kit, task, options.task, owner, folder), Signals())
        except KeyboardInterrupt:  # SIGTERM, too: how a device is told to stop, and no failure
            return 0
    return 0


start = Command(
    help="take part in training with the task installed here, until stopped",
    arguments=_start_arguments,
    run=_start,
    example="fedcore client start --kit kit --task task.py",
)
