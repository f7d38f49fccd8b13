"""From a socket to a member's checked call.

Read `gate` first, which asks who calls before it reads; `serve` starts all of it.
"""
