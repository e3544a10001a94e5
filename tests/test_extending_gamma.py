"""A new γ kind is one file and one line of the registry: a copy of the package is given one, and knows it everywhere."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import paramlens
from conftest import TINY, tiny_with
from paramlens.config.file import dump_config

LINEAR = '''"""The linear γ: one layer d_in → C for a whole site."""

import torch

from paramlens.method.importance.kind import GammaKind, Parameter


class LinearGamma(GammaKind):
    @classmethod
    def parameters_of_site(cls, gamma, *, d_in, max_length):
        return {"weight": Parameter((d_in, "C"), fan_in=d_in), "bias": Parameter(("C",), start=gamma.output_bias)}

    @classmethod
    def activations(cls, gamma, *, d_in, C, length):
        return d_in

    def forward(self, x, U, present):
        return torch.baddbmm(self.bias[:, None], torch.stack([of_site.flatten(0, -2) for of_site in x]), self.weight)
'''
REGISTERED = '    "linear": "linear.LinearGamma",\n'

USED = """
import contextlib, io, json, sys
import paramlens
from paramlens.cli.main import main

def told(*words):
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
        assert main([words[0], "tiny.yaml", "--gamma.kind", "linear", *words[1:]]) == 0
    return out.getvalue()

found = {"package": paramlens.__file__, "help": told("decompose", "--help"), "doctor": json.loads(told("doctor", "--json"))}
run = paramlens.open_run(json.loads(told("decompose", "--out", "run", "--json"))["run"])
found["step"], found["parameters"] = run.step, {name: list(p) for name, p in run.importance.site_parameters().items()}
json.dump(found, sys.stdout)
"""


def test_a_gamma_kind_is_one_file_and_one_line(tmp_path):
    package = tmp_path / "source" / "paramlens"
    shutil.copytree(Path(paramlens.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    folder = package / "method" / "importance"
    (folder / "linear.py").write_text(LINEAR, encoding="utf-8")
    registry = (folder / "settings.py").read_text(encoding="utf-8")
    last = '    "transformer": "transformer.TransformerGamma",\n'
    assert last in registry
    (folder / "settings.py").write_text(registry.replace(last, last + REGISTERED), encoding="utf-8")
    (tmp_path / "tiny.yaml").write_text(dump_config(tiny_with(steps=2)), encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": str(package.parent), "NUMBA_DISABLE_JIT": "1"}  # nothing to compile
    done = subprocess.run([sys.executable, "-c", USED], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert Path(found["package"]).parent == package
    assert "[choices: scalar, vector, attention, attention_shared, shared, transformer, linear]" in " ".join(found["help"].split())
    sites, width = 3 * 2, TINY["task"]["width"]
    assert found["doctor"]["parameters"]["gamma"] == sites * (width + 1) * TINY["C"]
    assert found["doctor"]["bytes"]["gamma"] == 4 * sites * (width + 1) * TINY["C"]
    assert found["step"] == 2
    assert list(found["parameters"].values()) == [["weight", "bias"]] * sites
