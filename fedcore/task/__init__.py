"""The user's side: a task with its model, data and metrics, and custom algorithms.

Start with `definition`. `partition` splits data that has no natural clients; `templates` writes a
task to start from.
"""
