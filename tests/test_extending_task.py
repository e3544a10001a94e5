"""A new task is one file and one line of the registry: tried in a copy of the package, with a toy whose answer is known."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import paramlens

TASK = '''"""Two linear maps that copy one of several inputs: an input is one rank-1 part of each."""

from typing import Literal

from paramlens.fields import Count
from paramlens.tasks.base import BaseTask, Skeleton, Target, TargetCheck, TrainingPlan, on_meta


class CopyTask(BaseTask):
    """One-hot inputs (batch, 1, inputs), and the same as the answer."""

    kind: Literal["copy"] = "copy"
    inputs: Count = 6
    """Inputs that are told apart."""
    rounds: Count = 60
    """Training steps of the target."""

    @property
    def trained_here(self):
        return True

    def network(self):
        from torch import nn

        return nn.Sequential(*(nn.Linear(self.inputs, self.inputs, bias=False) for _ in range(2)))

    def skeleton(self, *, batch):
        import torch

        return Skeleton(on_meta(self.network), torch.empty(1, 1, self.inputs, device="meta"), batch, 1, self.inputs)

    def training_plan(self):
        return TrainingPlan("two linear maps", self.rounds, "task.rounds", self.inputs, "task.inputs", 8 * self.inputs**2)

    def train(self, *, seed, device, on_check, on_given_up):
        import torch

        from paramlens.method.task import TargetHistory

        torch.manual_seed(seed)
        model, x, answers = self.network().to(device), torch.eye(self.inputs, device=device), torch.arange(self.inputs, device=device)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
        for _ in range(self.rounds):
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(model(x), answers)
            loss.backward()
            optimizer.step()
        accuracy = (model(x).argmax(1) == answers).double().mean().item()
        on_check(check := TargetCheck(self.rounds, loss.item(), accuracy))
        return Target(model, history=TargetHistory((check,), converged=accuracy == 1))

    def make(self, target, *, seed, batch):
        import torch

        from paramlens.method.batch import Batch
        from paramlens.method.generators import generator
        from paramlens.method.task import Task

        def one_hot(step, stream):
            drawn = torch.randint(self.inputs, (batch,), generator=generator(seed, stream, step))
            return Batch(torch.eye(self.inputs)[drawn, None], answers=drawn)

        return Task(target.model, one_hot)
'''

CONFIG = """
name: toy
steps: 3
batch: 8
C: 7
threads: 1
gamma: {kind: vector, d_gate: 2}
losses: {faithfulness: 1.0, recon: 1.0, minimality: 0.1}
task: {kind: copy, inputs: 5}
"""


@pytest.fixture(scope="module")
def extended(tmp_path_factory) -> Path:
    """A folder with a copy of the package that has the task, and a configuration of it."""
    folder = tmp_path_factory.mktemp("extended")
    shutil.copytree(Path(paramlens.__file__).parent, folder / "paramlens")
    (folder / "paramlens/tasks/copying.py").write_text(TASK, encoding="utf-8")
    registry = folder / "paramlens/tasks/registry.py"
    before = registry.read_text(encoding="utf-8")
    added = before.replace('        "custom:CustomTask",\n', '        "custom:CustomTask",\n        "copying:CopyTask",\n')
    assert len(added.splitlines()) == len(before.splitlines()) + 1
    registry.write_text(added, encoding="utf-8")
    (folder / "toy.yaml").write_text(CONFIG, encoding="utf-8")
    return folder


def run(folder: Path, *commands: str) -> subprocess.CompletedProcess[str]:
    """The commands in one process, which prints the exit code after each."""
    code = "import sys; from paramlens.cli.main import main\nfor each in sys.argv[1:]: print(main(each.split()))"
    where = os.environ | {"PYTHONPATH": str(folder), "COLUMNS": "200", "NUMBA_DISABLE_JIT": "1"}
    return subprocess.run([sys.executable, "-c", code, *commands], cwd=folder, env=where, capture_output=True, text=True)


@pytest.mark.slow
def test_a_new_task_is_estimated_decomposed_and_looked_at(extended):
    done = run(extended, "doctor toy.yaml --task.inputs 4", "decompose toy.yaml", "circuit runs/toy-s0 --adversary 0")
    assert [line for line in done.stdout.splitlines() if line in ("0", "1", "2")] == ["0", "0", "0"], done.stderr
    assert f"{2 * (4 + 4) * 7}" in done.stdout  # parameters of U and V
    assert "training the target: two linear maps" in done.stderr
    assert "target converged at step 60: loss" in done.stderr
    told = json.loads((extended / "runs/toy-s0/run.json").read_text(encoding="utf-8"))
    assert (told["status"], told["steps"], told["target"]["id"]) == ("finished", 3, "toy toy target")
    circuit = json.loads((extended / "runs/toy-s0/analysis/circuit.json").read_text(encoding="utf-8"))
    assert set(circuit["sites"]) == {"0", "1"}
    assert circuit["metrics"]["accuracy_target"] == 1


def test_a_new_task_explains_its_fields(extended):
    done = run(extended, "decompose toy.yaml --task.rounds 0", "decompose toy.yaml --help")
    assert "toy.yaml: task.rounds: 0: give 1 or more" in done.stderr
    assert done.stdout.startswith("2\n")
    assert "--task.inputs" in done.stdout
    assert "Inputs that are told apart." in done.stdout
