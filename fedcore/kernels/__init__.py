"""Loops compiled by numba and LLVM for the host processor; they read arrays and fill arrays.

Kernels know only shapes and numbers, not models, clients or privacy. Start with `compiled`, then
`llvm`, which emits vector code where numba fails to vectorise. Convolutions are `direct`, `im2col`
and `winograd`; their backward pass is `sparse_backward`.
"""
