"""A model with its manifest in, a signed release under a new version out.

Read `publish` first; `registry` is the signed repository that it goes to.
"""
