"""The signed repository of releases: keys, roles and metadata of The Update Framework (TUF).

Start with `repository`.
"""
