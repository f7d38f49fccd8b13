"""The cloud: rounds over devices or virtual clients, fine-tuning, compression and release.

Read `pipeline` first: it is the loop from top to bottom.
"""
