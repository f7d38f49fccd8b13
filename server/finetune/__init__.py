"""Fine-tuning on the cloud's data, in this process or distributed over processes and GPUs.

Start with `launch.fine_tune`; `loop` is the training loop, `agent` starts processes by torchrun's
elastic agent, `worker` is such a process, and `checkpoints` lets training continue after a fault.
"""
