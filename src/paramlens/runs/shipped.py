"""A finished run that comes with the library: the target of induction-quick, seed 0, decomposed with the paper's own losses."""

import shutil
from importlib import resources
from pathlib import Path

from paramlens.errors import RunDirError
from paramlens.runs.layout import is_run, require_free


def example(out: str | Path = "runs/example") -> Path:
    """Copy the shipped run, with its analyses, to `out`, unless there is already a run. Returns its path.

    Raises `RunDirError` if `out` has other content or cannot be written.
    """
    path = Path(out)
    if is_run(path):
        return path
    try:
        require_free(path, overwrite=False)
    except RunDirError:
        text = f"{path}: holds something else or cannot be written; give another place for the shipped run"
        raise RunDirError(text) from None
    path.parent.mkdir(parents=True, exist_ok=True)
    with resources.as_file(resources.files("paramlens.runs") / "example") as shipped:
        shutil.copytree(shipped, path, dirs_exist_ok=True)
    return path
