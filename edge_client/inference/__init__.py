"""Inference with installed models. Imports neither torch nor Flower.

Start with `engine`, which runs a model in this process where that is safe (`direct`), and otherwise
in a process with limits (`process`; `confined_child` is the child). `fixed_work` decides, from the
file alone. `confined` runs a model once, `inputs` parses what goes in, `answers` formats what comes
out, and `selftest` and `bench` test and time a model.
"""
