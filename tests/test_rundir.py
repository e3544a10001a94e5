import json
import shutil
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from audit import plant
from conftest import TINY, TINY_FACTS, tiny_with
from paramlens.analysis.circuit import circuit
from paramlens.cli.main import main
from paramlens.config.file import make_config
from paramlens.errors import ConfigError, RunDirError
from paramlens.files.manifest import write_manifest
from paramlens.method.task import TargetHistory
from paramlens.runs import rundir, targets, verification
from paramlens.runs.decompose import decompose, decompose_config
from paramlens.runs.description import read_description
from paramlens.runs.integrity import model_sha256
from paramlens.runs.layout import FORMAT, checkpoints
from paramlens.runs.rundir import open_run
from paramlens.runs.writer import RunWriter
from paramlens.tasks.base import Target

NAMES = ("components", "importance", "optimizer", "rng")


@pytest.fixture
def copy(tiny_run, tmp_path):
    """A run directory that a test may damage."""
    path = tmp_path / "copy"
    shutil.copytree(tiny_run.path, path)
    return path


def resealed(folder: Path) -> None:
    """Make a folder's manifest agree with what now lies there."""
    names = json.loads((folder / "MANIFEST.json").read_text())
    write_manifest(folder, [folder / name for name in names])


def test_layout(tiny_run):
    files = {str(path.relative_to(tiny_run.path)) for path in tiny_run.path.rglob("*") if path.is_file()}
    folders = ("checkpoints/step-00000008", "checkpoints/step-00000012")
    assert files == {
        *("config.yaml", "run.json", "model.json", "metrics.jsonl", "target.safetensors", "target.json", "MANIFEST.json", ".lock"),
        *(f"{folder}/{name}.safetensors" for folder in folders for name in NAMES),
        *(f"{folder}/{name}" for folder in folders for name in ("state.json", "MANIFEST.json")),
    }


def test_the_sums_can_be_checked_without_the_library(tiny_run):
    """W ≈ U @ V from the two files alone."""
    components = load_file(tiny_run.path / "checkpoints/step-00000012/components.safetensors")
    target = load_file(tiny_run.path / "target.safetensors")
    for site in tiny_run.decomposition.names:
        U, V = components[f"{site}.U"], components[f"{site}.V"]
        assert (U.shape, V.shape) == ((4, 5), (5, 4))
        W = target[f"{site}.weight"].T
        assert (W - U @ V).norm() < 0.2 * W.norm()


def test_target_history_survives(tiny_run, tmp_path):
    history = TargetHistory(tiny_run.target_history.checks, converged=True, attempts=3)
    task = tiny_run.config.task
    targets.save(task, Target(tiny_run.task.model, history=history), tmp_path)
    assert targets.history(task, tmp_path) == history


def test_manifest_names_every_file(tiny_run):
    folder = tiny_run.path / "checkpoints/step-00000012"
    manifest = json.loads((folder / "MANIFEST.json").read_text())
    assert set(manifest) == {path.name for path in folder.iterdir()} - {"MANIFEST.json"}
    for name, entry in manifest.items():
        content = (folder / name).read_bytes()
        assert entry == {"bytes": len(content), "sha256": sha256(content).hexdigest()}


def test_run_json(tiny_run):
    info = tiny_run.info
    assert (info["format"], info["device"], info["dtype"], info["seed"], info["threads"]) == (FORMAT, "cpu", "float32", 0, 1)
    assert (info["status"], info["steps"]) == ("finished", 12)
    assert info["target"]["sha256"] == model_sha256(tiny_run.task.model)
    assert set(info["versions"]) == {"paramlens", "torch", "python"}


def test_model_json_is_enough_to_load(tiny_run):
    model = json.loads((tiny_run.path / "model.json").read_text())
    assert model["format"] == FORMAT
    assert model["target"]["sha256"] == tiny_run.info["target"]["sha256"]
    assert model["config"]["task"]["kind"] == "induction"
    assert model["sites"][0] == {"name": "blocks.0.attn.q", "d_in": 4, "d_out": 4}
    assert model["gamma"] == {"kind": "attention", "d_gate": 3, "relative": "offset", "max_length": 8}


def test_the_transformers_sizes_are_in_model_json(tmp_path):
    """The run opens with them, whatever the defaults are; sizes that make no network are refused by name."""
    gamma = {"kind": "transformer", "width": 12, "layers": 1, "heads": 3}
    run = decompose_config(tiny_with(gamma=gamma), out=tmp_path / "run")
    file = run.path / "model.json"
    model = json.loads(file.read_text())
    assert model["gamma"] == {"d_gate": 16, "relative": "offset", "max_length": 8} | gamma
    opened = open_run(run.path).importance
    for name, value in opened.named_values().items():
        assert value.equal(run.importance.named_values()[name])
    file.write_text(json.dumps(model | {"gamma": model["gamma"] | {"heads": 4}}))
    with pytest.raises(RunDirError, match=r"model.json: gamma: .*width 12 must be a multiple of 8.*; restore the file from a copy"):
        read_description(run.path)


def test_older_checkpoints_open_and_are_pruned(tiny_run):
    assert [path.name for path in checkpoints(tiny_run.path)] == ["step-00000008", "step-00000012"]
    older = open_run(tiny_run.path, checkpoint=8)
    assert older.step == 8
    assert not torch.equal(older.decomposition.U["blocks.0.attn.q"], tiny_run.decomposition.U["blocks.0.attn.q"])
    with pytest.raises(RunDirError, match="no checkpoint at step 4; there are 8, 12"):
        open_run(tiny_run.path, checkpoint=4)


def test_unfinished_checkpoint_is_not_read(copy):
    (copy / "checkpoints/step-00000099.part").mkdir()
    assert open_run(copy).step == 12


def test_paths_that_are_no_run(tmp_path):
    with pytest.raises(RunDirError, match="no such run"):
        open_run(tmp_path / "nothing")
    with pytest.raises(RunDirError, match="not a run directory"):
        open_run(tmp_path)


def test_run_without_a_checkpoint(copy):
    shutil.rmtree(copy / "checkpoints")
    with pytest.raises(RunDirError, match="no checkpoint yet; a run that is under way writes one"):
        open_run(copy)


def moved_on(copy: Path) -> None:
    """What a run under way does: a newer checkpoint appears, and the one that was the newest goes."""
    shutil.copytree(copy / "checkpoints/step-00000012", copy / "checkpoints/step-00000016.part")
    (copy / "checkpoints/step-00000016.part").rename(copy / "checkpoints/step-00000016")
    shutil.rmtree(copy / "checkpoints/step-00000012")


@pytest.mark.parametrize("at", ["require_whole", "require_own", "require_fit", "load_parameters"])
def test_a_checkpoint_that_goes_while_it_is_read_is_given_up_for_a_newer(copy, at, monkeypatch, tiny_run):
    original, calls = getattr(rundir, at), []

    def hooked(*args: Any, **how: Any) -> Any:
        calls.append(args)
        if len(calls) == 1:
            moved_on(copy)
        return original(*args, **how)

    monkeypatch.setattr(rundir, at, hooked)
    run = open_run(copy)
    assert run.step == 16
    for name, U in run.decomposition.U.items():
        assert U.equal(tiny_run.decomposition.U[name])


def test_a_checkpoint_that_goes_while_it_is_verified_is_left_out(copy, monkeypatch):
    original, calls = verification.damage, []

    def hooked(folder: Path, *rest: Any) -> Any:
        calls.append(folder)
        if folder.name == "step-00000012":
            moved_on(copy)
        return original(folder, *rest)

    monkeypatch.setattr(verification, "damage", hooked)
    found = verification.verify(copy)
    assert found.whole
    assert [each.step for each in found.checkpoints] == [8]


def test_a_run_that_has_only_begun_says_so(copy, capsys):
    """config.yaml and run.json are there; model.json, the manifest and checkpoints are still to come."""
    for name in ("model.json", "MANIFEST.json"):
        (copy / name).unlink()
    shutil.rmtree(copy / "checkpoints")
    for command in ("circuit", "inspect", "report", "svd"):
        assert main([command, str(copy)]) == 2
        told = capsys.readouterr().err
        assert "no checkpoint yet" in told
        assert len(told.strip().splitlines()) == 1
    assert verification.verify(copy).whole


def test_half_a_line_of_metrics_is_left_for_later(copy, capsys):
    text = (copy / "metrics.jsonl").read_text()
    (copy / "metrics.jsonl").write_text(text + text.splitlines()[0][:20])
    run = open_run(copy)
    assert len(run.metrics) == len(text.splitlines())
    run.save_analysis("circuit", circuit(run, batches=1).to_json())
    assert main(["report", str(copy)]) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("blocks.0.attn.q.U"), "tensor blocks.0.attn.q.U is missing"),
        (lambda tensors: tensors.update(extra=torch.ones(1)), "tensor extra is unexpected"),
        (
            lambda tensors: tensors.update({"blocks.0.attn.q.U": torch.ones(4, 5, dtype=torch.float64)}),
            r"blocks.0.attn.q.U is of type F64, float32 was expected",
        ),
        (
            lambda tensors: tensors.update({"blocks.0.attn.q.U": torch.ones(4, 6)}),
            r"blocks.0.attn.q.U has shape \(4, 6\), \(4, 5\) was expected",
        ),
    ],
)
def test_components_that_do_not_fit(copy, change, message: str):
    file = copy / "checkpoints/step-00000012/components.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    with pytest.raises(RunDirError, match=r"components.safetensors: .* expected, .* found; remove .*12 to use the checkpoint of step 8"):
        open_run(copy)
    resealed(file.parent)
    with pytest.raises(RunDirError, match=message):
        open_run(copy)


def test_damaged_files_are_named(copy):
    plant(copy / "checkpoints/step-00000012/importance.safetensors", b"\x80\x04pickle")
    resealed(copy / "checkpoints/step-00000012")
    with pytest.raises(RunDirError, match=r"importance.safetensors: no safetensors file"):
        open_run(copy)
    (copy / "model.json").write_text("{")
    with pytest.raises(RunDirError, match=r"model.json: not JSON"):
        open_run(copy)


def test_newer_format_is_refused(copy):
    model = json.loads((copy / "model.json").read_text())
    (copy / "model.json").write_text(json.dumps(model | {"format": FORMAT + 1}))
    with pytest.raises(RunDirError, match=f"written in format {FORMAT + 1}, this version reads up to {FORMAT}; upgrade paramlens"):
        open_run(copy)


def test_target_of_other_weights_is_refused(copy):
    tensors = load_file(copy / "target.safetensors")
    tensors["embed.weight"][0, 0] += 1
    save_file(tensors, copy / "target.safetensors")
    with pytest.raises(RunDirError, match=r"target.safetensors: sha256 .* expected, .* found; it has changed since it was written"):
        open_run(copy)
    resealed(copy)
    with pytest.raises(RunDirError, match="with other weights than this model's"):
        open_run(copy)


def test_run_on_your_own_model(tmp_path):
    model = nn.Linear(3, 2)
    fields = {"C": 2, "steps": 2, "gamma": {"kind": "vector", "d_gate": 2}}
    wrapped = nn.Sequential(model)
    decompose(wrapped, [torch.randn(4, 3)], out=tmp_path / "run", **fields)
    with pytest.raises(RunDirError, match=r"a run on your own model.*open_run\(path, model=...\)"):
        open_run(tmp_path / "run")
    with (tmp_path / "run/config.yaml").open("a") as file:
        file.write("a_field_of_the_future: 1\n")
    resealed(tmp_path / "run")
    run = open_run(tmp_path / "run", model=wrapped)
    assert run.decomposition.names == ("0",), "model.json is all that loading needs"
    with pytest.raises(ConfigError, match="a_field_of_the_future: unknown field"):
        run.config  # noqa: B018
    with pytest.raises(RunDirError, match="with other weights"):
        open_run(tmp_path / "run", model=nn.Sequential(nn.Linear(3, 2)))


def test_overwrite_replaces_runs_and_nothing_else(tmp_path, tiny):
    other = tmp_path / "thesis"
    other.mkdir()
    (other / "chapter.txt").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(RunDirError, match="thesis exists"):
            RunWriter.create(other, tiny, overwrite=overwrite)
    assert (other / "chapter.txt").read_text() == "years of work"
    run = decompose_config(tiny, out=tmp_path / "run")
    (run.path / "notes.txt").write_text("kept")
    (tmp_path / "link").symlink_to(run.path)
    again = decompose_config(tiny_with(seed=1), out=run.path, overwrite=True)
    assert again.config.seed == 1
    assert (run.path / "notes.txt").read_text() == "kept"
    through = decompose_config(tiny_with(seed=2), out=tmp_path / "link", overwrite=True)
    assert (through.config.seed, open_run(run.path).config.seed) == (2, 2)


def test_target_of_another_run_can_be_reused(tiny_run, tmp_path):
    run = decompose_config(tiny_with(C=4), out=tmp_path / "run", target=tiny_run.path)
    assert run.info["target"]["sha256"] == tiny_run.info["target"]["sha256"]
    with pytest.raises(RunDirError, match=r"no config.yaml; give a directory made by train-target or decompose"):
        decompose_config(tiny_with(), out=tmp_path / "other", target=tmp_path)


def test_target_of_another_task_is_refused(tiny_run, tmp_path):
    """Two heads have the same weights' shapes as one."""
    task = tiny_run.config.task.model_copy(update={"heads": 2}).model_dump()
    with pytest.raises(ConfigError, match=r"trained on another task \(task.heads 1 → 2\)"):
        decompose_config(tiny_with(task=task), out=tmp_path / "run", target=tiny_run.path)


def test_metrics_cut_in_their_last_line_still_read(copy):
    file = copy / "metrics.jsonl"
    lines = file.read_text().splitlines()
    file.write_text("\n".join(lines)[:-20])
    assert len(open_run(copy).metrics) == len(lines) - 1
    file.write_text("{\n" + "\n".join(lines))
    with pytest.raises(RunDirError, match=r"metrics.jsonl line 1: not JSON"):
        open_run(copy).metrics  # noqa: B018


def test_unwritable_place(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunDirError, match=r"cannot be written \(.*file is no writable directory\); give another out"):
        RunWriter.create(tmp_path / "file" / "run", tiny_with())


@pytest.mark.parametrize("fields", [pytest.param(TINY, id="induction"), pytest.param(TINY_FACTS, id="facts", marks=pytest.mark.slow)])
def test_a_float64_run_opens_and_goes_on(fields: dict, tmp_path):
    """Its toy target is kept in float32, in which it was trained."""
    config = make_config(fields | {"dtype": "float64", "steps": 4, "checkpoint": {"every": 2}})
    whole = decompose_config(config, out=tmp_path / "whole")
    copy = decompose_config(config, out=tmp_path / "copy", target=whole.path)
    shutil.rmtree(checkpoints(copy.path)[-1])
    for run in (open_run(whole.path), copy, decompose_config(config, out=copy.path, resume=True)):
        assert model_sha256(run.task.model) == model_sha256(whole.task.model)
        assert all(U.dtype == torch.float64 and U.equal(whole.decomposition.U[name]) for name, U in run.decomposition.U.items())
    assert circuit(open_run(whole.path), batches=1).metrics["recon"] >= 0
