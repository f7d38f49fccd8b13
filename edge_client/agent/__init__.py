"""The training process of a device: the server's messages in, signed replies out.

`policy` runs a session whenever the owner's policy allows it. Start with `loop`, which is that
session: it pulls a message, has the installed app answer it, and writes the run's state and the
reply to disk before it sends the reply.
"""
