"""Training rounds over real devices: durable in a journal, and steered by operators.

Start with `journaled`. `steered` adds pause and stop, `waiting` reports progress, and `settings`
selects the configuration that devices receive.
"""
