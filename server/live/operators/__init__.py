"""Administration of a running server: requests of operators and viewers, and their answers.

Start with `control`, which executes requests. `endpoint` receives them in the server, `client`
sends them, `server_client` is the Python API, `commands` is the command line, and `protocol`
defines their format. `server.operator_log` writes the audit log.
"""
