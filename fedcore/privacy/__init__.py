"""Differential privacy: accounting, budgets, noise, and checks; start with `accounting`.

`planning` turns settings into a plan of noise and steps, `accounting` counts its epsilon, and
`ledger` keeps a client's charges within budgets. `draws` supplies batches and noise; `client_level`
clips whole updates. `layers` and `unsound` refuse what cannot be protected.
"""
