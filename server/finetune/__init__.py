"""Fine-tuning on the cloud's data, in this process or distributed over processes and GPUs.

Start with `launch.fine_tune`; `loop` is the training loop, `worker` the distributed process.
"""
