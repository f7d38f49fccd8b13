"""Operators' and viewers' requests in, what they steer and see out.

Read `control` first, which does what is asked; `endpoint` and `client` are the two ends of the way
to it.
"""
