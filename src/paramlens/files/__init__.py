"""Files that are complete or absent, and are checked when they are read.

`plain` reads and writes text and JSON, `yaml` reads what people write by hand, `tensorfile` holds tensors. `manifest` records sizes and
hashes of a folder's files, `lock` lets one process at a time write to a folder.
"""
