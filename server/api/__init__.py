"""fedcore's Python API: one function per step of the pipeline, each using earlier results.

In: a `Task` or its file, and a run or its file. Out: frozen result objects; every failure is a
`FedcoreError`. Functions never print results or exit the process; progress display is optional.
`fedcore` re-exports these names, and the command line calls the same functions.

Start with `simulation`. `steps` contains fine-tuning, compression and release as separate calls,
`checking` the quick check of a task, `replaying` one client of a round trained again, `releases`
the upkeep of a repository, and `arguments` the parsing of the task, run and settings arguments.
Calls for one room only are in that room: `server.provision.authority`, `server.live.launch`,
`server.live.operators.server_client`, `server.privacy.plan` and `auditing`,
`server.report.compared`.
"""
