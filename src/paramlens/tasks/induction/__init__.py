"""The paper's toy model (§5.1): `task` is its configuration, `model` its target, `sequences` its data; `training` trains the target."""
