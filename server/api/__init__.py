"""fedcore from Python: each step of the loop is a call, whose result the next one goes on from.

In: a `Task` or its file, and a run or its file. Out: frozen results; whatever is wrong is a
`FedcoreError`. Nothing here prints or ends the process; progress is shown where it is wanted.
`fedcore` offers these names, and the command line calls the same functions. Read `simulation`
first; `steps` has fine-tuning, compression and release as calls of their own, `checking` the quick
check of a task, and `asked` how a task, a run and settings are understood.
"""
