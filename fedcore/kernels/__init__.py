"""Loops that numba and LLVM compile for the processor they run on: arrays in, arrays filled.

They know shapes and numbers, and nothing of models, clients or privacy. Read `compiled` first, then
`llvm`, which writes down what numba would not make vectors of.
"""
