"""Training of many clients of any model: one run of the model for the batches of all of them.

The batches of ``K`` clients are joined to one of ``K * B`` examples. Functions without weights run
on it as they are; functions of weights run with each client's own, by the rules in `functions`,
`recurrent` and `attention`. Start with `train`.
"""
