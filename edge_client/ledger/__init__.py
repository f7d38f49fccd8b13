"""What a device has spent of its owner's privacy budget: charges in, epsilon out.

Read `ledger` first, which charges; `book` is what lies on disk, and `view` shows it and changes
nothing.
"""
