"""Several seeds in one go are the same runs as one after the other."""

import json
import os
import signal
import subprocess
import sys

import pytest
from safetensors.torch import load_file

from conftest import TINY, tiny_with, until
from paramlens.cli.main import main
from paramlens.config.file import dump_config, make_config
from paramlens.errors import ConfigError, DivergedError, RunDirError
from paramlens.files.plain import read_json
from paramlens.runs.decompose import decompose_config
from paramlens.runs.layout import checkpoint_step, checkpoints, find_checkpoint
from paramlens.runs.seeds import decompose_seeds


def parts(path):
    return load_file(find_checkpoint(path, None) / "components.safetensors")


def test_each_seed_is_the_run_it_would_be_alone(tmp_path):
    config = tiny_with(seed=3)
    paths = decompose_seeds(config, 2, out=tmp_path / "seeds")
    assert paths == [tmp_path / "seeds/s3", tmp_path / "seeds/s4"]
    alone = decompose_config(config.model_copy(update={"seed": 4}), out=tmp_path / "alone")
    assert read_json(paths[0] / "run.json")["target"] != read_json(paths[1] / "run.json")["target"]
    for name, value in parts(alone.path).items():
        assert value.equal(parts(paths[1])[name])
    with pytest.raises(RunDirError, match="resume continues it"):
        decompose_seeds(config, 3, out=tmp_path / "seeds")
    with pytest.raises(ConfigError, match="seeds 0"):
        decompose_seeds(config, 0)


@pytest.mark.slow
def test_more_seeds_are_added_on_resume(tmp_path):
    decompose_seeds(tiny_with(seed=3), 1, out=tmp_path)
    assert decompose_seeds(tiny_with(seed=3), 2, out=tmp_path, resume=True)[1].is_dir()


@pytest.mark.slow
def test_each_seed_can_take_its_own_target(tmp_path):
    config = tiny_with(seed=3)
    decompose_seeds(config, 2, out=tmp_path / "first")
    again = decompose_seeds(config, 2, out=tmp_path / "again", target=tmp_path / "first/s{seed}")
    for path in again:
        assert (
            read_json(path / "run.json")["target"]["sha256"] == read_json(tmp_path / "first" / path.name / "run.json")["target"]["sha256"]
        )


@pytest.mark.slow
def test_a_seed_that_fails_does_not_stop_the_others(tmp_path):
    """The targets of a rate this high are not finite, and say so; every seed is tried."""
    broken = tiny_with(task=TINY["task"] | {"training": TINY["task"]["training"] | {"lr": 1e30}})
    with pytest.raises(DivergedError, match="target step"):
        decompose_seeds(broken, 2, out=tmp_path)


@pytest.mark.slow
def test_ctrl_c_ends_all_seeds_and_leaves_a_checkpoint(tmp_path):
    """The signal reaches the whole group, as from a terminal: seeds under way save, those that wait do not begin."""
    file = tmp_path / "tiny.yaml"
    file.write_text(dump_config(make_config(TINY)), encoding="utf-8")
    words = ["decompose", str(file), "--seeds", "9", "--steps", "100000", "--checkpoint.every", "100000", "--out", str(tmp_path / "x")]
    command = [sys.executable, "-W", "error", "-c", "from paramlens.cli.main import entry; entry()", *words]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        until((tmp_path / "x/s0/metrics.jsonl").exists, process)
        os.killpg(process.pid, signal.SIGINT)
        _, told = process.communicate()
    assert process.returncode == 130
    assert f"--seeds 9 --steps 100000 --checkpoint.every 100000 --out {tmp_path / 'x'} --resume" in told
    assert "Traceback" not in told
    assert len(checkpoints(tmp_path / "x/s0")) == 1
    assert not (tmp_path / "x/s8").exists()


def test_seeds_end_with_the_process_that_started_them(tmp_path):
    """Even where it is killed and can tell nobody: those under way save, and resume to the same bytes."""
    file = tmp_path / "tiny.yaml"
    file.write_text(dump_config(make_config(TINY)), encoding="utf-8")
    words = ["decompose", str(file), "--seeds", "2", "--steps", "20000", "--checkpoint.every", "20000", "--out", str(tmp_path / "x")]
    command = [sys.executable, "-c", "from paramlens.cli.main import entry; entry()", *words]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        until((tmp_path / "x/s0/metrics.jsonl").exists, process)
        process.kill()
    until(lambda: read_json(tmp_path / "x/s0/run.json")["status"] != "running")
    assert read_json(tmp_path / "x/s0/run.json")["status"] == "interrupted"
    assert len(checkpoints(tmp_path / "x/s0")) == 1
    assert 3 <= checkpoint_step(find_checkpoint(tmp_path / "x/s0", None)) < 20_000  # metrics are written from step 3 on


@pytest.mark.slow
def test_the_command_compares_seeds_of_one_target(tmp_path, tiny_run, capsys):
    file = tmp_path / "tiny.yaml"
    file.write_text(dump_config(make_config(TINY)), encoding="utf-8")
    words = ["decompose", str(file), "--seeds", "2", "--target", str(tiny_run.path), "--out", str(tmp_path / "x"), "--json"]
    assert main(words) == 0
    document = json.loads(capsys.readouterr().out)
    assert [run["run"] for run in document["runs"]] == [str(tmp_path / "x/s0"), str(tmp_path / "x/s1")]
    assert [run["steps"] for run in document["runs"]] == [12, 12]
    assert set(document["agreement"]["sites"]) == set(tiny_run.decomposition.names)
    assert main(["agreement", str(tmp_path / "x/s0"), str(tmp_path / "x/s1"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == document["agreement"]
    assert main(["svd", str(tmp_path / "x/s0"), "--tolerance", "0.01", "--batches", "1", "--json"]) == 0
    svd = json.loads(capsys.readouterr().out)
    assert (svd["tolerance"], json.loads((tmp_path / "x/s0/analysis/svd.json").read_text())) == (0.01, svd)
    assert main(["svd", str(tmp_path / "x/s0"), "--batches", "1"]) == 0
    assert main(["agreement", str(tmp_path / "x/s0"), str(tmp_path / "x/s1")]) == 0
    shown = capsys.readouterr()
    assert "times as many as are active" in shown.out
    assert "Agreement of 2 runs, mean over 1 pair" in shown.out
    assert main(["agreement", str(tmp_path / "x/s0")]) == 2
    assert main(["agreement"]) == 2
    assert main(["svd", str(tmp_path)]) == 2
