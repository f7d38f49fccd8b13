"""Client-level privacy of a round: clipped updates, a noised mean, and what the models cost.

Start with `mechanism`; `protection` is its state between rounds, and part of the run's progress.
"""
