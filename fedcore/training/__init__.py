"""Local training, shared by devices, the simulation and cloud processes; start with `client`.

In: a task, the run's settings, the owner's limits and a server's instruction. Out: an update.
`client` trains one client, `local` without privacy and `private` by DP-SGD, whose clipped
per-example gradients come from `per_example`.
"""
