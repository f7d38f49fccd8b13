"""Many clients trained at once: their models and batches in, their updates out.

Read `trainer` first, which chooses among `chained`, `linear` and `vmap` by the model.
"""
