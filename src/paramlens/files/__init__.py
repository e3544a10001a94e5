"""Read and write files that are complete or absent, and check them when they are read.

`plain` is for text and JSON, `yaml` for files that people write, `tensorfile` for tensors. `manifest` records sizes and hashes of a
folder's files, `lock` lets one process at a time write to a folder, and `hub_errors` translates errors of the Hugging Face Hub.
"""
