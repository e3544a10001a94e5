"""Every error that ParamLens raises on purpose. Each message names the value, the place and the remedy."""

import signal


def first_line(error: BaseException) -> str:
    """The first line of an error's message, and the second if the first ends in a colon. Defaults to the name of the error's type."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]


class ParamLensError(Exception):
    """Base class of these errors. `exit_code` is what the command line returns: 2 if the user's input is wrong, 1 otherwise."""

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
    """A run directory is missing, unfinished, already there, or its content does not match its description."""

    exit_code = 2


class SaveError(ParamLensError):
    """A checkpoint could not be written after several tries. Earlier checkpoints are intact."""


class TrackerError(ParamLensError):
    """A tracker has failed. The run goes on without it."""


class DivergedError(ParamLensError):
    """Training produced a value that is not finite. Raised before the optimizer step."""


class Terminated(KeyboardInterrupt):
    """A signal stopped the program. This is not an error, so it is not a `ParamLensError`."""

    def __init__(self, number: int = signal.SIGINT) -> None:
        super().__init__()
        self.exit_code = 128 + number


class RunInterrupted(Terminated):
    """A signal stopped training. The first signal lets the current step finish and saves it; a second stops at once, without saving."""
