"""Runs on the Hugging Face Hub: fetched, checked, and laid out as plain run directories.

A revision is downloaded into Hugging Face's own cache. Its files there are links, which a run directory must not have; so they are laid out
once in `HF_HOME/paramlens/<user>--<name>/<commit>`, large files as hard links where the disk allows it. What analyses and the page
write stays in that folder: it is never uploaded, and another commit has another folder.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from paramlens.errors import ConfigError, RunDirError
from paramlens.files.manifest import MANIFEST, problems
from paramlens.files.plain import PART
from paramlens.runs.checkpoint import damage
from paramlens.runs.layout import CONTENTS, checkpoints, is_hub_id, is_run
from paramlens.tracking import TRACKING
from paramlens.version import __version__


def located(run: str | Path, *, revision: str | None = None) -> Path:
    """The directory of a run: a path as it is; for an id on the Hub, user/name, the fetched copy of a revision.

    Raises `ConfigError` if a revision is given for a path, and what `fetch` raises.
    """
    if isinstance(run, str) and is_hub_id(run):
        return fetch(run, revision=revision)
    if revision is not None:
        raise ConfigError(f"revision {revision}: {run} is a path here, and only a run on the Hub has revisions; leave it out")
    return Path(run)


def fetch(repo: str, *, revision: str | None = None) -> Path:
    """Fetch the run of a repository and check all of it; offline, take it from the cache.

    revision: a branch, a tag or a commit. Defaults to main.

    Raises `RunDirError` if there is no such repository, revision or run, if the Hub cannot be reached, or if a file is damaged.
    """
    from huggingface_hub import constants, snapshot_download

    with told(repo, revision):
        own = [name for name in CONTENTS if name != TRACKING]
        wanted = [pattern for name in own for pattern in (name, f"{name}/*")]
        snapshot = Path(
            snapshot_download(repo, revision=revision, allow_patterns=wanted, library_name="paramlens", library_version=__version__)
        )
    if not is_run(snapshot):
        raise RunDirError(f"{repo} at {revision or 'main'}: holds no run (it lacks config.yaml or run.json); see paramlens push")
    copy = Path(constants.HF_HOME) / "paramlens" / repo.replace("/", "--") / snapshot.name
    if not copy.is_dir():
        _lay_out(snapshot, copy, repo)
    return copy


def _lay_out(snapshot: Path, copy: Path, repo: str) -> None:
    """Copy the files that a snapshot links to into `copy`, all or none. Raises `RunDirError` if one differs from its manifest."""
    part = copy.with_name(f"{copy.name}.{os.getpid()}{PART}")
    shutil.rmtree(part, ignore_errors=True)
    for file in sorted(file for file in snapshot.rglob("*") if file.is_file()):
        place = part / file.relative_to(snapshot)
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            if file.suffix != ".safetensors":  # anything else may be written in place
                raise OSError
            os.link(file.resolve(), place)
        except OSError:
            shutil.copyfile(file, place)
    found = [str(each) for each in problems(part)] if (part / MANIFEST).is_file() else []
    found += [each for folder in checkpoints(part) for each in damage(folder)]
    if found:
        shutil.rmtree(part)
        problem = found[0].replace(f"{part}{os.sep}", "")
        raise RunDirError(
            f"{repo} at {snapshot.name[:12]}: {problem}; it was damaged there or on its way. Remove {snapshot.parent.parent} to fetch it "
            "again; if that does not help, its owner pushes it again"
        )
    try:
        part.rename(copy)
    except OSError:
        shutil.rmtree(part)
        if not copy.is_dir():  # no other process has made it in the meantime
            raise


@contextmanager
def told(repo: str, revision: str | None) -> Iterator[None]:
    """Turn what the Hub's library raises into a `RunDirError` that names the repository, the revision and a remedy."""
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

    place, named = constants.ENDPOINT, f"{repo} at {revision or 'main'}"
    try:
        yield
    except HFValidationError as error:
        raise ConfigError(f"{repo}: no id of a repository, which is user/name ({_first_line(error)})") from None
    except GatedRepoError:
        raise RunDirError(f"{named}: {place} asks for access to be granted; ask for it on {place}/{repo}, then `hf auth login`") from None
    except RevisionNotFoundError:
        raise RunDirError(f"{named}: the repository has no such revision; give a branch, a tag or a commit of it") from None
    except RepositoryNotFoundError:
        raise RunDirError(
            f"{named}: {place} has no such repository, or shows it to others alone; check the name, or `hf auth login`"
        ) from None
    except (LocalEntryNotFoundError, OfflineModeIsEnabled):
        raise RunDirError(
            f"{named}: {place} cannot be reached, and the cache does not hold it whole; try again where there is a network"
        ) from None
    except HfHubHTTPError as error:
        status = error.response.status_code
        remedy = "`hf auth login` with a token that may do this" if status in (401, 403) else "try again later"
        raise RunDirError(f"{named}: {place} answered {status} ({_first_line(error)}); {remedy}") from None
    except HTTPError as error:
        raise RunDirError(f"{named}: {place} cannot be reached ({_first_line(error)}); try again where there is a network") from None
    except (OSError, RuntimeError, ValueError) as error:
        raise RunDirError(f"{named}: the transfer failed ({_first_line(error.__cause__ or error)}); try again") from None


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
