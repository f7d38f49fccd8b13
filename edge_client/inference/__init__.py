"""Inference with installed models, in a process with limits. Imports neither torch nor Flower.

Start with `confined`, which runs a model in a child process; `confined_child` is that process.
`inputs` parses what goes in, `answers` formats what comes out, and `selftest` and `bench` test and
time a model.
"""
