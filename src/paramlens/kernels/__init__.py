"""How the machine is used: inner loops for the CPU, and the settings of threads, precision and compilation.

Read `native` first: it says which functions have a compiled loop and when the PyTorch version runs instead. `loops` holds the loops,
`elementary` the functions of one number that they are written with, `mlps` the small networks of γ, `flex` attention with a bias per
offset on a GPU. `machine` applies `settings` for the time of a run, `resources` counts the cores and the memory it may use, and
`openmp` keeps idle CPU threads from spinning.
"""
