"""Settings: TOML files in, frozen models out, or an error that names file and key.

Read `run` first, the whole loop's settings, and `owner`, what the owner of a device decides.
"""
