"""From a model or a configuration to a finished run directory, and back.

Read `decompose` first, then `train` (the loop), `layout` (files of a run directory), `checkpoint`, `saving` and `metrics` (what is
written), and `rundir` (opens a run for reading). `budget` and `forecast` estimate memory, `seeds` runs several seeds, `hub` and `sharing`
use the Hugging Face Hub, and `shipped` has the example run.
"""
