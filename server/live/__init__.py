"""The deployment server: Flower's Fleet API over TLS 1.3, and a wake-up stream to each device.

Start with `run`. `network` authenticates devices and serves their requests, `rounds` runs the
training rounds, `journal` makes each step durable, and `operators` serves administrative requests.
"""
