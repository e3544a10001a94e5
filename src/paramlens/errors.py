"""Every error ParamLens raises on purpose: one family, each message naming the value, the place and the remedy."""

import signal


def first_line(error: BaseException) -> str:
    """The first line of an error's message, and of one that ends in a colon the next as well. Defaults to the name of its type."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]


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


class SaveError(ParamLensError):
    """A checkpoint could not be written, again and again; those written before are whole."""


class TrackerError(ParamLensError):
    """A tracker beside a run has failed; the run goes on without it."""


class DivergedError(ParamLensError):
    """Training produced a value that is not finite; raised before the optimizer step."""


class Terminated(KeyboardInterrupt):
    """A signal ended what was under way; not part of the family, as that is no error."""

    def __init__(self, number: int = signal.SIGINT) -> None:
        super().__init__()
        self.exit_code = 128 + number


class RunInterrupted(Terminated):
    """A signal during training: after the first, the step under way was finished and saved; a second leaves the last good checkpoint."""
