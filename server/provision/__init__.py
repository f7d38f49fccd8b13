"""Provisioning: a project's certificate authority, its members, their keys, roles and expiry.

Start with `issue`, which implements each operation; `folder` describes the authority's files.
"""
