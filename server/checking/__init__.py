"""Check of a task before a run: looks at the data of all parties, and rehearses every stage.

In: a run and its task. Out: a `TaskCheck` with findings. Start with `check.check_task`; `looking`
looks at rows of data, `rehearsal` and `cloud_rehearsal` run one step of each stage.
"""
