"""The paper's toy model (§5.1): `task` names it, `model` is its target, `sequences` its data, and `training` trains it."""
