"""Baselines on the same task: an SVD of each weight (`svd`), and a training step written the obvious way (`naive`, `bench`)."""
