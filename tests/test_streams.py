"""What the command prints to: narrow encodings, closed streams, full disks, readers that have gone, terminals of a few columns."""

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from paramlens.cli.main import main
from paramlens.display.tables import Table, columns, row
from paramlens.display.terminal import print_tables

CODE = "from paramlens.cli.main import entry; entry()"
SCRIPT = ("completion", "bash")


def run(*words: str, redirect: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """The command in a shell with some redirection, stdout and stderr as far as they are left."""
    line = f'exec "$0" -c "$1" "${{@:2}}" {redirect}'
    command = ["bash", "-c", line, sys.executable, CODE, *words]
    return subprocess.run(
        command,
        capture_output=True,
        encoding=environment.get("PYTHONIOENCODING", "utf-8"),
        check=False,
        env={**os.environ, **environment},
    )


@pytest.mark.parametrize("encoding", ["ascii", pytest.param("cp1252", marks=pytest.mark.slow)])
@pytest.mark.parametrize("words", [("--help",), ("decompose", "facts-small", "--help"), ("frob γ",)])
def test_a_narrow_encoding_prints_escapes(words, encoding):
    done = run(*words, PYTHONIOENCODING=encoding)
    assert done.returncode == (2 if words == ("frob γ",) else 0)
    assert "Error" not in done.stderr
    if "facts-small" in words:
        assert r"\u03b3" in done.stdout


@pytest.mark.slow
def test_a_prompt_beyond_the_encoding(facts_run, capsys):
    """Tables escape it, JSON is the same as anywhere."""
    words = ["inspect", str(facts_run.path), "--prompt", "Zoë plays 篮球 γ"]
    table = run(*words, PYTHONIOENCODING="ascii")
    assert table.returncode == 0, table.stderr
    assert main([*words, "--json"]) == 0
    text = capsys.readouterr().out
    assert text.isascii()
    assert json.loads(text)["prompt"] == "Zoë plays 篮球 γ"


@pytest.mark.parametrize("redirect", [">&-", ">&- 2>&- <&-"])
@pytest.mark.parametrize("words", [("decompose", "--help"), SCRIPT, ("frob",)])
def test_streams_that_were_closed_before_the_start(words, redirect):
    done = run(*words, redirect=redirect)
    assert done.returncode == (2 if words == ("frob",) else 0), done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
@pytest.mark.parametrize("words", [("decompose", "--help"), SCRIPT])
def test_a_full_disk_under_stdout(words):
    done = run(*words, redirect=">/dev/full")
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("paramlens: ")
    assert "No space left" in done.stderr


def test_a_stderr_whose_reader_has_gone_takes_no_result_with_it():
    read, write = os.pipe()
    os.close(read)
    code = "import sys\nfrom paramlens.display.streams import ErrorConsole\nfor _ in range(2): ErrorConsole().print('x')\nprint('result')"
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=write, text=True, check=False)
    os.close(write)
    assert (done.returncode, done.stdout) == (0, "result\n")


@pytest.mark.parametrize("width", [20, 1, 0])
def test_a_terminal_of_few_columns(width):
    stream = io.StringIO()
    table = Table("Masks of a title", columns("site", "count"), (row("transformer.h.0.mlp.c_fc", "1,234,567"),))
    print_tables([table], Console(file=stream, width=width, force_terminal=True, no_color=True))
    lines = stream.getvalue().splitlines()
    assert max(len(re.sub("\x1b[^m]*m", "", line)) for line in lines) <= 20
    assert "1,234,567" in stream.getvalue()
