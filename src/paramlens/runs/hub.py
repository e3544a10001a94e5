"""Fetch runs from the Hugging Face Hub, check them, and make plain run directories of them.

A revision is downloaded into Hugging Face's own cache. The files there are links, which a run directory must not have, so they are copied
once to `HF_HOME/paramlens/<user>--<name>/<commit>`; large files become hard links if the disk supports them. Files that analyses and the
page write to that folder stay there and are never uploaded. Each commit has its own folder.
"""

import os
import shutil
from pathlib import Path

from paramlens.errors import ConfigError, RunDirError
from paramlens.fields import expand_home
from paramlens.files.hub_errors import hub_errors
from paramlens.files.manifest import MANIFEST, problems
from paramlens.files.plain import PART
from paramlens.runs.checkpoint import damage
from paramlens.runs.layout import CONTENTS, checkpoints, is_hub_id, is_run
from paramlens.tracking import TRACKING
from paramlens.version import __version__


def locate(run: str | Path, *, revision: str | None = None) -> Path:
    """The directory of a run: the path itself, or, for a Hub id user/name, the fetched copy of a revision.

    Raises `ConfigError` if a revision is given for a path, and the errors of `fetch`.
    """
    if isinstance(run, str) and is_hub_id(run):
        return fetch(run, revision=revision)
    if revision is not None:
        raise ConfigError(f"revision {revision}: {run} is a path here, and only a run on the Hub has revisions; leave it out")
    return Path(expand_home(str(run)))


def fetch(repo: str, *, revision: str | None = None) -> Path:
    """Fetch the run of a repository and check all of it. Without a network, it is taken from the cache.

    revision: a branch, a tag or a commit. Defaults to main.

    Raises `RunDirError` if there is no such repository, revision or run, if the Hub cannot be reached, or if a file is damaged.
    """
    from huggingface_hub import constants, snapshot_download

    with hub_errors(repo, revision):
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
    """Copy the files that a snapshot links to into `copy`, all or none. Raises `RunDirError` if a file differs from its manifest."""
    part = copy.with_name(f"{copy.name}.{os.getpid()}{PART}")
    shutil.rmtree(part, ignore_errors=True)
    for file in sorted(file for file in snapshot.rglob("*") if file.is_file()):
        place = part / file.relative_to(snapshot)
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            if file.suffix != ".safetensors":  # other files may be changed in place, so they are copied
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
            f"{repo} at {snapshot.name[:12]}: {problem}; damaged there or during the download. Remove {snapshot.parent.parent} to fetch it "
            "again; if that does not help, its owner must push it again"
        )
    try:
        part.rename(copy)
    except OSError:
        shutil.rmtree(part)
        if not copy.is_dir():  # otherwise another process has made it in the meantime
            raise
