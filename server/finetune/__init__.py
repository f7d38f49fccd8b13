"""Training on the cloud's data, distributed over processes and GPUs."""
