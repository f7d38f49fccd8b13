"""Federated rounds: a model and a grid of clients in, a better model and its record out.

Read `loop` first: select, send, check, aggregate, judge, commit. `app` makes a ServerApp of it.
"""
