"""Federated rounds: take a model and a grid of clients, return a better model and its records.

Start with `loop`: select, send, check, aggregate, evaluate, commit; `training` is the part up to
aggregating. `inbound` checks each reply and gives it its weight. `app` wraps the loop in a Flower
ServerApp.
"""
