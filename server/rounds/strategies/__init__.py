"""Aggregation strategies: the one that a run names, Flower's or the user's own, ready to run.

Read `flower` first, which chooses; `own` loads the user's, `checked` checks each of its answers,
and `algorithm` adapts it to Flower's interface. `state` saves and restores a strategy's memory.
"""
