"""Every analysis as an object: one file each, with its command's options, what it keeps in the run directory and its section of the page.

Read `circuit` first. Nothing here loads torch before an analysis runs.
"""
