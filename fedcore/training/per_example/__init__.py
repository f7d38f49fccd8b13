"""Each example's own gradient, clipped and summed; read `clipped_sum` first."""
