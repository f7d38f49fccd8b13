"""Many virtual clients on one machine, behind the apps of a deployment.

Read `run` first, then `grid`: a Grid whose messages are answered by `workers`, which train clients
one after the other or many at once (`batched`).
"""
