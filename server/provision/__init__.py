"""Provisioning: a project's certificate authority, its members, their keys, roles and expiry.

Start with `authority`, the part of the Python API, which the commands call. `issue` implements
each operation; `folder` describes the authority's files.
"""
