"""One configuration of a run: its fields, its files, and messages about both.

`model` has all fields (those of the method, the machine and the tasks are defined beside them), `file` reads YAML and flags and explains
what is wrong, `shipped/` holds the named configurations.
"""
