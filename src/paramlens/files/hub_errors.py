"""Translate errors of the Hugging Face Hub's library into errors that name the repository and a remedy."""

from collections.abc import Iterator
from contextlib import contextmanager

from paramlens.errors import ConfigError, ParamLensError, RunDirError, first_line


@contextmanager
def hub_errors(
    repo: str,
    revision: str | None,
    *,
    place: str | None = None,
    raises: type[ParamLensError] = RunDirError,
    offline: str = "try again where there is a network",
) -> Iterator[None]:
    """While active, errors of the Hub's library are raised as `raises`, or as `ConfigError` if `repo` is not a repository id.

    place: start of the message. Defaults to the repository and the revision. offline: the remedy if the Hub cannot be reached.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        HTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    hub, place = constants.ENDPOINT, f"{repo} at {revision or 'main'}: " if place is None else place
    try:
        yield
    except HFValidationError as error:
        raise ConfigError(f"{place}no id of a repository, which is user/name ({first_line(error)})") from None
    except GatedRepoError:
        raise raises(f"{place}{hub} asks for access to be granted; ask for it on {hub}/{repo}, then `hf auth login`") from None
    except RevisionNotFoundError:
        raise raises(f"{place}the repository has no such revision; give a branch, a tag or a commit of it") from None
    except RepositoryNotFoundError:
        raise raises(f"{place}{hub} has no such repository, or shows it to others alone; check the name, or `hf auth login`") from None
    except (LocalEntryNotFoundError, OfflineModeIsEnabled):
        raise raises(f"{place}{hub} cannot be reached, and the cache does not hold it whole; {offline}") from None
    except HfHubHTTPError as error:
        status = error.response.status_code
        remedy = "`hf auth login` with a token that may do this" if status in (401, 403) else "try again later"
        raise raises(f"{place}{hub} answered {status} ({first_line(error)}); {remedy}") from None
    except HTTPError as error:
        raise raises(f"{place}{hub} cannot be reached ({first_line(error)}); {offline}") from None
    except (OSError, RuntimeError, ValueError) as error:
        raise raises(f"{place}the transfer failed ({first_line(error.__cause__ or error)}); try again") from None
