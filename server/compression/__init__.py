"""A trained model in, the best of its measured candidates out: small, quick, and as accurate.

Read `compress` first; `export` makes ONNX of a model.
"""
