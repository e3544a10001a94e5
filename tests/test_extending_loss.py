"""A new loss is one file in method/losses and one coefficient in settings.Losses; everything that lists losses then lists it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import paramlens
from conftest import TINY

LOSS = '''"""The mean importance: a toy."""

import torch

from paramlens.method.losses.loss import DirectLoss, register

register(DirectLoss("toy", lambda known: torch.stack([g.mean() for g in known.g.values()]).mean()))
'''

FIELD = '''    toy: Coefficient = 0.0
    """The mean importance over all sites."""
'''

COMMANDS = """
import sys
from paramlens.cli.main import main

for words in (["--out", sys.argv[2]], ["--losses.xyz", "1"], ["--losses.toy", "0"], ["--help"]):
    sys.stderr.flush()
    print("-----", flush=True)
    main(["decompose", sys.argv[1], *words])
"""


def test_a_loss_is_one_file_and_one_field(tmp_path):
    package = tmp_path / "src" / "paramlens"
    shutil.copytree(Path(paramlens.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__", "example"))
    (package / "method" / "losses" / "toy.py").write_text(LOSS, encoding="utf-8")
    settings = package / "method" / "settings.py"
    before, place, after = settings.read_text(encoding="utf-8").partition("    p_start: Positive")
    settings.write_text(before + FIELD + place + after, encoding="utf-8")
    tree = TINY | {"steps": 2, "log_every": 1, "checkpoint": {"every": 1}, "losses": {"toy": 3.0}}
    config, run = tmp_path / "tiny.yaml", tmp_path / "run"
    config.write_text(yaml.safe_dump(tree), encoding="utf-8")

    done = subprocess.run(
        [sys.executable, "-c", COMMANDS, str(config), str(run)],
        env=os.environ | {"PYTHONPATH": str(package.parent), "COLUMNS": "200", "NUMBA_DISABLE_JIT": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        check=False,
    )
    assert done.returncode == 0, done.stdout
    _, trained, unknown, nothing, shown = done.stdout.split("-----\n")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    logged = [line for line in lines if "losses" in line]
    assert [line["total"] for line in logged] == [pytest.approx(3 * line["losses"]["toy"]) for line in logged], trained
    assert len(logged) == 2
    assert len({file.read_bytes() for file in run.glob("checkpoints/*/importance.safetensors")}) == 2, "γ follows its gradient"
    assert "--losses.toy" in shown
    assert "The mean importance over all sites." in shown
    assert "minimality, toy" in nothing
    assert "toy" in unknown
