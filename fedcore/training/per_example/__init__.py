"""Clipped sums of per-example gradients, for DP-SGD; start with `clipped_sum`, then `ways`."""
