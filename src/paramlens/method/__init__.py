"""The method of the paper, Stochastic Parameter Decomposition for sequence models, without files, commands or particular tasks.

Read in the order of Algorithm 3: `batch` and `task` (data and target), `sites/` (which weights; a file for each kind), `decomposition`
(W = U V), `start` (first values of U and V), `importance/` (γ and g, eq. 4 and Algorithm 1), `masks` (eq. 2), `losses/` (eq. 1 to 8),
`sources` (of the adversary), `merging`, `step` (Algorithm 3), `evaluate` (held-out importances), `threshold` (what counts as active).
`settings` has the fields of a configuration. `entry` and `slices` check on the first batch that a model can be decomposed.
"""
