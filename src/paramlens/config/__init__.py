"""The configuration of a run: its fields, its files, and messages about both.

`model` combines all fields (those of the method, the machine and the tasks are defined in their own modules), `file` reads YAML and flags
and explains errors, and `shipped/` has the named configurations.
"""
