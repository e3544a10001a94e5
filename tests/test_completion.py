"""Completion as a shell does it: the script that the library makes is sourced, its function called."""

import shutil
import subprocess

import pytest

from paramlens.cli.commands import COMMANDS
from paramlens.cli.main import command_line, main
from paramlens.config.file import field_paths, shipped_configs
from paramlens.registry import ANALYSES

NAMES = [*COMMANDS, *(analysis.name for analysis in ANALYSES), "completion"]
FIELDS = {f"--{path.replace('_', '-')}" for path in field_paths()}
ALWAYS = {"--help", "-h", "--version"}


def options(name: str) -> set[str]:
    """Every option of a command that `--help` shows."""
    return {each.name for each in command_line()[name].assemble_argument_collection() if each.show and each.name.startswith("-")}


@pytest.fixture(scope="module")
def bash(tmp_path_factory: pytest.TempPathFactory):
    file = tmp_path_factory.mktemp("completion") / "paramlens.bash"
    file.write_text(command_line().generate_completion(shell="bash"), encoding="utf-8")

    def complete(*words: str, cwd=None) -> list[str]:
        """What is offered for the last of the words."""
        code = 'source "$1"; shift; COMP_WORDS=(paramlens "$@"); COMP_CWORD=$#; _paramlens; printf "%s\\n" "${COMPREPLY[@]}"'
        done = subprocess.run(["bash", "-c", code, "bash", str(file), *words], cwd=cwd, capture_output=True, text=True, check=True)
        assert done.stderr == ""
        return sorted(filter(None, done.stdout.splitlines()))

    return complete


def test_commands(bash):
    assert bash("") == sorted(NAMES)
    assert bash("tr") == ["trace", "train-target"]
    assert set(bash("-")) == ALWAYS
    assert bash("completion", "") == ["bash", "fish", "zsh"]


def test_every_option_and_every_field(bash):
    own = {"--target", "--seeds", "--out", "--resume", "--extend-steps", "--overwrite", "--track", "--json"}
    assert options("decompose") == own | FIELDS
    assert set(bash("decompose", "induction", "--")) == own | FIELDS | ALWAYS - {"-h"}
    assert set(bash("doctor", "induction", "--")) == {"--json"} | FIELDS | ALWAYS - {"-h"}
    assert bash("decompose", "induction", "--seed", "1", "--optim.g") == ["--optim.gamma-lr"]
    assert bash("circuit", "runs", "--a") == ["--adversary"]
    assert "--optim.lr" not in bash("circuit", "runs", "--")


def test_values_where_only_some_are_right(bash):
    assert bash("decompose", "induction", "--gamma.kind", "") == [
        "attention",
        "attention_shared",
        "scalar",
        "shared",
        "transformer",
        "vector",
    ]
    assert bash("train-target", "induction", "--task.kind", "f") == ["facts"]
    assert bash("suppress", "run", "--method", "p") == ["projection"]
    assert bash("decompose", "induction", "--optim.lr", "") == []
    assert "--steps" in bash("decompose", "induction", "--last-token-only", "--st")


def test_configurations_and_run_directories(bash, tmp_path):
    (tmp_path / "runs").mkdir()
    assert bash("decompose", "", cwd=tmp_path) == shipped_configs()
    assert bash("decompose", "induction-", cwd=tmp_path) == ["induction-cpu", "induction-quick", "induction-robust"]
    for command in ("circuit", "trace", "report", "agreement"):
        assert bash(command, "", cwd=tmp_path) == ["runs"]
    assert bash("agreement", "runs", "r", cwd=tmp_path) == ["runs"]


@pytest.mark.parametrize("shell", ["bash", *(pytest.param(shell, marks=pytest.mark.slow) for shell in ("zsh", "fish"))])
def test_scripts_name_everything_and_are_read_by_their_shell(shell, capsys: pytest.CaptureFixture[str], tmp_path):
    assert main(["completion", shell]) == 0
    text = capsys.readouterr().out
    for name in NAMES:
        assert name in text
        assert all(option.removeprefix("--") in text for option in options(name))
    assert "induction-quick" in text
    if shutil.which(shell):
        (tmp_path / "script").write_text(text)
        subprocess.run([shell, "-n", str(tmp_path / "script")], check=True)


def test_a_shell_that_is_none(capsys: pytest.CaptureFixture[str]):
    assert main(["completion", "tcsh"]) == 2
    assert 'completion: Invalid value "tcsh" for SHELL. Choose from: "bash", "zsh", "fish".' in capsys.readouterr().err
