"""A device: trains when it is asked to, and serves what its owner has installed.

Read `edge_client.agent.loop` for a device at work, and `edge_client.delivery.update` for how a
released model comes to serve.
"""
