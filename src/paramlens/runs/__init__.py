"""From a model or a configuration to a finished run directory, and back.

Read `decompose` first, then `train` (the loop), `layout` (names in a run directory), `checkpoint`, `saving` and `metrics` (what is
written), `rundir` (a run opened for reading). `budget` and `forecast` estimate memory, `seeds` runs several seeds, `hub` and `sharing`
talk to the Hugging Face Hub, `shipped` has the example run.
"""
