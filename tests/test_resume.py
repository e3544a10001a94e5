"""Old runs open, one process writes, runs grow, every generator is taken up again, and no pickle is read or written."""

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from audit import PICKLES_READ
from conftest import TINY, tiny_with, until
from faults import result
from paramlens.cli.main import main
from paramlens.config.file import dump_config, load_config, make_config
from paramlens.errors import ConfigError, RunDirError
from paramlens.files.lock import locked
from paramlens.files.plain import read_json
from paramlens.runs.decompose import decompose, decompose_config
from paramlens.runs.layout import FORMAT, checkpoint_path, checkpoint_step, checkpoints
from paramlens.runs.rundir import open_run
from paramlens.runs.verification import verify

GOLDEN = Path(__file__).parent / "golden"
FORMATS = sorted(path.name for path in GOLDEN.iterdir())


@pytest.mark.parametrize("version", FORMATS)
@pytest.mark.parametrize("kind", ["induction", "facts"])
def test_runs_of_every_format_open(version: str, kind: str):
    """Committed runs of the version that first wrote each format: whole, readable, with their task."""
    path = GOLDEN / version / kind
    run = open_run(path)
    assert verify(path).whole
    assert run.info["format"] == int(version.removeprefix("format-"))
    assert run.step == run.config.steps
    assert run.task is not None
    assert run.task.batch(0, "evaluate").roles is not None
    saved = load_file(checkpoint_path(path, run.step) / "components.safetensors")
    for site, U in run.decomposition.U.items():
        assert U.equal(saved[f"{site}.U"])
    assert run.metrics[-1]["step"] == run.step


@pytest.mark.parametrize("version", FORMATS)
def test_runs_of_every_format_go_on(version: str, tmp_path):
    """From the checkpoint at step 8 to near what that version ended with. Only a directory of format 1 becomes one of the newest.

    Random masks are another draw of the same distribution in another version, so the last steps go nearly the same way, not the same.
    """
    path = tmp_path / "run"
    shutil.copytree(GOLDEN / version / "induction", path)
    shutil.rmtree(checkpoint_path(path, 12))
    run = decompose_config(load_config(path / "config.yaml"), out=path, resume=True)
    start, ours, theirs = (
        torch.cat([value.flatten() for value in load_file(checkpoint_path(where, step) / "components.safetensors").values()])
        for where, step in ((path, 8), (path, 12), (GOLDEN / version / "induction", 12))
    )
    assert (ours - theirs).norm() < 0.1 * (theirs - start).norm()
    assert (run.info["format"], verify(path).whole) == (FORMAT if version == "format-1" else int(version[-1]), True)
    assert [line["step"] for line in run.metrics] == [line["step"] for line in open_run(GOLDEN / version / "induction").metrics]


def test_a_second_writer_is_refused(tmp_path, capsys):
    """By name while the first lives; a lock whose holder was killed is free."""
    file, path = tmp_path / "tiny.yaml", tmp_path / "run"
    file.write_text(dump_config(make_config(TINY)), encoding="utf-8")
    code = "from pathlib import Path; from paramlens.files.lock import locked\n"
    code += f"with locked(Path({str(path)!r})): print('held', flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        assert main(["decompose", str(file), "--out", str(path)]) == 2
        assert f"process {holder.pid} on " in capsys.readouterr().err
        assert not (path / "config.yaml").exists()
        holder.kill()
    assert main(["decompose", str(file), "--out", str(path)]) == 0
    assert not (path / ".lock.json").exists()
    with locked(path), pytest.raises(RunDirError, match=rf"process {os.getpid()} on .* has been writing to it for \d+ min; wait for it"):
        decompose_config(tiny_with(), out=path, resume=True)


def test_a_failure_leaves_no_empty_directories(tmp_path):
    with pytest.raises(ConfigError, match="NFS"), locked(tmp_path / "a" / "b"):
        raise ConfigError("NFS")
    assert not list(tmp_path.iterdir())


STEADY = {
    "losses": {"stochastic_recon": 1.0, "faithfulness": 10.0, "minimality": 0.02, "p_start": 0.5, "p_final": 0.5},
    "optim": {"schedule": "constant", "warmup": 2},
}


@pytest.mark.slow
def test_a_run_that_is_extended_is_the_longer_run(tmp_path):
    longer = decompose_config(tiny_with(steps=16, **STEADY), out=tmp_path / "longer")
    config = tiny_with(steps=8, **STEADY)
    decompose_config(config, out=tmp_path / "run")
    with pytest.raises(ConfigError, match="extend_steps 4: the run is of 8 steps; give more"):
        decompose_config(config, out=tmp_path / "run", resume=True, extend_steps=4)
    run = decompose_config(config, out=tmp_path / "run", resume=True, extend_steps=16)
    ours, theirs = result(run.path), result(longer.path)
    assert {name: ours[name] for name in ours if name not in ("metrics.jsonl", "state.json")} == {
        name: theirs[name] for name in theirs if name not in ("metrics.jsonl", "state.json")
    }, "metrics have one line more, that of the old end"
    assert (run.config.steps, verify(run.path).whole) == (16, True)
    with pytest.raises(ConfigError, match="steps 16 → 8"):
        decompose_config(config, out=run.path, resume=True)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"optim": {"schedule": "cosine"}}, "optim.schedule cosine"),
        ({"optim": {"schedule": "constant", "warmup": 0.1}}, "optim.warmup 0.1, a share"),
        ({"losses": STEADY["losses"] | {"p_start": 0.9}}, "losses.p_start 0.9 to p_final 0.5"),
        ({"optim": {"schedule": "constant", "project_from": 0.5}}, "optim.project_from 0.5"),
        ({"losses": STEADY["losses"] | {"smooth_minimality": 0.1}}, "smooth.start 1 to final 0.01"),
        ({"losses": STEADY["losses"] | {"adversarial": 1.0}}, "adversary.start 0.35, a share"),
    ],
)
def test_a_run_that_depends_on_its_length_is_not_extended(tmp_path, tiny_run, fields: dict, reason: str):
    path = tmp_path / "run"
    config = tiny_with(**(STEADY | fields))
    decompose_config(config, out=path, target=tiny_run.path)
    with pytest.raises(ConfigError, match=rf"depends on its 12 steps \({reason}\); start a new one with steps 20"):
        decompose_config(config, out=path, resume=True, extend_steps=20)


def test_a_finished_run_says_so(tiny_run, tmp_path, capsys):
    path, file = tmp_path / "run", tmp_path / "tiny.yaml"
    shutil.copytree(tiny_run.path, path)
    file.write_text(dump_config(make_config(TINY)), encoding="utf-8")
    assert main(["decompose", str(file), "--resume", "--out", str(path)]) == 0
    assert "already finished at step 12" in capsys.readouterr().err


def test_checkpoints_that_are_kept(tiny_run, tmp_path):
    config = tiny_with(steps=20, checkpoint={"every": 2, "keep_last": 1, "keep_every": 8})
    run = decompose_config(config, out=tmp_path / "run", target=tiny_run.path)
    assert [checkpoint_step(folder) for folder in checkpoints(run.path)] == [8, 16, 20]


class Noisy(nn.Module):
    """Draws from every global generator that a model of the user's may draw from."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        noise = 1e-5 * (torch.randn(2) + torch.tensor([random.gauss(0, 1), float(np.random.standard_normal())]))
        return self.layer(x) + noise


def noisy_run(path: Path, stop: int | None) -> None:
    """Ten steps, or those up to `stop` and then the rest in a resumed run."""
    torch.manual_seed(0)
    model, fields = Noisy(), {"C": 2, "steps": 10, "threads": 1, "gamma": {"kind": "vector", "d_gate": 2}, "checkpoint": {"every": 5}}

    def batches(step: int) -> torch.Tensor:
        if step == stop and not (path / "stopped").exists():
            (path / "stopped").touch()
            raise KeyboardInterrupt
        return torch.randn(64, 3) + float(np.random.random()) + random.random()

    try:
        decompose(model, batches, out=path, **fields)
    except KeyboardInterrupt:
        random.seed(1)  # whatever happens in between
        decompose(model, batches, out=path, resume=True, **fields)


@pytest.mark.slow
def test_every_generator_is_taken_up_again(tmp_path):
    """Without the tests' own type checks, which draw from Python's generator."""
    script = (
        "import sys, jaxtyping; from pathlib import Path; jaxtyping.install_import_hook = lambda *_: None\n"
        "sys.path.insert(0, sys.argv[1]); import test_resume as t\n"
        "t.noisy_run(Path(sys.argv[2]), None); t.noisy_run(Path(sys.argv[3]), 7)"
    )
    words = [sys.executable, "-c", script, str(Path(__file__).parent), str(tmp_path / "whole"), str(tmp_path / "cut")]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    ours, theirs = (load_file(checkpoint_path(tmp_path / name, 10) / "rng.safetensors") for name in ("cut", "whole"))
    for name in theirs:
        assert ours[name].equal(theirs[name]), name
    assert result(tmp_path / "cut") == result(tmp_path / "whole")


def test_verify_as_a_command(tiny_run, tmp_path, capsys):
    path = tmp_path / "run"
    shutil.copytree(tiny_run.path, path)
    assert main(["verify", str(path), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["whole"], document["last_good"], document["status"]) == (True, 12, "finished")
    file = checkpoint_path(path, 12) / "optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert main(["verify", str(path)]) == 1
    shown = capsys.readouterr().out
    assert "damaged" in shown
    assert "bytes expected" in " ".join(shown.split())
    assert main(["verify", str(path), "--json"]) == 1
    assert {each["step"]: each["whole"] for each in json.loads(capsys.readouterr().out)["checkpoints"]} == {8: True, 12: False}
    assert main(["verify", str(tmp_path)]) == 2


def test_metrics_that_are_damaged_far_in_the_past(tmp_path, tiny_run):
    """A digit changed in a line before the checkpoint is seen, and a file that was removed begins anew."""
    path = tmp_path / "run"
    shutil.copytree(tiny_run.path, path)
    shutil.rmtree(checkpoint_path(path, 12))
    file = path / "metrics.jsonl"
    file.write_text(file.read_text().replace('"step": 3', '"step": 2', 1))
    with pytest.raises(RunDirError, match=r"metrics.jsonl: the \d+ bytes of step 8 expected at its start, others found; restore"):
        decompose_config(tiny_with(), out=path, resume=True)
    file.unlink()
    run = decompose_config(tiny_with(), out=path, resume=True)
    assert [line["step"] for line in run.metrics] == [9, 12, 12]


def test_a_real_signal_from_outside(tmp_path):
    """SIGTERM to the command itself: it saves, says how to go on, and ends with 143."""
    file, path = tmp_path / "tiny.yaml", tmp_path / "run"
    file.write_text(dump_config(make_config(TINY | {"steps": 100_000, "checkpoint": {"every": 100_000}})), encoding="utf-8")
    command = [sys.executable, "-c", "from paramlens.cli.main import entry; entry()", "decompose", str(file), "--out", str(path)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        until((path / "metrics.jsonl").exists, process)
        process.terminate()
        _, told = process.communicate()
    assert process.returncode == 143
    assert f"resume with: paramlens decompose {file} --out {path} --resume" in told
    assert read_json(path / "run.json")["status"] == "interrupted"
    assert verify(path).whole
    assert len(checkpoints(path)) == 1


def test_no_pickle_is_read(tmp_path):
    """The audit hook sees every class that any unpickling looks up; what it saw so far came from none of our files."""
    import pickle

    before = len(PICKLES_READ)
    pickle.loads(pickle.dumps(Path("a")))
    assert len(PICKLES_READ) > before, "the hook is awake"
    del PICKLES_READ[before:]
    assert PICKLES_READ == []
