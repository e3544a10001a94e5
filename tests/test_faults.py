"""The fault matrix: whatever strikes at whatever moment, nothing that was saved is lost, and what goes on ends in the same bytes.

A cell passes if, after resume, weights, optimizer and metrics are byte-identical to an undisturbed run's, or if the command ends
non-zero, says in at most three lines which file and what to do, and harms no earlier checkpoint. PARAMLENS_MATRIX names a JSON file
for the outcome of every cell; `python benchmarks/reliability.py matrix` runs all of it and draws the picture in docs/reliability.md.
"""

import json
import os
import pickle
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

import faults
from audit import plant
from conftest import TINY, tiny_with
from faults import after, before, content, full_for, half_a_line, half_removed, half_written, nth, result, told
from paramlens.cli.main import main
from paramlens.config.file import dump_config, make_config
from paramlens.errors import ConfigError, DivergedError, RunDirError
from paramlens.files import plain
from paramlens.files.manifest import file_sha256, write_manifest
from paramlens.files.plain import read_json
from paramlens.method import step as step_module
from paramlens.method.losses import faithfulness, local, minimality
from paramlens.runs import checkpoint, metrics, saving, train, writer
from paramlens.runs.decompose import decompose, decompose_config
from paramlens.runs.layout import checkpoint_path, checkpoint_step, checkpoints, is_begun
from paramlens.runs.rundir import open_run
from paramlens.runs.verification import verify
from paramlens.tasks.facts.facts import read_facts
from paramlens.tasks.language_models.loading import load_language

CONFIG = TINY | {"steps": 16}
"""Checkpoints at steps 4, 8, 12 and 16; the first to be pruned goes at 12."""

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
EXITS = {signal.SIGKILL: -signal.SIGKILL, signal.SIGTERM: 143, signal.SIGINT: 130}


@pytest.fixture(scope="session", autouse=True)
def outcomes() -> Iterator[list[dict[str, Any]]]:
    """Every cell that has been tried; written where PARAMLENS_MATRIX says."""
    cells: list[dict[str, Any]] = []
    yield cells
    if place := os.environ.get("PARAMLENS_MATRIX"):
        Path(place).write_text(json.dumps({"cells": cells}, indent=1) + "\n", encoding="utf-8")


@pytest.fixture
def cell(outcomes) -> Callable[[str, str, str], AbstractContextManager[None]]:
    """The matrix's cell that the code under it is; it has passed if that code gets to its end."""

    @contextmanager
    def tried(group: str, row: str, column: str) -> Iterator[None]:
        outcome = {"group": group, "row": row, "column": column, "passed": False}
        outcomes.append(outcome)
        yield
        outcome["passed"] = True

    return tried


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A folder with the configuration, a trained target, an undisturbed run, and one that was stopped after its step 9."""
    folder = tmp_path_factory.mktemp("faults")
    config = folder / "tiny.yaml"
    config.write_text(dump_config(make_config(CONFIG)), encoding="utf-8")
    assert main(["train-target", str(config), "--out", str(folder / "target")]) == 0
    assert main(["decompose", str(config), "--target", str(folder / "target"), "--out", str(folder / "whole")]) == 0
    code, _ = strike(folder, folder / "stopped", partial(at_step, count=10, how=before(signal.SIGKILL)))
    assert code == -signal.SIGKILL
    assert [checkpoint_step(each) for each in checkpoints(folder / "stopped")] == [4, 8]
    config.with_name("other.yaml").write_text(dump_config(make_config(CONFIG | {"seed": 1})), encoding="utf-8")
    code, _ = faults.run(
        ["decompose", str(folder / "other.yaml"), "--out", str(folder / "other")],
        folder / "log",
        partial(at_step, count=10, how=before(signal.SIGKILL)),
    )
    assert code == -signal.SIGKILL
    return folder


def strike(world: Path, path: Path, fault: faults.Fault) -> tuple[int, list[str]]:
    """A new run in `path` under a fault."""
    words = ["decompose", str(world / "tiny.yaml"), "--target", str(world / "target"), "--out", str(path)]

    def without_pauses(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(saving, "PAUSES", (0.01,) * len(saving.PAUSES))
        fault(patch)

    return faults.run(words, path.with_name(path.name + ".log"), without_pauses)


def resume(world: Path, path: Path) -> tuple[int, list[str]]:
    return faults.run(["decompose", str(world / "tiny.yaml"), "--resume", "--out", str(path)], path.with_name(path.name + ".log"))


def at_step(patch: pytest.MonkeyPatch, *, count: int, how: Callable[..., Any]) -> None:
    """Strike around the `count`-th step."""
    nth(patch, train.Steps, "__call__", count, how)


def require_identical(world: Path, path: Path) -> None:
    assert result(path) == result(world / "whole")
    assert not list(path.rglob("*.part")), "what was unfinished is cleaned up"
    assert verify(path).whole


def require_told(code: int, lines: list[str], *words: str) -> None:
    assert code in (1, 2), (code, lines)
    said = told(lines)
    assert said[0].startswith("paramlens: "), lines
    assert len(said) <= 3, said
    for word in words:
        assert word in said[0], said
    assert "Traceback" not in "\n".join(lines)


# --- killed, stopped, interrupted ------------------------------------------------------------------------------------------------------

MOMENTS: dict[str, Callable[[pytest.MonkeyPatch, int], None]] = {
    "before the run's own files are whole": lambda patch, number: nth(patch, writer.RunWriter, "seal", 1, before(number)),
    "in a step": lambda patch, number: nth(patch, train.Steps, "run", 6, before(number)),
    "between a step and its log": lambda patch, number: nth(patch, train.Steps, "__call__", 6, after(number)),
    "half a line of metrics": lambda patch, number: nth(patch, metrics.MetricsFile, "_write", 3, half_a_line(number)),
    "evaluating": lambda patch, number: nth(patch, train, "held_out", 1, before(number)),
    "half of components": lambda patch, number: nth(patch, checkpoint, "save_tensors", 5, half_written(number)),
    "half of optimizer": lambda patch, number: nth(patch, checkpoint, "save_tensors", 7, half_written(number)),
    "before the manifest": lambda patch, number: nth(patch, checkpoint, "write_manifest", 2, before(number)),
    "between write and rename": lambda patch, number: nth(patch, checkpoint.Path, "rename", 2, before(number)),
    "between rename and prune": lambda patch, number: nth(patch, writer, "prune", 2, before(number)),
    "half of an old checkpoint pruned": lambda patch, number: nth(patch, plain.shutil, "rmtree", 5, half_removed(number)),
    "writing run.json at the end": lambda patch, number: nth(patch, saving.Saver, "record", 1, before(number)),
}


def slow_unless(fast: bool, *values: Any) -> Any:
    """A case that `make test` tries too if it is `fast`; the whole matrix tries all."""
    return pytest.param(
        *values, marks=[] if fast else pytest.mark.slow, id="-".join(str(getattr(value, "name", value)) for value in values)
    )


FIRST = {
    ("half of optimizer", signal.SIGKILL),
    ("half a line of metrics", signal.SIGTERM),
    ("in a step", signal.SIGINT),
    ("writing run.json at the end", signal.SIGINT),
}
"""What `make test` tries of them."""


@pytest.mark.parametrize(
    ("moment", "number"),
    [slow_unless((moment, number) in FIRST, moment, number) for moment in MOMENTS for number in SIGNALS],
)
def test_killed(world, tmp_path, cell, moment: str, number: signal.Signals):
    path = tmp_path / "run"
    with cell("signals", number.name, moment):
        code, lines = strike(world, path, partial(MOMENTS[moment], number=number))
        finished = moment == "writing run.json at the end"
        assert code in (EXITS[number], *([0] if finished else [])), lines
        assert len(told(lines)) <= 3 or number == signal.SIGKILL
        assert not is_begun(path) or all(each.whole for each in verify(path).checkpoints)
        code, lines = resume(world, path)
        if moment == "before the run's own files are whole":
            require_told(code, lines, str(path), "overwrite starts anew")
        else:
            assert code == 0, lines
            require_identical(world, path)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        slow_unless(first == signal.SIGINT == second, first, second)
        for first, second in (
            (signal.SIGINT, signal.SIGINT),
            (signal.SIGTERM, signal.SIGTERM),
            (signal.SIGINT, signal.SIGTERM),
            (signal.SIGTERM, signal.SIGKILL),
        )
    ],
)
@pytest.mark.parametrize("moment", ["half of components", pytest.param("between write and rename", marks=pytest.mark.slow)])
def test_a_second_signal_during_the_save(world, tmp_path, cell, first: signal.Signals, second: signal.Signals, moment: str):
    """It ends the save at once; the checkpoint before stays as it was."""

    def fault(patch: pytest.MonkeyPatch) -> None:
        at_step(patch, count=6, how=before(first))
        MOMENTS[moment](patch, second)

    path = tmp_path / "run"
    with cell("a second signal", f"{first.name}, then {second.name}", moment):
        code, lines = strike(world, path, fault)
        assert code == EXITS[second], lines
        assert [checkpoint_step(each) for each in checkpoints(path)] == [4]
        assert verify(path).checkpoints[0].whole
        assert resume(world, path)[0] == 0
        require_identical(world, path)


# --- the disk --------------------------------------------------------------------------------------------------------------------------

_TENSORS = {"components": 500, "importance": 3000, "optimizer": 5000, "rng": 2000}


def disk_is_full(patch: pytest.MonkeyPatch, file: str, *, times: int) -> None:
    """A file meets a full disk, from the checkpoint of step 8 on."""

    def late(at: Path) -> bool:
        return "step-00000004" not in str(at)

    if file in _TENSORS:
        stem = f"{file}.safetensors"
        full_for(patch, checkpoint, "save_tensors", lambda at, _: at.name == stem and late(at), times=times, size=_TENSORS[file])
    elif file == "state.json":
        full_for(patch, checkpoint, "write_json", lambda at, _: late(at), times=times, size=20)
    elif file == "MANIFEST.json":
        full_for(patch, checkpoint, "write_manifest", lambda at, _: late(at), times=times, size=20)
    elif file == "metrics.jsonl":
        full_for(patch, metrics.MetricsFile, "_write", lambda self: self._bytes > 300, times=times, size=320)
    else:
        full_for(patch, writer.RunWriter, "record", lambda _: True, times=times, size=20)


FILES_ON_DISK = (*_TENSORS, "state.json", "MANIFEST.json", "metrics.jsonl")


@pytest.mark.parametrize("file", [slow_unless(file in ("optimizer", "metrics.jsonl"), file) for file in FILES_ON_DISK])
def test_a_full_disk_that_is_given_room_again(world, tmp_path, cell, file: str):
    """The run warns, goes on, and ends as if nothing had been."""
    path = tmp_path / "run"
    with cell("disk", "full for a while", file):
        code, lines = strike(world, path, partial(disk_is_full, file=file, times=2))
        assert code == 0, lines
        assert any("cannot be written (" in line and "File too large" in line for line in lines), lines
        require_identical(world, path)


@pytest.mark.parametrize("file", [slow_unless(file == "components", file) for file in FILES_ON_DISK])
def test_a_disk_that_stays_full(world, tmp_path, cell, file: str):
    """The run stops after a few tries, the checkpoint before is whole, and with room again all is as it would have been."""
    path = tmp_path / "run"
    with cell("disk", "full for good", file):
        code, lines = strike(world, path, partial(disk_is_full, file=file, times=100))
        require_told(code, lines, "tries (", "File too large", "the checkpoint of step 4 is whole", "Make room, then resume the run")
        assert [checkpoint_step(each) for each in checkpoints(path)] == [4]
        assert verify(path).checkpoints[0].whole
        assert resume(world, path)[0] == 0
        require_identical(world, path)


def test_a_disk_too_full_for_run_json(world, tmp_path, cell):
    """Its first lines are part of the beginning; at the end it is told, and the run counts."""
    path = tmp_path / "run"

    def fault(patch: pytest.MonkeyPatch) -> None:
        original, calls = writer.RunWriter.record, []

        def record(self: writer.RunWriter, **fields: Any) -> None:
            calls.append(fields)
            with faults.file_limit(20 if fields.get("status") == "finished" else 10**6):
                original(self, **fields)

        patch.setattr(writer.RunWriter, "record", record)

    with cell("disk", "full for good", "run.json"):
        code, lines = strike(world, path, fault)
        assert code == 0, lines
        assert any("run.json: cannot be written" in line for line in lines)
        require_identical(world, path)


def too_little_room(patch: pytest.MonkeyPatch, free: list[int]) -> None:
    """What the disk says is free, one answer after the other; the last stays."""
    usage = shutil.disk_usage("/")
    patch.setattr(saving.shutil, "disk_usage", lambda _: usage._replace(free=free.pop(0) if free[1:] else free[0]))


def test_no_room_before_the_first_step(world, tmp_path, cell):
    path = tmp_path / "run"
    with cell("disk", "too little room", "before the first step"):
        code, lines = strike(world, path, partial(too_little_room, free=[10_000]))
        require_told(code, lines, str(path), "3 checkpoints of", "of disk", "make room")
        assert not path.exists(), "nothing is begun"


def test_no_room_before_a_save(world, tmp_path, cell):
    path = tmp_path / "run"
    with cell("disk", "too little room", "before a save, then regained"):
        code, lines = strike(world, path, partial(too_little_room, free=[10**9, 10_000, 10**9]))
        assert code == 0, lines
        assert any("needed" in line and "free on its disk" in line for line in lines), lines
        require_identical(world, path)


@contextmanager
def as_nobody(folder: Path) -> Iterator[faults.Fault]:
    """A fault that makes the child a user whom permissions bind, as root is not; it owns `folder`."""
    if os.getuid() != 0:
        yield lambda _: None
        return
    for place in (folder, *folder.rglob("*")):
        os.chown(place, 65534, 65534)

    def become(_: pytest.MonkeyPatch) -> None:
        os.setgid(65534)
        os.setuid(65534)

    yield become


def open_folder(world: Path) -> Path:
    """A folder that every user can reach, with the configuration and the target in it; pytest's own are closed."""
    folder = Path(tempfile.mkdtemp(prefix="paramlens-faults-"))
    folder.chmod(0o777)
    shutil.copy(world / "tiny.yaml", folder)
    shutil.copytree(world / "target", folder / "target")
    return folder


@pytest.mark.parametrize("moment", ["from the start", pytest.param("from step 9 on", marks=pytest.mark.slow)])
def test_a_place_that_cannot_be_written(world, cell, moment: str):
    folder = open_folder(world)
    path = folder / "runs" / "run"
    path.parent.mkdir()
    late = moment == "from step 9 on"
    try:
        with as_nobody(folder) as become, cell("disk", "read-only", moment):

            def close(original: Callable[..., Any], *args: Any) -> Any:
                for place in (path, path / "checkpoints"):
                    place.chmod(0o555)
                return original(*args)

            def fault(patch: pytest.MonkeyPatch) -> None:
                become(patch)
                if late:
                    at_step(patch, count=9, how=close)

            if not late:
                path.parent.chmod(0o555)
            words = ["decompose", str(folder / "tiny.yaml"), "--target", str(folder / "target"), "--out", str(path)]
            code, lines = faults.run(words, world / "log", fault)
            if late:
                require_told(code, lines, str(path), "Permission denied", "the checkpoint of step 8 is whole")
                for place in (path, path / "checkpoints"):
                    place.chmod(0o755)
                assert resume(world, path)[0] == 0
                require_identical(world, path)
            else:
                require_told(code, lines, str(path), "cannot be written", "give another out")
                assert not path.exists()
    finally:
        shutil.rmtree(folder)


@pytest.mark.parametrize("what", ["the run", "its checkpoints"])
def test_a_directory_that_is_deleted_under_a_run(world, tmp_path, cell, what: str):
    """It is not made again half: the run stops, and says what is missing."""
    path = tmp_path / "run"
    gone = path if what == "the run" else path / "checkpoints"

    def delete(original: Callable[..., Any], *args: Any) -> Any:
        shutil.rmtree(gone)
        return original(*args)

    with cell("disk", "deleted", what):
        code, lines = strike(world, path, partial(at_step, count=9, how=delete))
        require_told(code, lines, str(path), "No such file", "tries (")
        assert not gone.exists()


# --- damaged files ---------------------------------------------------------------------------------------------------------------------

DAMAGES: dict[str, Callable[[bytes, bytes], bytes]] = {
    "cut": lambda ours, _: ours[: len(ours) // 2],
    "empty": lambda _, __: b"",
    "one bit flipped": lambda ours, _: ours[: len(ours) // 3] + bytes([ours[len(ours) // 3] ^ 1]) + ours[len(ours) // 3 + 1 :],
    "random bytes": lambda ours, _: torch.randint(256, (len(ours),), generator=torch.Generator().manual_seed(0)).byte().numpy().tobytes(),
    "another run's": lambda _, theirs: theirs,
}
OFTEN = ("one bit flipped",)
OF_A_CHECKPOINT = (*(f"{name}.safetensors" for name in _TENSORS), "state.json", "MANIFEST.json")
OF_THE_RUN = ("config.yaml", "model.json", "run.json", "MANIFEST.json", "metrics.jsonl", "target.safetensors", "target.json")


@pytest.mark.parametrize("damage", [slow_unless(damage in OFTEN, damage) for damage in DAMAGES])
@pytest.mark.parametrize("file", OF_A_CHECKPOINT)
def test_a_damaged_file_of_a_checkpoint(world, tmp_path, cell, capsys, file: str, damage: str):
    """It is refused by name, the checkpoint before is offered, and from there the run ends in the same bytes."""
    path = tmp_path / "run"
    shutil.copytree(world / "stopped", path)
    victim = checkpoint_path(path, 8) / file
    theirs = checkpoint_path(world / "other", 8) / file
    with cell("damaged, in a checkpoint", damage, file):
        victim.write_bytes(DAMAGES[damage](victim.read_bytes(), theirs.read_bytes()))
        earlier = content(checkpoint_path(path, 4))
        code = main(["decompose", str(world / "tiny.yaml"), "--resume", "--out", str(path)])
        lines = capsys.readouterr().err.splitlines()
        where = "step-00000008" if file == "MANIFEST.json" else str(victim)  # a manifest may accuse another
        require_told(code, lines, where, f"remove {victim.parent} to use the checkpoint of step 4")
        assert content(checkpoint_path(path, 4)) == earlier
        found = verify(path)
        assert (found.whole, found.last_good) == (False, 4)
        if file in checkpoint.LOADED:
            with pytest.raises(RunDirError, match="step 4, which is whole"):
                open_run(path)
        shutil.rmtree(victim.parent)
        assert open_run(path).step == 4


@pytest.mark.slow
@pytest.mark.parametrize("file", OF_A_CHECKPOINT)
def test_what_the_message_says_is_a_way_out(world, tmp_path, cell, file: str):
    """With the damaged checkpoint removed the run goes on from the one before."""
    path = tmp_path / "run"
    shutil.copytree(world / "stopped", path)
    with cell("damaged, in a checkpoint", "removed as told, then resumed", file):
        (checkpoint_path(path, 8) / file).write_bytes(b"")
        assert resume(world, path)[0] == 2
        shutil.rmtree(checkpoint_path(path, 8))
        assert resume(world, path)[0] == 0
        require_identical(world, path)


@pytest.mark.parametrize("damage", [slow_unless(damage in OFTEN, damage) for damage in DAMAGES])
@pytest.mark.parametrize("file", OF_THE_RUN)
def test_a_damaged_file_of_the_run(world, tmp_path, cell, file: str, damage: str):
    """It is refused by name, or the run does not depend on it and ends in the same bytes; no checkpoint is touched."""
    path = tmp_path / "run"
    shutil.copytree(world / "stopped", path)
    victim, theirs = path / file, world / "other" / file
    with cell("damaged, of the run", damage, file):
        victim.write_bytes(DAMAGES[damage](victim.read_bytes(), theirs.read_bytes()))
        saved = {each.name: content(each) for each in checkpoints(path)}
        found = verify(path)
        code, lines = resume(world, path)
        if code:
            require_told(code, lines, str(path), "restore" if file != "metrics.jsonl" else "remove it to go on")
            assert {each.name: content(each) for each in checkpoints(path)} == saved
            assert not found.whole
            shutil.copy(world / "stopped" / file, victim)
        else:
            assert file == "run.json", "nothing else is free of consequences"
            require_identical(world, path)


@pytest.mark.parametrize("what", ["components.safetensors", "MANIFEST.json", "the checkpoint's", "target.safetensors", "model.json"])
def test_a_missing_file(world, tmp_path, cell, what: str):
    path = tmp_path / "run"
    shutil.copytree(world / "stopped", path)
    place = {"components.safetensors": checkpoint_path(path, 8) / what, "the checkpoint's": checkpoint_path(path, 8) / "MANIFEST.json"}
    with cell("damaged, of the run", "missing", what):
        place.get(what, path / what).unlink()
        code, lines = resume(world, path)
        require_told(code, lines, str(place.get(what, path / what)))


def test_a_whole_checkpoint_of_another_run(world, tmp_path, cell):
    """Its manifest agrees with it, and still it is not taken."""
    path = tmp_path / "run"
    shutil.copytree(world / "stopped", path)
    with cell("damaged, in a checkpoint", "another run's", "all of it"):
        shutil.rmtree(checkpoint_path(path, 8))
        shutil.copytree(checkpoint_path(world / "other", 8), checkpoint_path(path, 8))
        code, lines = resume(world, path)
        require_told(code, lines, "step-00000008", "of another run", "remove it")
        assert not verify(path).whole
        with pytest.raises(RunDirError, match="of another run"):
            open_run(path)


# --- what is not finite ----------------------------------------------------------------------------------------------------------------


def poisoned(value: float) -> Callable[..., Any]:
    def strike(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return original(*args, **kwargs) * value

    return strike


def one_loss(name: str, value: float) -> Callable[..., Any]:
    def strike(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        values, gradients = original(*args, **kwargs)
        return values | {name: values[name] * value}, gradients

    return strike


def first_parameter(of: str, value: float) -> Callable[..., Any]:
    """Puts one number of U, V or γ to `value` before a step."""

    def strike(original: Callable[..., Any], steps: Any, *args: Any) -> Any:
        module = steps.importance if of == "γ" else steps.decomposition
        parameter = next(value for name, value in module.named_parameters() if of == "γ" or name.startswith(f"_{of}"))
        with torch.no_grad():
            parameter.view(-1)[0] = value
        return original(steps, *args)

    return strike


def gradient(value: float) -> Callable[..., Any]:
    def strike(original: Callable[..., Any], steps: Any, *args: Any) -> Any:
        hook = steps.decomposition.V["blocks.0.attn.v"].register_hook(lambda grad: grad * value)
        try:
            return original(steps, *args)
        finally:
            hook.remove()

    return strike


def target_weight(value: float) -> Callable[..., Any]:
    def strike(original: Callable[..., Any], steps: Any, *args: Any) -> Any:
        with torch.no_grad():
            steps.task.model.embed.weight[:, 0] = value
        return original(steps, *args)

    return strike


def too_long_a_step(original: Callable[..., Any], steps: Any, *args: Any) -> Any:
    for group in steps.optimizer.param_groups:
        group["lr"] = torch.inf
    return original(steps, *args)


NAN, INF = float("nan"), float("inf")
RECONSTRUCTION = ("stochastic_recon", "stochastic_recon_layerwise", "recon")
NON_FINITE: dict[str, tuple[Any, str, Callable[..., Any]]] = {
    "the target, nan": (train.Steps, "run", target_weight(NAN)),
    "the target, inf": (train.Steps, "run", target_weight(INF)),
    "U, nan": (train.Steps, "run", first_parameter("U", NAN)),
    "V, inf": (train.Steps, "run", first_parameter("V", INF)),
    "γ, nan": (train.Steps, "run", first_parameter("γ", NAN)),
    "γ, inf": (train.Steps, "run", first_parameter("γ", INF)),
    "gradient, nan": (train.Steps, "run", gradient(NAN)),
    "gradient, inf": (train.Steps, "run", gradient(INF)),
    "faithfulness": (faithfulness, "faithfulness", poisoned(NAN)),
    "minimality": (minimality, "minimality", poisoned(INF)),
    **{
        name: (step_module, "reconstruction_backward", one_loss(name, NAN))
        for name in ("stochastic_recon", "stochastic_recon_layerwise", "recon")
    },
}


@pytest.mark.parametrize("what", [slow_unless(what == "gradient, nan", what) for what in NON_FINITE])
def test_what_is_not_finite(world, tmp_path, cell, what: str):
    """The step is not taken, nothing of it is saved, and without the fault the run goes on to the same bytes."""
    owner, name, how = NON_FINITE[what]
    path = tmp_path / "run"

    def fault(patch: pytest.MonkeyPatch) -> None:
        updates: list[int] = []
        register_optimizer_step_post_hook(lambda *_: updates.append(0))
        nth(patch, owner, name, 6, how)
        before_save = writer.RunWriter.save_checkpoint
        patch.setattr(writer.RunWriter, "save_checkpoint", lambda *args, **kwargs: (before_save(*args, **kwargs), updates.clear()))
        patch.setattr(saving.Saver, "record", lambda self, **fields: self.message(f"updates since the save: {len(updates)}"))

    with cell("not finite", what.rpartition(", ")[2] if ", " in what else "nan or inf", what.partition(",")[0]):
        code, lines = strike(world, path, fault)
        require_told(code, lines, "step 5: ", "not finite", "nothing was updated")
        assert "updates since the save: 1" in lines, "step 4's, and none of the broken step 5"
        assert [checkpoint_step(each) for each in checkpoints(path)] == [4]
        assert verify(path).checkpoints[0].whole
        assert resume(world, path)[0] == 0
        require_identical(world, path)


def test_an_update_that_leaves_what_is_not_finite(world, tmp_path, cell):
    """Finite gradients, a step without bounds: caught before it is saved."""
    path = tmp_path / "run"
    with cell("not finite", "inf", "the update"):
        code, lines = strike(world, path, lambda patch: nth(patch, train.Steps, "run", 8, too_long_a_step))
        require_told(code, lines, "step 8: ", "not finite after the update; nothing was saved")
        assert [checkpoint_step(each) for each in checkpoints(path)] == [4]
        assert resume(world, path)[0] == 0
        require_identical(world, path)


@pytest.mark.parametrize("name", ["local", "recon_partial", "stochastic_recon_partial", "recon_layerwise"])
def test_losses_of_other_configurations(tmp_path, monkeypatch, cell, name: str):
    config = tiny_with(losses={"faithfulness": 10.0, name: 1.0})
    how = (local, "local_loss", 6, poisoned(NAN)) if name == "local" else (step_module, "reconstruction_backward", 6, one_loss(name, NAN))
    nth(monkeypatch, *how)
    with cell("not finite", "nan or inf", name):
        with pytest.raises(DivergedError, match=f"step 5: loss {name} is not finite"):
            decompose_config(config, out=tmp_path / "run")
        assert [checkpoint_step(each) for each in checkpoints(tmp_path / "run")] == [4]


@pytest.mark.parametrize("value", [NAN, INF])
def test_a_batch_that_is_not_finite(tmp_path, cell, value: float):
    """Even where the model lets nothing of it through; the batch is named."""
    torch.manual_seed(0)
    model, data = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), torch.randn(20, 4, 3)

    def batches(step: int) -> torch.Tensor:
        return torch.full((4, 3), value) if broken and step == 5 else data[step]

    fields = {"C": 3, "steps": 12, "checkpoint": {"every": 4}, "gamma": {"kind": "vector", "d_gate": 2}, "threads": 1}
    broken = False
    whole = decompose(model, batches, out=tmp_path / "whole", **fields)
    broken = True
    with cell("not finite", str(value), "the batch"):
        with pytest.raises(DivergedError, match="step 5: .* not finite .*; nothing was updated"):
            decompose(model, batches, out=tmp_path / "run", **fields)
        assert [checkpoint_step(each) for each in checkpoints(tmp_path / "run")] == [4]
        broken = False
        assert result(decompose(model, batches, out=tmp_path / "run", resume=True, **fields).path) == result(whole.path)


# --- bad configurations ----------------------------------------------------------------------------------------------------------------

BAD: dict[str, tuple[str, list[str], str]] = {  # name: what is added to the file, flags, words of the message
    "a name that is none": ("", ["--sead", "1"], "sead"),
    "an unknown field": ("stepz: 3", [], "did you mean steps?"),
    "an unknown nested field": ("optim: {learning_rate: 3}", [], "optim.learning_rate: unknown field"),
    "steps 0": ("", ["--steps", "0"], "steps: 0: give 1 or more"),
    "steps of text": ("", ["--steps", "many"], "steps: 'many': give a whole number"),
    "steps true": ("", ["--steps", "true"], "a number is needed"),
    "steps 1.5": ("", ["--steps", "1.5"], "steps: 1.5"),
    "steps without end": ("", ["--steps", ".inf"], "steps: inf"),
    "C negative": ("", ["--C", "-3"], "C: -3: give 1 or more"),
    "batch 0": ("", ["--batch", "0"], "batch: 0"),
    "seed negative": ("", ["--seed", "-1"], "seed: -1: give 0 or more"),
    "lr 0": ("", ["--optim.lr", "0"], "optim.lr: 0: give a number above 0"),
    "lr infinite": ("", ["--optim.lr", ".inf"], "optim.lr: inf: give a finite number"),
    "lr nan": ("", ["--optim.lr", ".nan"], "optim.lr: nan"),
    "betas of one": ("", ["--optim.betas", "0.9"], "optim.betas"),
    "beta 1": ("", ["--optim.betas", "0.9", "1"], "optim.betas.1: 1: give a number below 1"),
    "an unknown optimizer": ("", ["--optim.name", "sgd"], 'Invalid value "sgd" for --optim.name. Choose from: "adam", "adamw"'),
    "an unknown schedule": ("", ["--optim.schedule", "step"], "optim.schedule"),
    "decay without adamw": ("", ["--optim.weight_decay", "0.1"], "needs name adamw"),
    "an unknown γ": ("", ["--gamma.kind", "perceptron"], "gamma.kind"),
    "sizes of another γ": ("", ["--gamma.width", "32"], "only for kind transformer, not attention"),
    "heads of γ that do not fit": ("", ["--gamma.kind", "transformer", "--gamma.heads", "5"], "gamma: width 64 must be a multiple of 10"),
    "a table too short": ("", ["--gamma.max_length", "2"], "gamma.max_length 2 is below task.length 8"),
    "a start γ has not": ("", ["--gamma.relative", "query", "--gamma.relative_init", "local"], "relative_init local needs"),
    "an unknown start": ("", ["--init.kind", "zeros"], "init.kind"),
    "no loss": ("losses: {}", [], "no loss is enabled"),
    "a loss below 0": ("", ["--losses.recon", "-1"], "losses.recon: -1: give 0 or more"),
    "p upwards": ("", ["--losses.p_start", "0.1", "--losses.p_final", "0.9"], "p is annealed downwards"),
    "layerwise sites 0": ("", ["--losses.layerwise_sites", "0"], "losses.layerwise_sites: 0: give 1 or more, or 'all'"),
    "other text without a loss": ("", ["--losses.elsewhere", "1"], "losses.elsewhere and task.elsewhere"),
    "a device that is none": ("", ["--device", "tpu"], "device"),
    "a device that is not here": ("", ["--device", "mps"], "device mps: torch"),
    "half precision": ("", ["--dtype", "float16"], "dtype"),
    "a graph without a GPU": ("", ["--cuda_graph", "true"], "cuda_graph true needs device cuda"),
    "threads 0": ("", ["--threads", "0"], "threads: 0"),
    "a pattern that finds nothing": ("", ["--sites", "layers.*"], "layers.*"),
    "a name that leads elsewhere": ("", ["--name", "../../etc"], "name: '../../etc'"),
    "keep_last 0": ("", ["--checkpoint.keep_last", "0"], "checkpoint.keep_last: 0"),
    "keep_every 0": ("", ["--checkpoint.keep_every", "0"], "checkpoint.keep_every: 0"),
    "checkpoints never": ("", ["--checkpoint.every", "0"], "checkpoint.every: 0"),
    "an unknown task": ("task: {kind: sorting}", [], "task"),
    "a task without its kind": ("task: {length: 8}", [], "task: give its kind"),
    "a sequence too short": ("", ["--task.length", "3"], "task.length: 3: give 4 or more"),
    "heads that do not fit": ("", ["--task.heads", "3"], "width 4 must be a multiple of heads 3"),
    "a list, no mapping": ("[]", [], "a mapping of fields is needed, not list"),
    "nothing at all": ("null", [], "a mapping of fields is needed, not an empty file"),
    "no YAML": ("steps: [1, 2", [], "not YAML"),
    "a field twice": ("steps: 3\nsteps: 4", [], "steps is given twice"),
    "a flag without its value": ("", ["--optim.lr"], "--optim.lr requires an argument"),
    "extend what is not resumed": ("", ["--extend-steps", "99"], "extend_steps: continues a run"),
    "resume and overwrite": ("", ["--resume", "--overwrite"], "exclude each other"),
    "resume of nothing": ("", ["--resume"], "nothing to resume there"),
    "a target that is none": ("", ["--target", "/nonexistent"], "/nonexistent"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_configuration(tmp_path, cell, capsys, what: str):
    """Refused at once, in at most three lines that name the field and what to write, with nothing made or changed."""
    text, flags, words = BAD[what]
    file = tmp_path / "bad.yaml"
    alone = not text or text.startswith(("[", "null", "steps: [", "steps: 3"))
    tree = make_config(CONFIG).model_dump(mode="json")
    if not alone:
        tree |= yaml.safe_load(text)
    file.write_text(text if alone and text else yaml.safe_dump(tree), encoding="utf-8")
    with cell("bad configuration", "refused", what):
        code = main(["decompose", str(file), "--out", str(tmp_path / "run"), *flags])
        lines = capsys.readouterr().err.splitlines()
        assert code == 2, lines
        require_told(code, lines, words)
        assert [entry.name for entry in tmp_path.iterdir()] == ["bad.yaml"]


# --- hostile files ---------------------------------------------------------------------------------------------------------------------


class Payload:
    """A pickle of it would make a directory when it is read."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.place),)


def resealed(folder: Path) -> None:
    """Make a folder's manifest agree with what now lies there."""
    write_manifest(folder, [folder / name for name in json.loads((folder / "MANIFEST.json").read_text())])


def edited(file: Path, **fields: Any) -> None:
    """Change `model.json`, and all that vouches for it."""
    file.write_text(json.dumps(read_json(file) | fields), encoding="utf-8")
    resealed(file.parent)
    for folder in checkpoints(file.parent):
        state = read_json(folder / "state.json") | {"model": file_sha256(file)}
        (folder / "state.json").write_text(json.dumps(state), encoding="utf-8")
        resealed(folder)


def manifest_entry(folder: Path, name: str) -> None:
    entries = json.loads((folder / "MANIFEST.json").read_text())
    (folder / "MANIFEST.json").write_text(json.dumps(entries | {name: {"bytes": 1, "sha256": "0" * 64}}))


def pickled(path: Path, place: Path) -> None:
    file = checkpoint_path(path, 8) / "components.safetensors"
    plant(file, pickle.dumps(Payload(place)))
    resealed(file.parent)


def endless_header(path: Path, _: Path) -> None:
    file = checkpoint_path(path, 8) / "components.safetensors"
    file.write_bytes((2**60).to_bytes(8, "little") + file.read_bytes()[8:])
    resealed(file.parent)


def overlapping(path: Path, _: Path) -> None:
    """Two tensors that share their bytes."""
    file = checkpoint_path(path, 8) / "components.safetensors"
    raw = file.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = {name: entry | {"data_offsets": [0, 80]} for name, entry in json.loads(raw[8 : 8 + size]).items()}
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + size :])
    resealed(file.parent)


def linked(path: Path, _: Path) -> None:
    file = checkpoint_path(path, 8) / "rng.safetensors"
    file.unlink()
    file.symlink_to("/etc/passwd")


def nested(path: Path, _: Path) -> None:
    (path / "model.json").write_text("[" * 100_000)
    resealed(path)


def huge_number(path: Path, _: Path) -> None:
    (path / "model.json").write_text('{"format": ' + "9" * 10_000 + "}")
    resealed(path)


HOSTILE: dict[str, tuple[Callable[[Path, Path], None], str]] = {
    "a pickle named .safetensors": (pickled, "no safetensors file"),
    "a header of 2^60 bytes": (endless_header, "no safetensors file"),
    "tensors that overlap": (overlapping, "no safetensors file"),
    "../ in a checkpoint's manifest": (
        lambda path, _: manifest_entry(checkpoint_path(path, 8), "../../config.yaml"),
        "no file of this folder",
    ),
    "../ in the run's manifest": (lambda path, _: manifest_entry(path, "../stopped/run.json"), "no file of this folder"),
    "an absolute name in a manifest": (lambda path, _: manifest_entry(path, "/etc/passwd"), "no file of this folder"),
    "a link out of the run": (linked, "something else found"),
    "C 10^7 in model.json": (lambda path, _: edited(path / "model.json", C=10**7), "was expected"),
    "C 10^30 in model.json": (lambda path, _: edited(path / "model.json", C=10**30), "model.json"),
    "a type that is code": (lambda path, _: edited(path / "model.json", dtype="__class__"), "dtype: '__class__'"),
    "JSON nested 100,000 deep": (nested, "not JSON"),
    "a number of 10,000 digits": (huge_number, "not JSON"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_run(world, tmp_path, cell, capsys, what: str):
    """Every manifest agrees, so that it is the reader itself that refuses; nothing is run, nothing large is made."""
    path, place = tmp_path / "run", tmp_path / "owned"
    shutil.copytree(world / "stopped", path)
    change, words = HOSTILE[what]
    change(path, place)
    with cell("hostile", "refused", what):
        for command in (["decompose", str(world / "tiny.yaml"), "--resume", "--out", str(path)], ["circuit", str(path), "--batches", "1"]):
            if what == "a link out of the run" and command[0] == "circuit":
                continue  # rng.safetensors is not read there
            code = main(command)
            lines = capsys.readouterr().err.splitlines()
            require_told(code, lines, words)
        assert not place.exists()


BOMBS = {
    "a YAML file that holds itself": "steps: &a [*a]",
    "a YAML file that unfolds": "a: &a [x, x]\n"
    + "\n".join(f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]" for old, new in zip("abcdefg", "bcdefgh", strict=True)),
    "a YAML file of 2 MB": "# " + "x" * 2 * 2**20,
    "YAML nested 100,000 deep": "sites: " + "[" * 100_000,
    "YAML that builds objects": "steps: !!python/object/apply:os.mkdir [owned]",
}


@pytest.mark.parametrize("what", BOMBS)
def test_hostile_yaml(tmp_path, cell, capsys, monkeypatch, what: str):
    """As a configuration, and as a file of facts."""
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "bomb.yaml"
    file.write_text(BOMBS[what], encoding="utf-8")
    with cell("hostile", "refused", what):
        require_told(main(["decompose", str(file)]), capsys.readouterr().err.splitlines(), "bomb.yaml")
        with pytest.raises(ConfigError, match="bomb.yaml"):
            read_facts(file)
        assert [entry.name for entry in tmp_path.iterdir()] == ["bomb.yaml"]


def test_hostile_models(facts_run, tmp_path, cell):
    """A folder whose weights are a pickle, and one that brings code of its own."""
    source = facts_run.path / "target"
    with cell("hostile", "refused", "a model of pickled weights"):
        shutil.copytree(source, tmp_path / "pickled")
        (tmp_path / "pickled/model.safetensors").unlink()
        plant(tmp_path / "pickled/pytorch_model.bin", pickle.dumps(Payload(tmp_path / "owned")))
        with pytest.raises(ConfigError, match="no weights in safetensors, the one format that is read; pytorch_model.bin is not opened"):
            load_language(str(tmp_path / "pickled"))
    with cell("hostile", "refused", "a model with code of its own"):
        shutil.copytree(source, tmp_path / "code")
        config = json.loads((tmp_path / "code/config.json").read_text())
        own = {"model_type": "own", "auto_map": {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"}}
        (tmp_path / "code/config.json").write_text(json.dumps(config | own))
        (tmp_path / "code/own.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'owned')!r})\n")
        with pytest.raises(ConfigError, match="needs code of its own .*, which is never run"):
            load_language(str(tmp_path / "code"))
    assert not (tmp_path / "owned").exists()
