"""Privacy ledger of a device: records each round's charge, and computes the epsilon spent.

Start with `ledger`, which records charges. `book` defines the files on disk, `contents`
distinguishes data sets, and `view` reads a ledger without changing it.
"""
