"""The paper's toy model (§5.1): `task` has its configuration, `model` its target, `sequences` its data, and `training` trains the target."""
