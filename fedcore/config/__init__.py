"""Settings: reads TOML files into frozen models; errors name the file and the key.

Start with `run`, the settings of a whole run, then `owner`, the limits that a device's owner sets.
"""
