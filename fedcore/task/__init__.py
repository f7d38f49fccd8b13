"""What a user brings: a task with its model, data and metrics.

Read `definition` first. `partition` splits data that has no natural clients; `templates` writes a
task to start from.
"""
