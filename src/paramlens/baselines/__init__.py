"""What a user would otherwise take, on the same task: an SVD of each weight (`svd`) and the obvious training step (`naive`, `bench`)."""
