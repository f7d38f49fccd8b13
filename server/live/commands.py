"""The command ``fedcore server``: ``start``, ``rollback``, and the operators' verbs."""

from __future__ import annotations

import argparse
import shlex
import sys
from dataclasses import asdict
from pathlib import Path

from fedcore.cli import Command, group, json_option, show
from fedcore.config.run import RunConfig
from fedcore.config.settings import load_run
from fedcore.crypto.roster import check_server_folder
from fedcore.errors import INTERRUPTED, ConfigError
from fedcore.observability.foreign import say
from fedcore.observability.patience import report_loading
from fedcore.rpc.tls import require_tls_1_3, silence_grpc_core
from server.live.operators.commands import OPERATOR_VERBS
from server.options import listen_address, run_options, set_option
from server.process.memory import loading


def _start_arguments(parser: argparse.ArgumentParser) -> None:
    run_options(parser)
    parser.add_argument(
        "--identity",
        type=Path,
        default=Path("authority/server"),
        metavar="DIR",
        help="folder created by `fedcore provision server`, e.g. --identity server (default: "
        "%(default)s)",
    )
    parser.add_argument(
        "--listen",
        metavar="HOST:PORT",
        help="address on which devices connect, e.g. --listen 0.0.0.0:9092 (default: every "
        "address, and the port in the kits)",
    )
    parser.add_argument(
        "--wake-port",
        type=int,
        metavar="PORT",
        help="port on which devices are woken, e.g. --wake-port 9093 (default: the next port)",
    )
    parser.add_argument(
        "--delivery-port",
        type=int,
        metavar="PORT",
        help="also deliver what release.repository holds to devices, during the rounds, on this "
        "port, e.g. --delivery-port 9094; `fedcore release serve` delivers at any time",
    )
    parser.add_argument(
        "--runs",
        type=Path,
        default=Path("runs"),
        help="parent folder of the results (default: runs)",
    )
    parser.add_argument(
        "--log",
        type=Path,
        metavar="FILE",
        help="file for the log, rotated at 10 MiB, the last six kept, e.g. --log server.log "
        "(default: standard error)",
    )
    parser.add_argument("--json", action="store_true", help="print events as JSON lines")
    again = parser.add_mutually_exclusive_group()
    again.add_argument(
        "--resume",
        action="store_true",
        help="continue an interrupted run, or start one if there is none",
    )
    again.add_argument(
        "--fresh", action="store_true", help="start over, and discard an interrupted run"
    )


def _start(options: argparse.Namespace) -> int:
    run = load_run(options.config, options.overrides)  # before torch loads: fails at once
    host, port = listen_address(options.listen) if options.listen else ("0.0.0.0", None)  # noqa: S104
    if options.wake_port is not None and not 0 <= options.wake_port < 2**16:
        raise ConfigError(
            f"--wake-port {options.wake_port}: expected a port from 1 to 65535, or 0 to let the "
            "system choose. Nothing was started."
        )
    if options.delivery_port is not None and not 1 <= options.delivery_port < 2**16:
        raise ConfigError(
            f"--delivery-port {options.delivery_port}: expected a port from 1 to 65535. Nothing "
            "was started."
        )
    check_server_folder(options.identity)
    require_tls_1_3()  # gRPC reads this when it is imported, and Flower imports it
    silence_grpc_core()
    with report_loading(), loading():
        from fedcore.flower.quiet import silence
        from fedcore.observability.lines import log_lines
        from server.live.deployment import Deployment
        from server.live.operators.control import Control
        from server.live.operators.endpoint import server_lock
        from server.live.resume import has_journal
        from server.live.run import run_deployment

    silence()
    log_lines(options.log or sys.stderr)
    deployment = Deployment(
        run=run,
        identity=options.identity,
        host=host,
        port=port,
        wake_port=options.wake_port,
        delivery_port=options.delivery_port,
        runs=options.runs,
        json=options.json,
        resume=options.resume,
        fresh=options.fresh,
    )
    with server_lock(options.identity):
        control = Control(run, identity=options.identity, results=options.runs / run.name)
        try:
            if run_deployment(deployment, control, sys.stdout):
                return 0
        except KeyboardInterrupt:
            if not has_journal(run, options.runs):
                raise
        say(_stopped_text(options, control.last_round, run), to=sys.stderr)
        return INTERRUPTED


def _stopped_text(options: argparse.Namespace, last: int, run: RunConfig) -> str:
    """Returns the message for a stopped run: what is kept, and the command that resumes it."""
    rounds = run.federation.rounds
    done = f"after round {last} of {rounds}" if last else "before the end of its first round"
    kept = (
        "the model of that round and what devices have sent since" if last else "the started round"
    )
    if last == rounds:
        kept = "the model of its last round, and each completed step after it"
    return (
        f"Stopped {done}. Kept in {options.runs / run.name}: {kept}. `{_resume_command(options)}` "
        "continues from there; devices keep trying to connect until then."
    )


def _resume_command(options: argparse.Namespace) -> str:
    """Returns the command line that resumes the run with the same options."""
    words = ["fedcore", "server", "start", str(options.config)]
    for override in options.overrides:
        words += ["--set", override]
    words += ["--identity", str(options.identity), "--runs", str(options.runs)]
    for name in ("listen", "wake_port", "delivery_port", "log"):
        if getattr(options, name) is not None:
            words += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    return shlex.join([*words, *(["--json"] if options.json else []), "--resume"])


start = Command(
    help="train over the devices that connect, as configured in the run's file",
    arguments=_start_arguments,
    run=_start,
    example="fedcore server start run.toml --identity server",
)


def _rollback_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "round", type=int, metavar="ROUND", help="round whose model to return to, e.g. 7"
    )
    parser.add_argument(
        "config",
        type=Path,
        nargs="?",
        default=Path("run.toml"),
        metavar="RUN.toml",
        help="the run's file (default: run.toml)",
    )
    set_option(parser)
    parser.add_argument(
        "--identity",
        type=Path,
        default=Path("authority/server"),
        metavar="DIR",
        help="the server's folder, whose audit log records the rollback (default: %(default)s)",
    )
    parser.add_argument(
        "--runs",
        type=Path,
        default=Path("runs"),
        help="parent folder of the results (default: runs)",
    )
    json_option(parser)


def _rollback(options: argparse.Namespace) -> int:
    run = load_run(options.config, options.overrides)
    from server.live.rollback import roll_back_run

    done = roll_back_run(run, options.round, runs=options.runs, identity=options.identity)
    if done.mended:
        say(f"warning: {done.mended}", to=sys.stderr)
    dropped = ", ".join(map(str, done.dropped)) or "none"
    text = (
        f"{run.name}: continues after round {done.round} with --resume; rounds dropped: "
        f"{dropped}. First drain or revoke the device that spoilt those rounds, or it will send "
        "the same updates again."
    )
    return show(options, text, asdict(done))


rollback = Command(
    help="return to an earlier round's model, while no server runs",
    arguments=_rollback_arguments,
    run=_rollback,
    example="fedcore server rollback 7 run.toml --identity server",
)


def _verify_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "results", type=Path, metavar="DIR", help="the run's folder, e.g. runs/churn"
    )
    parser.add_argument(
        "--identity",
        type=Path,
        default=Path("authority/server"),
        metavar="DIR",
        help="the server's folder, which has the member list (default: %(default)s)",
    )
    json_option(parser)


def _verify(options: argparse.Namespace) -> int:
    from server.live.journal.evidence import require_sound
    from server.live.verify import shown_evidence, verify_run

    evidence = verify_run(options.results, options.identity)
    show(options, shown_evidence(evidence), asdict(evidence))
    require_sound(evidence, where=options.results)
    return 0


verify = Command(
    help="check the devices' signatures of all updates that a run has used",
    arguments=_verify_arguments,
    run=_verify,
    example="fedcore server verify runs/churn --identity server",
)

server = group(
    {"start": start, "rollback": rollback, "verify": verify, **OPERATOR_VERBS},
    "Run the server that devices connect to, and control it.",
)
