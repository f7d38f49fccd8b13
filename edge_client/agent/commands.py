"""The command ``fedcore client start``: runs a device until it is stopped."""

from __future__ import annotations

import argparse
import logging
import os
import secrets
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from edge_client.agent.ended import LOADING, WAITING, Activity, ended_text, reason_of
from edge_client.agent.stopping import stop_on_signals
from fedcore.cli import Command
from fedcore.config.owner import OPEN_POLICY, OwnerPolicy, load_owner
from fedcore.crypto.kit import Kit, load_kit
from fedcore.errors import CertificateRefused
from fedcore.observability.patience import report_loading
from fedcore.rpc.proxy import check_proxies
from fedcore.rpc.tls import require_tls_1_3, silence_grpc_core

if TYPE_CHECKING:
    from edge_client.agent.wake import Signals
    from edge_client.device_folder import DeviceFolder

log = logging.getLogger("fedcore.device")


def _start_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--kit",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder into which `fedcore client install` put the kit, e.g. --kit kit",
    )
    parser.add_argument(
        "--task",
        type=Path,
        required=True,
        help="the task installed here, the same file as the server's, e.g. --task task.py",
    )
    parser.add_argument(
        "--owner",
        type=Path,
        help="file with the limits set by the owner of this device, e.g. --owner owner.toml",
    )
    parser.add_argument(
        "--state",
        type=Path,
        metavar="DIR",
        help="folder for this device's ledger and finished updates, e.g. --state "
        "/var/lib/fedcore/device (default: `device` in the folder of the kit)",
    )
    parser.add_argument(
        "--log",
        type=Path,
        metavar="FILE",
        help="file for the log, rotated at 10 MiB, the last six kept, e.g. --log device.log "
        "(default: standard error)",
    )


def _start(options: argparse.Namespace) -> int:
    loading = threading.Event()
    activity = Activity(options.state or options.kit / "device")
    with stop_on_signals(loading, stopped=activity.end) as signalled:
        try:
            _work(options, loading, activity)
        except BaseException as error:
            if not signalled():
                raise
            if not isinstance(error, KeyboardInterrupt):  # an import may turn it into another error
                log.info("stopped; error while stopping: %s: %s", type(error).__name__, error)
        finally:
            activity.end()
    return 0


def _work(options: argparse.Namespace, loading: threading.Event, activity: Activity) -> None:
    """Runs the device until a signal interrupts it; sets ``loading`` while torch is imported."""
    kit = load_kit(options.kit)
    if kit.role != "device":
        raise CertificateRefused(
            f"{options.kit}: this is the identity of the {kit.role} {kit.name!r}, expected a "
            "device's. Nothing was started; enrol this machine as a device."
        )
    owner = load_owner(options.owner) if options.owner else OPEN_POLICY
    check_proxies(os.environ)
    require_tls_1_3()  # before Flower, which imports grpc
    silence_grpc_core()
    from fedcore.observability.lines import log_lines

    with report_loading():  # on standard error: Flower would replace a logger set up before it
        from edge_client.agent.announce import announce
        from edge_client.agent.policy import RateLimit, check_task, reason_to_pause, run_sessions
        from edge_client.device_folder import lock_device_folder
        from fedcore.flower.quiet import quiet

    quiet()
    log_lines(options.log or sys.stderr, throttled=True)
    check_task(owner, options.task)
    rate = owner.max_bandwidth_bytes_per_s
    passed = RateLimit(rate).passed if rate else None
    with lock_device_folder(activity.folder) as folder:
        folder.belongs_to(kit.public, so="Nothing was started")  # even if the policy pauses it now
        ended = ended_text(activity.interrupted())
        if ended:
            log.warning("this device's process before %s", ended)
        activity.begin(LOADING)
        instance, sign_off = secrets.token_hex(16), None
        if reason_to_pause(owner) is None:
            # Before torch is imported, which takes seconds: a running round soon gives up waiting.
            sign_off = announce(kit, options.task, folder, instance, passed, ended=ended)
        log.info("loading torch and its compiler: a few seconds, longer the first time")
        loading.set()
        try:
            with report_loading(log.info):
                import edge_client.agent.loop

                edge_client.agent.loop.warm_up()
            loading.clear()
            again = "" if sign_off is not None else ended
            session = _sessions(kit, owner, options.task, folder, instance, passed, again)
        except BaseException as error:
            if sign_off is not None:
                sign_off(reason_of(error))
            raise
        activity.begin(WAITING)
        run_sessions(session, owner)


def _sessions(
    kit: Kit,
    owner: OwnerPolicy,
    path: Path,
    folder: DeviceFolder,
    instance: str,
    passed: Callable[[int], None] | None,
    ended: str,
) -> Callable[[Signals], None]:
    """Returns a function that runs one training session.

    ``instance`` names the first session, which tells the server ``ended``.
    """
    from edge_client.agent.loop import run_device
    from edge_client.agent.policy import free_gpu, limit_gpu
    from edge_client.agent.run import DeviceSetup
    from fedcore.task.definition import load_task

    limit_gpu(owner)
    device = DeviceSetup(
        kit,
        load_task(path),
        path,
        owner,
        folder,
        passed=passed,
        between_rounds=free_gpu if owner.free_gpu_between_rounds else None,
    )
    firsts = iter([(instance, ended)])

    def session(signals: Signals) -> None:
        name, before = next(firsts, (secrets.token_hex(16), ""))
        run_device(replace(device, instance=name, ended=before), signals)

    return session


start = Command(
    help="take part in training with the installed task, until stopped",
    arguments=_start_arguments,
    run=_start,
    example="fedcore client start --kit kit --task task.py",
)
