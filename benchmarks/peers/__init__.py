"""Other systems on the same workloads, each a program in an environment of its own.

A peer is run as ``python -m benchmarks.peers.NAME --workload W --rounds N --seed S --data FILE``
and prints one JSON line (`benchmarks.peers.common.Result`).
"""
