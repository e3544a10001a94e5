"""How the machine is used: inner loops for the CPU, and the settings of threads, precision and compilation.

Read `native` first: it says which functions have a compiled loop (`loops`) and when the PyTorch version runs instead. `mlps` holds the
small networks of γ, `flex` attention with a bias per offset on a GPU. `machine` applies `settings` for the time of a run, and `openmp`
keeps idle CPU threads from spinning.
"""
