"""A server that dies at a point it is told, and says when it reaches each: for the campaign alone.

Everything else is the product's: `run_deployment` takes randomness and a listener as arguments.
"""

from __future__ import annotations

import argparse
import os
import resource
import signal
import sys
import time
from pathlib import Path

SENT = "sent"
right = time.time


def say(*words: object) -> None:
    """A line with the moment first and the seconds of CPU so far last."""
    line = ("#", f"{right():.4f}", *words, f"{time.process_time():.3f}")
    os.write(1, (" ".join(map(str, line)) + "\n").encode())


def main() -> int:
    parser = argparse.ArgumentParser()
    for name in ("config", "identity", "runs"):
        parser.add_argument(name, type=Path)
    parser.add_argument("host")
    parser.add_argument("port", type=int)
    parser.add_argument("wake_port", type=int)
    parser.add_argument("--die", default="", help="POINT:COUNT")
    parser.add_argument("--largest-file", type=int, help="bytes; stands for a full disk")
    parser.add_argument("--clock-off-s", type=float, default=0.0)
    parser.add_argument("--resume", action="store_true")
    options = parser.parse_args()
    if options.clock_off_s:  # OpenSSL asks the system itself
        time.time = lambda: right() + options.clock_off_s
    from fedcore.cli import build_parser
    from fedcore.config.settings import load_run

    build_parser("server")  # the time of it belongs to a start
    run = load_run(options.config, [])
    from fedcore.rpc.tls import require_tls_1_3

    require_tls_1_3()
    from server.process.memory import loading

    with loading():
        from fedcore.errors import FedcoreError
        from fedcore.flower.quiet import silence
        from fedcore.observability.lines import log_lines
        from fedcore.seeds import Simulated
        from server.live.deployment import Deployment
        from server.live.network.presence import Presence
        from server.live.operators.control import Control
        from server.live.run import run_deployment

    silence()
    log_lines(sys.stderr)
    say("imported")
    if options.largest_file:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (options.largest_file,) * 2)
    fatal, _, count = options.die.partition(":")
    left = int(count or 1)

    def reached(point: str) -> None:
        nonlocal left
        say(point)
        if point == fatal:
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    wake, arrive = Presence.wake, Presence.arrive

    def waking(self: Presence, node_ids: object) -> None:
        wake(self, node_ids)  # type: ignore[arg-type]
        reached(SENT)

    def arriving(self: Presence, *who: object) -> bool:
        came = arrive(self, *who)  # type: ignore[arg-type]
        say("arrived", who[2])
        return came

    Presence.wake, Presence.arrive = waking, arriving  # type: ignore[assignment, method-assign]
    deployment = Deployment(
        run=run,
        identity=options.identity,
        host=options.host,
        port=options.port,
        wake_port=options.wake_port,
        runs=options.runs,
        json=True,
        resume=options.resume,
    )
    control = Control(run, identity=options.identity, results=options.runs / run.name)
    try:
        whole = run_deployment(
            deployment, control, sys.stdout, randomness=Simulated(run.seed), on_point=reached
        )
    except FedcoreError as error:
        say("refused", type(error).__name__, error)
        return error.exit_code
    return 0 if whole else 130


if __name__ == "__main__":
    sys.exit(main())
