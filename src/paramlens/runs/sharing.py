"""`paramlens push`: upload a run directory to the Hugging Face Hub, with a card that says what it is and how to open it."""

import fnmatch
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import yaml

from paramlens.config.file import load_config
from paramlens.errors import ConfigError, RunDirError
from paramlens.files.hub_errors import hub_errors
from paramlens.files.lock import locked
from paramlens.files.manifest import MANIFEST
from paramlens.files.plain import PART, json_text, read_json
from paramlens.runs.checkpoint import RESUMED
from paramlens.runs.description import ModelDescription, read_description
from paramlens.runs.layout import CONTENTS, HUB_ID, checkpoint_step, checkpoints, require_run
from paramlens.runs.verification import verify
from paramlens.tracking import TRACKING
from paramlens.version import __version__

CARD = "README.md"

MARK = "<!-- Written by paramlens push, and again by the next one; remove this line to keep what you change here. -->"

_SHARED = tuple(pattern for name in CONTENTS if name != TRACKING for pattern in (name, f"{name}/*"))


def push_to_hub(
    run: str | PathLike[str],
    repo: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    message: str | None = None,
    resumable: bool = False,
) -> str:
    """Upload a run directory to the repository `repo` (user/name) as one commit; returns the commit's URL.

    The repository and the branch are created if they are missing. Files of an earlier push that the run no longer has are deleted there.
    Locks, unfinished files and tracking are not uploaded.
    private: whether a new repository is private. Defaults to the account's setting. revision: the branch. Defaults to main.
    resumable: also upload the optimizer and the random generators, which triples the size. Without them, the copy can be read but not
    resumed, and its card says so.
    Raises `RunDirError` if the run is damaged, has no checkpoint or is being written to, or if the Hub refuses the upload.
    """
    path = Path(run)
    require_run(path)
    if not HUB_ID.fullmatch(repo):
        raise ConfigError(f"{repo}: no id of a repository, which is user/name")
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    with locked(path):
        _require_pushable(path, resumable=resumable)
        files = _files(path, resumable=resumable)
        files[CARD] = card(path, repo, resumable=resumable).encode()
        api = HfApi(library_name="paramlens", library_version=__version__)
        with hub_errors(repo, revision):
            api.create_repo(repo, private=private, exist_ok=True)
            if revision is not None and not revision.startswith("refs/"):
                api.create_branch(repo, branch=revision, exist_ok=True)
            there = set(api.list_repo_files(repo, revision=revision))
            if CARD in there and MARK not in Path(api.hf_hub_download(repo, CARD, revision=revision)).read_text(encoding="utf-8"):
                del files[CARD]
            gone = [name for name in sorted(there - files.keys()) if any(fnmatch.fnmatchcase(name, each) for each in _SHARED)]
            operations = [
                *(CommitOperationAdd(name, content) for name, content in sorted(files.items())),
                *(CommitOperationDelete(name) for name in gone),
            ]
            title = message or f"{path.absolute().name} at step {checkpoint_step(checkpoints(path)[-1])}"
            return str(api.create_commit(repo, operations, commit_message=title, revision=revision).commit_url)


def _require_pushable(path: Path, *, resumable: bool) -> None:
    found = verify(path)
    if not found.checkpoints:
        raise RunDirError(f"{path}: holds no finished checkpoint, so there is nothing to push")
    if not found.whole:
        problem = next(iter([*found.problems, *(each for report in found.checkpoints for each in report.problems)]))
        raise RunDirError(f"{path}: damaged, so nothing was pushed: {problem}; `paramlens verify {path}` lists all")
    if resumable and not found.resumable:
        raise RunDirError(f"{path}: a copy for reading, which has no optimizer to push; leave resumable out")


def _files(path: Path, *, resumable: bool) -> dict[str, Path | bytes]:
    """Name in the repository → file, or the bytes to upload instead of the file."""
    found = {file.relative_to(path).as_posix(): file for file in sorted(path.rglob("*")) if file.is_file() and not file.is_symlink()}
    kept: dict[str, Path | bytes] = {
        name: file for name, file in found.items() if PART not in name and any(fnmatch.fnmatchcase(name, each) for each in _SHARED)
    }
    if not resumable:
        kept["run.json"] = json_text(read_json(path / "run.json") | {"resumable": False}).encode()
        for folder in checkpoints(path):
            place = folder.relative_to(path).as_posix()
            entries = read_json(folder / MANIFEST)
            kept[f"{place}/{MANIFEST}"] = json_text({name: entry for name, entry in entries.items() if name not in RESUMED}).encode()
            for name in RESUMED:
                kept.pop(f"{place}/{name}", None)
    return kept


def card(path: Path, repo: str, *, resumable: bool) -> str:
    """The repository's README.md: metadata, what was decomposed, the metrics of `circuit` if it was run, and how to open the run."""
    described, info = read_description(path), read_json(path / "run.json")
    config = load_config(path / "config.yaml")
    metadata: dict[str, Any] = {"library_name": "paramlens", "tags": ["paramlens", "parameter-decomposition", "interpretability"]}
    if described.target.revision is not None:
        metadata |= {"base_model": described.target.id}
    lines = [
        *("---", yaml.safe_dump(metadata, sort_keys=False).strip(), "---", MARK, ""),
        *(f"# {config.name}, seed {config.seed}", ""),
        *(_what(described), ""),
        *(f"Step {checkpoint_step(checkpoints(path)[-1])} of {config.steps}, {info['status']}; made with {_versions(info)}.", ""),
        *_metrics(path),
        *("```python", "import paramlens", "", f'run = paramlens.open_run("{repo}")', "table = paramlens.circuit(run)", "```", ""),
        f"or `paramlens circuit {repo}`. Every file is listed with its sha256 in a `MANIFEST.json` and checked before it is read; "
        "`revision` pins a branch, a tag or a commit.",
        "",
        "With optimizer and generators: `hf download` gives a directory that `paramlens decompose --resume` can continue."
        if resumable
        else "A copy for reading: without the optimizer's state and the generators', it cannot be resumed.",
        "",
    ]
    return "\n".join(lines)


def _what(described: ModelDescription) -> str:
    target, sites = described.target, [site.name for site in described.sites]
    named = f"{target.id} at {target.revision}" if target.revision else target.id
    return (
        f"Stochastic Parameter Decomposition of {named}: {len(sites)} weight matrices ({sites[0]} to {sites[-1]}), each as "
        f"{described.C} rank-1 subcomponents, importance by a {described.gamma.kind} γ. Weights of the target: sha256 `{target.sha256}`."
    )


def _versions(info: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {version}" for name, version in info.get("versions", {}).items()) or "an unknown version"


def _metrics(path: Path) -> list[str]:
    file = path / "analysis" / "circuit.json"
    if not file.is_file():
        return []
    found = read_json(file)
    rows = [f"| {name} | {value:.3g} |" for name, value in found["metrics"].items()]
    return [f"| {found.get('evaluated_on', 'metric')} | |", "|---|---:|", *rows, ""]
