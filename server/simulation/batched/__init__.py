"""Training of many clients at once: takes their examples and the global model, returns updates.

Start with `trainer`, which chooses among `linear`, `chained` and `vmap` by the model.
"""
