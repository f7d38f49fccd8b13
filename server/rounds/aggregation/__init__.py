"""Aggregates the updates of a round: their exact weighted mean, or all of them.

Start with `interface`: what an `Aggregation` is, and the three that exist. `exact_mean` is the sum
behind two of them; `limbs` stores it where it exceeds 64 bits. Updates come with
their weights from `server.rounds.inbound`, and `server.rounds.training` passes the result to the
strategy.
"""
