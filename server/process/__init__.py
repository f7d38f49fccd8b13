"""Operating-system side of processes: signals, parents, memory, and spawning."""
