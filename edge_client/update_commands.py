"""The commands ``fedcore device update | run``, for a device's owner."""

from __future__ import annotations

import argparse
import sys
import threading
from pathlib import Path

from edge_client.delivery.places import ReleasePlace
from edge_client.delivery.store import check_name
from edge_client.options import (
    limits_of,
    limits_options,
    model_option,
    store_option,
    threads_option,
)
from edge_client.update_model import read_root, update_model
from fedcore.cli import Command, show
from fedcore.config.owner import OPEN_POLICY, load_owner
from fedcore.observability.foreign import say
from fedcore.rpc.tls import require_tls_1_3, silence_grpc_core


def _place_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--repository",
        metavar="DIR|URL",
        help="folder of the signed repository, or its https address, e.g. --repository "
        "https://releases.example.org/digits",
    )
    parser.add_argument(
        "--server",
        metavar="HOST[:PORT]",
        help="the project's server, which delivers releases, e.g. --server fl.example.org "
        "(default port: two above the kit's, such as 9094); needs --kit",
    )
    parser.add_argument(
        "--kit",
        type=Path,
        metavar="DIR",
        help="folder of this device's kit, the identity for --server, e.g. --kit kit",
    )
    parser.add_argument(
        "--root",
        type=Path,
        metavar="FILE",
        help=(
            "the root.json to trust, e.g. --root root.json; needed for the first update, which "
            "pins it in the store"
        ),
    )


def _update_arguments(parser: argparse.ArgumentParser) -> None:
    store_option(parser)
    model_option(parser)
    threads_option(parser)
    limits_options(parser)
    _place_options(parser)
    parser.add_argument(
        "--again",
        action="store_true",
        help="install the newest version even if this device returned from it before",
    )


def _update(options: argparse.Namespace) -> int:
    done = update_model(
        options.store,
        options.model,
        repository=options.repository,
        server=options.server,
        kit=options.kit,
        root=options.root,
        threads=options.threads,
        limits=limits_of(options),
        again=options.again,
    )
    if done.clock:
        say(f"warning: {done.clock}", to=sys.stderr)
    if done.damage:
        say(f"warning: the previously installed version was damaged: {done.damage}", to=sys.stderr)
    if done.held:
        text = f"{done.model}: version {done.version} serves; {done.held}"
    elif not done.changed:
        text = f"{done.model}: version {done.version} is already current"
    else:
        kept = f"; version {done.previous} is kept" if done.previous else ""
        text = (
            f"{done.model}: version {done.version} is active; self-test passed, largest difference "
            f"{done.golden_error:.3g}{kept}"
        )
    value = {
        "model": done.model,
        "version": done.version,
        "previous": done.previous,
        "changed": done.changed,
        "golden_error": done.golden_error,
        "clock": done.clock,
        "damage": done.damage,
        "held": done.held,
    }
    return show(options, text, value)


def _run_arguments(parser: argparse.ArgumentParser) -> None:
    store_option(parser)
    parser.add_argument(
        "--model",
        action="append",
        required=True,
        metavar="NAME",
        help="a model to keep current, e.g. --model digits; repeat for more",
    )
    threads_option(parser)
    limits_options(parser)
    _place_options(parser)
    parser.add_argument(
        "--look-every",
        type=_interval,
        default=3600.0,
        metavar="S",
        help="longest time between two looks at the repository, in seconds; a server's word makes "
        "the device look at once, e.g. --look-every 600 (default: %(default)g)",
    )
    parser.add_argument(
        "--check-every",
        type=_interval,
        default=300.0,
        metavar="S",
        help="seconds between two checks of the health of what serves, e.g. --check-every 60 "
        "(default: %(default)g)",
    )
    parser.add_argument(
        "--owner",
        type=Path,
        metavar="FILE",
        help="file with the limits set by the owner of this device, e.g. --owner owner.toml; with "
        "`feedback = true` there, the server is told how models are used here (default: it is not)",
    )
    parser.add_argument(
        "--log",
        type=Path,
        metavar="FILE",
        help="file for the log, rotated at 10 MiB, the last six kept, e.g. --log agent.log "
        "(default: standard error)",
    )


def _interval(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 1 <= seconds <= 7 * 86400:
        raise argparse.ArgumentTypeError(f"expected 1 to {7 * 86400} seconds, got {text!r}")
    return seconds


def _run(options: argparse.Namespace) -> int:
    require_tls_1_3()
    silence_grpc_core()
    from edge_client.agent.stopping import stop_on_signals
    from edge_client.delivery.follow import AgentState, Following, follow
    from fedcore.observability.lines import log_lines

    for model in options.model:
        check_name(model)
    following = Following(
        place=ReleasePlace(options.repository, options.server, options.kit),
        store=options.store,
        models=tuple(dict.fromkeys(options.model)),
        root=read_root(options.root),
        threads=options.threads,
        limits=limits_of(options),
        look_s=options.look_every,
        health_s=options.check_every,
        owner=load_owner(options.owner) if options.owner else OPEN_POLICY,
    )
    log_lines(options.log or sys.stderr, throttled=True)
    state = AgentState()
    with stop_on_signals(threading.Event()) as told:
        try:
            follow(following, state)
        except KeyboardInterrupt:
            if not told():
                raise
        finally:
            state.stop.set()
    return 0


run = Command(
    "Keep models current and healthy, until stopped: install releases, return from bad ones.",
    _run_arguments,
    _run,
    "fedcore device run --server fl.example.org --kit kit --root root.json --model digits "
    "--store store",
)

update = Command(
    "Fetch, verify, self-test and activate the current release of a model.",
    _update_arguments,
    _update,
    "fedcore device update --server fl.example.org --kit kit --root root.json --model digits "
    "--store store",
)
