"""Simulation: many virtual clients on one machine, with the server and client apps of a deployment.

Start with `run`, then `grid`: a Flower Grid whose messages are answered by `workers`, which train
clients one after the other or in batches (`batched`).
"""
