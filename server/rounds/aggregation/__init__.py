"""Exact weighted mean of updates: the same bits in any order of arrival.

Start with `exact_mean`, the sum; `limbs` stores it where it exceeds 64 bits. `server.rounds.fold`
adds updates to it as they arrive.
"""
