"""The server's network: TLS connections, authentication, limits, and the calls of members.

Start with `gate`, which authenticates each request before it reads the body. `serve` starts all
servers, `connections` limits sockets, `presence` tracks online devices, `wake` notifies them, and
`signatures` verifies their replies.
"""
