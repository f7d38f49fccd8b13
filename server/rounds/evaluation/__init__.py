"""Evaluation of models in a run: of each round's, and of two that clients compare.

`evaluate` measures a round's model on clients' held-out data or on the cloud's; `judging` has
clients measure a model before and after fine-tuning.
"""
