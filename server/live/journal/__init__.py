"""The write-ahead journal of a deployment: cohorts, accepted replies and commits, in SQLite.

Start with `journal`. `entries` is the SQLite file, `packing` converts messages and progress to
entries, `blobs` stores large arrays as files, and `head` keeps a second copy of the commits.
"""
