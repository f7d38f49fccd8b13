"""A server that devices connect to: Flower's Fleet API over TLS 1.3, and a stream that wakes.

Read `run` first: `network` lets devices in, `rounds` drives and keeps what they answer in the
`journal`, and `operators` steer.
"""
