"""Installs models from a repository of signed releases. Imports neither torch nor Flower.

Start with `update`: it verifies the release's signatures (`trust`, `roots`, `clock`), fetches its
files (`source`, `fetch`), runs the self-test, and installs the model (`store`).
"""
