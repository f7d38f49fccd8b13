"""From inputs to answers of an installed model. Nothing here imports torch or Flower.

Read `session` first, which opens a model, and `confined`, which runs one that nobody has seen run.
"""
