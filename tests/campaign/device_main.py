"""A device whose randomness is a seed, and whose clock may be wrong: for the campaign alone."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path


def main() -> int:
    parser = argparse.ArgumentParser()
    for name in ("kit", "task", "folder"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--clock-off-s", type=float, default=0.0)
    options = parser.parse_args()
    if options.clock_off_s:  # what signs and dates; OpenSSL asks the system itself
        right = time.time
        time.time = lambda: right() + options.clock_off_s
    from fedcore.crypto.kit import load_kit
    from fedcore.rpc.tls import only_tls_1_3

    only_tls_1_3()
    from edge_client.node.loop import Device, run_device
    from edge_client.node.state import own
    from edge_client.node.wake import Signals
    from fedcore.flower.quiet import quiet
    from fedcore.observability.lines import log_lines
    from fedcore.owner import OPEN_POLICY
    from fedcore.seeds import Simulated
    from fedcore.task import load_task

    quiet()
    log_lines(sys.stderr)
    kit, task = load_kit(options.kit), load_task(options.task)
    with own(options.folder) as folder:
        device = Device(kit, task, options.task, OPEN_POLICY, folder, Simulated(options.seed))
        run_device(device, Signals())
    return 0


if __name__ == "__main__":
    sys.exit(main())
