"""Completion as a shell does it: the script is sourced, its function called."""

import dataclasses
import shutil
import subprocess

import pytest

from paramlens.cli.completion import script
from paramlens.cli.main import _COMMANDS, main
from paramlens.cli.options import Decompose
from paramlens.config.file import field_paths, shipped_configs

OPTIONS = {name: command.options for name, command in _COMMANDS.items()}


@pytest.fixture(scope="module")
def bash(tmp_path_factory: pytest.TempPathFactory):
    file = tmp_path_factory.mktemp("completion") / "paramlens.bash"
    file.write_text(script("bash", OPTIONS), encoding="utf-8")

    def complete(*words: str, cwd=None) -> list[str]:
        """What is offered for the last of the words."""
        code = 'source "$1"; shift; COMP_WORDS=(paramlens "$@"); COMP_CWORD=$#; _paramlens; printf "%s\\n" "${COMPREPLY[@]}"'
        done = subprocess.run(["bash", "-c", code, "bash", str(file), *words], cwd=cwd, capture_output=True, text=True, check=True)
        assert done.stderr == ""
        return sorted(filter(None, done.stdout.splitlines()))

    return complete


def test_commands(bash):
    assert bash("") == sorted([*OPTIONS, "--help", "--version"])
    assert bash("tr") == ["trace", "train-target"]
    assert bash("completion", "") == ["bash", "fish", "zsh"]


def test_every_option_and_every_field(bash):
    own = {f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(Decompose)} - {"--config"}
    fields = {f"--{path.replace('_', '-')}" for path in field_paths()}
    assert set(bash("decompose", "induction", "--")) == own | fields | {"--help"}
    assert set(bash("doctor", "induction", "--")) == {"--json", "--help"} | fields
    assert bash("decompose", "induction", "--seed", "1", "--optim.g") == ["--optim.gamma-lr"]
    assert bash("circuit", "runs", "--a") == ["--adversary"]
    assert "--optim.lr" not in bash("circuit", "runs", "--")


def test_values_where_only_some_are_right(bash):
    assert bash("decompose", "induction", "--gamma.kind", "") == ["attention", "scalar", "shared", "vector"]
    assert bash("train-target", "induction", "--task.kind", "f") == ["facts"]
    assert bash("suppress", "run", "--method", "p") == ["projection"]
    assert bash("decompose", "induction", "--optim.lr", "") == []
    assert "--steps" in bash("decompose", "induction", "--last-token-only", "--st")


def test_configurations_and_run_directories(bash, tmp_path):
    (tmp_path / "runs" / "with space").mkdir(parents=True)
    for name in ("mine.yaml", "mine.txt"):
        (tmp_path / name).write_text("")
    assert bash("decompose", "", cwd=tmp_path) == sorted([*shipped_configs(), "mine.yaml", "runs"])
    assert bash("decompose", "induction-", cwd=tmp_path) == ["induction-cpu", "induction-quick"]
    assert bash("circuit", "", cwd=tmp_path) == ["runs"]
    assert bash("inspect", "runs/", cwd=tmp_path) == ["runs/with space"]
    assert bash("agreement", "runs", "r", cwd=tmp_path) == ["runs"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_scripts_name_everything_and_are_read_by_their_shell(shell, capsys: pytest.CaptureFixture[str], tmp_path):
    assert main(["completion", shell]) == 0
    text = capsys.readouterr().out
    for name, kind in OPTIONS.items():
        assert name in text
        first = {"config", "shell", "run", "runs", "model"}
        assert all(field.name.replace("_", "-") in text for field in dataclasses.fields(kind) if field.name not in first)
    for path in field_paths():
        assert path.replace("_", "-") in text
    assert "induction-quick" in text
    if shutil.which(shell):
        (tmp_path / "script").write_text(text)
        subprocess.run([shell, "-n", str(tmp_path / "script")], check=True)


def test_a_shell_that_is_none(capsys: pytest.CaptureFixture[str]):
    assert main(["completion", "tcsh"]) == 2
    assert "bash" in capsys.readouterr().err
