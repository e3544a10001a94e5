"""Use of the machine: compiled loops for the CPU, and settings of threads, precision and compilation.

Read `native` first: it lists the functions that have a compiled loop, and when PyTorch's version runs instead. `loops` has the loops,
`compiler` makes them callable, `mlps` the MLPs of γ, `flex` attention with a bias per offset on a GPU. `machine` applies
`settings` during a run, `resources` counts the cores and the memory that a run may use, and `openmp` keeps idle CPU threads from spinning.
"""
