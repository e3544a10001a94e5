"""Every analysis as an object, one per file: the options of its command, what it writes to the run directory, its section of the page.

Read `circuit` first. No module here loads torch before its analysis runs.
"""
