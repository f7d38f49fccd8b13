"""Virtual clients: which device each has and when it is there, its node, and what it has spent.

Read `devices` first; `trace` is where they come from, and `state` is kept between rounds.
"""
