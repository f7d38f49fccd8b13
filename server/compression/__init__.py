"""Compression: builds smaller, faster versions of a trained model and chooses the best one.

In: a trained model, the run's limits and the cloud's data. Out: measured candidates as ONNX files,
one of them chosen. Start with `compress`; `export` converts a model to ONNX, `quantise`
calibrates and quantises it to int8, `rounding` trains for that, `prune` removes channels, `distil`
teaches a smaller network.
"""
