"""Every error ParamLens raises on purpose: one family, each message naming the value, the place and the remedy."""


class ParamLensError(Exception):
    """Base of the family. `exit_code` is what the command line returns: 2 the user's input is wrong, 1 anything else."""

    exit_code = 1


class ConfigError(ParamLensError):
    """A configuration file, flag or argument is wrong."""

    exit_code = 2


class SiteError(ParamLensError):
    """A site pattern matches nothing, or a matched weight cannot be decomposed."""

    exit_code = 2


class BatchError(ParamLensError):
    """A batch does not fit the model or the importance network (too long, wrong shape)."""

    exit_code = 2


class RunDirError(ParamLensError):
    """A run directory is missing, unfinished, already there, or not what it says it is."""

    exit_code = 2


class RunInterrupted(KeyboardInterrupt):
    """Ctrl-C during training, after the step under way was finished and saved; not part of the family, as Ctrl-C is not an error."""


class DivergedError(ParamLensError):
    """Training produced a value that is not finite; raised before the optimizer step."""
