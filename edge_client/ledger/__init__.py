"""Privacy ledger of a device: records each round's charge, and computes the epsilon spent.

Start with `ledger`, which records charges. `book` defines the files on disk, `contents`
distinguishes data sets, `view` and `export` read a ledger without changing it, and `reading` has
the functions for a device's owner, which the Python API and the command line share.
"""
