"""The device side: trains on the server's request, and serves released models.

Start with `edge_client.agent.loop` for training, and with `edge_client.delivery.update` for how a
release is fetched, verified and installed.
"""
