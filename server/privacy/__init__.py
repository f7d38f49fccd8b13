"""Privacy tools: the forecast of a run's privacy cost, and the audit of private training.

Start with `plan` for the forecast and `audit` for the audit; each has a ``_command`` module.
`auditing` is the audit as a call. The operators' audit log is `server.operator_log`.
"""
