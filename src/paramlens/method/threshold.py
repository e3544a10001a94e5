"""The importance above which a subcomponent is active. No torch here: the command line has the same default."""

from paramlens.errors import ConfigError

ACTIVE = 0.1
"""A subcomponent is active on a token if its importance g is above this."""


def require_threshold(threshold: float) -> None:
    """Raise `ConfigError` unless 0 ≤ threshold < 1."""
    if not 0 <= threshold < 1:
        raise ConfigError(f"threshold {threshold}: importances lie in [0, 1], so give a number from 0 to below 1")
