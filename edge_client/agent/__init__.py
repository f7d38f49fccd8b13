"""The warm process that trains: calls of the server in, signed replies out.

Read `loop` first: it pulls a message, asks `policy` whether the owner allows it now, has the
installed app answer, and keeps `state` and reply on disk before the reply leaves.
"""
