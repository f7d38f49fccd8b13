"""The server's network: TLS connections, authentication, limits, and the calls of members.

Start with `gate`, which authenticates each request before it reads the body. `serve` starts all
servers, `connections` limits sockets, `presence` tracks online devices and decides when a silent
one counts as gone, `wake` notifies them, and `signatures` verifies their replies.
"""
