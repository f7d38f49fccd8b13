"""The server side of fedcore: federated rounds, fine-tuning, compression and release.

Start with `rounds.loop` and `after_rounds`: together they are the whole pipeline. `simulation.run`
runs it over virtual clients, `live.run` over real devices.
"""
