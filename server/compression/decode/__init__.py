"""Decode graphs: from a model of all positions, one that computes new positions with a cache.

In: an exported or quantised next-token model. Out: the same file with a decode graph, or the reason
why it has none. Start with `attach`; `rewrite` walks the model's graph by the `rules` of operators.
"""
