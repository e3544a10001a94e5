"""`make` takes the newest Python that can make an environment, and says plainly where there is none."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
GOOD = f'#!/bin/sh\nexec {sys.executable} "$@"\n'
BROKEN = "#!/bin/sh\nexit 127\n"  # a version manager's stand-in for a version that is not there
OLD = "#!/bin/sh\nexit 1\n"

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")


def world(folder: Path, programs: dict[str, str]) -> dict[str, str]:
    """An environment whose PATH holds `programs` and what scripts need, but no Python."""
    for name in ("bash", "sh", "test", "echo", "env"):
        (folder / name).symlink_to(str(shutil.which(name)))
    for name, text in programs.items():
        (folder / name).write_text(text, encoding="utf-8")
        (folder / name).chmod(0o755)
    return {"PATH": str(folder)}


@pytest.mark.parametrize(
    ("programs", "chosen"),
    [
        ({"python3.11": GOOD, "python3.13": GOOD, "python3": GOOD}, "python3.13"),
        ({"python3.14": BROKEN, "python3.12": GOOD}, "python3.12"),
        ({"python3.11": OLD, "python3": GOOD}, "python3"),
        ({"python3": OLD}, None),
        ({}, None),
        ({"uv": '#!/bin/sh\n[ "$5" = 3.13 ] && echo "${0%/*}/of-uv"\n', "of-uv": GOOD, "python3.12": GOOD}, "of-uv"),
        ({"uv": "#!/bin/sh\nexit 2\n", "python3.12": GOOD}, "python3.12"),
    ],
)
def test_the_newest_python_is_found(tmp_path, programs: dict[str, str], chosen: str | None):
    found = subprocess.run(
        [str(shutil.which("bash")), str(ROOT / ".ci/python")], env=world(tmp_path, programs), capture_output=True, text=True, check=False
    )
    assert found.stdout.strip() == ("" if chosen is None else str(tmp_path / chosen))


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize(("words", "said"), [([], "No Python 3.11 or newer"), (["PYTHON=/of/mine"], "/of/mine")])
def test_make_says_what_is_missing_and_obeys(tmp_path, words: list[str], said: str):
    for name in ("Makefile", ".ci", "pyproject.toml", "constraints.txt"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "bin").mkdir()
    environment = {key: value for key, value in os.environ.items() if key != "PYTHON" and not key.startswith("MAKE")} | world(
        tmp_path / "bin", {}
    )
    make = subprocess.run(
        [str(shutil.which("make")), "demo", *words], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert make.returncode == 2
    assert said in make.stderr
    assert not (tmp_path / ".venv").exists()
