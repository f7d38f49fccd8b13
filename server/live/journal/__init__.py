"""The write-ahead journal of a deployment: what was asked, accepted and committed, in SQLite.

Read `journal` first; large arrays lie beside it (`blobs`), and `head` is a second copy of commits.
"""
