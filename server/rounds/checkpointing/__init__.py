"""What makes a run durable: its state between rounds, and how that is stored and read.

Start with `progress`, the state; `checkpointer` is the interface that a round calls,
`progress_codec` the encoding that its implementations share, and `run_identity` what a resumed run
must have in common with the interrupted one.
"""
