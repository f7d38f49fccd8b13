"""The cloud: rounds over devices or virtual clients, fine-tuning, compression and release.

Read `rounds.loop` and `after_rounds` first: together they are the loop from top to bottom.
`simulation.run` runs it over virtual clients, and `live.run` over devices.
"""
