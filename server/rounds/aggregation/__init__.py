"""Updates in, their weighted mean out: the same bits in whatever order they come.

Read `fold` first, which adds updates as they arrive; `exact_mean` is the sum.
"""
