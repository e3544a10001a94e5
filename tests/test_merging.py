"""Merging: dead subcomponents go into Δ, C shrinks, and what is left goes on as if nothing had happened."""

import shutil
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from conftest import tiny_with
from paramlens.analysis.catalogue import catalogue
from paramlens.cli.main import main
from paramlens.config.file import dump_config
from paramlens.errors import ConfigError
from paramlens.method.batch import Batch
from paramlens.method.decomposition import Decomposition
from paramlens.method.evaluate import importances
from paramlens.method.generators import generator
from paramlens.method.importance.network import Importance
from paramlens.method.importance.settings import KINDS, Gamma
from paramlens.method.losses.divergence import LossAt
from paramlens.method.masks import Replacement
from paramlens.method.merging import Merging
from paramlens.method.settings import Init, Merge
from paramlens.method.sites import find_sites
from paramlens.method.start import initialise
from paramlens.runs.decompose import decompose_config
from paramlens.runs.layout import checkpoints
from paramlens.runs.rundir import open_run
from paramlens.runs.verification import verify
from rounding import TOY_STEP, assert_near

C = 6
SITES = ("blocks.*.attn.[qkv]",)
KEPT = {"blocks.0.attn.q": [1, 3, 4], "blocks.1.attn.v": [5]}
"""The subcomponents that are used, at two of the sites; nothing is at the others."""


class Made:
    """A decomposition with Δ whose γ gives the subcomponents of `KEPT` importances in (0, 1) and all others 0, after one step of Adam."""

    def __init__(self, target, kind: str) -> None:
        sites = find_sites(target, SITES)
        self.decomposition = Decomposition(target, sites, C=C, delta=True)
        initialise(self.decomposition, Init(kind="random"), generator=generator("test"))
        self.importance = Importance({site.name: (site.d_seen, C) for site in sites}, Gamma(kind=kind, d_gate=3), max_length=8)
        self.importance.initialise(generator("γ"))
        self.parameters = [*self.decomposition.parameters(), *self.importance.parameters()]
        self.optimizer = torch.optim.Adam(self.parameters, lr=1e-3)
        for parameter in self.parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator("gradient", *parameter.shape))
        self.optimizer.step()
        used = [[c in KEPT.get(name, []) for c in range(C)] for group in self.importance.typed_groups for name in group.names]
        with torch.no_grad():
            for group in self.importance.typed_groups:
                group.w_out.mul_(0.1)
                group.b_out.copy_(torch.where(torch.tensor(used), 0.5, -3.0))
        self.merging = Merging(Merge(every=1, start=0), 10, self.decomposition, self.importance, self.optimizer)

    def losses(self) -> tuple[dict[str, torch.Tensor], torch.Tensor, dict[str, torch.Tensor]]:
        """g, the reconstruction at masks g, and its gradients for the subcomponents of `KEPT`, by name and in their order."""
        batch = Batch(torch.randint(7, (3, 8), generator=generator("tokens")))
        for parameter in self.parameters:
            parameter.grad = None
        target = self.decomposition.target_run(batch.inputs)
        pre = self.importance(target.seen, self.decomposition.U)
        plan = {name: Replacement(value.clamp(0, 1)) for name, value in pre.items()}
        at = LossAt()
        value = at.divergence(at.log_probs(target.logits), self.decomposition(batch.inputs, [plan]))[0]
        value.backward()
        _, g = importances(self.decomposition, self.importance, batch)
        gradients = {f"U {name}": U.grad.T for name, U in self.decomposition.U.items()}
        gradients |= {f"V {name}": V.grad for name, V in self.decomposition.V.items()}
        for group in self.importance.typed_groups:
            for key in ("w_out", "b_out"):
                axis = group.declared[key].C_axis
                gradients |= {
                    f"{key} {name}": part.movedim(axis, 0) for name, part in zip(group.names, getattr(group, key).grad, strict=True)
                }
        return g, value.detach(), {name: part for name, part in gradients.items() if name.partition(" ")[2] in KEPT}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_left_goes_on_as_before(target, kind: str):
    """Importances, the loss at masks g, its gradients and the moments of what is left are what they were; all parts and Δ are W."""
    made = Made(target, kind)
    g, value, gradients = made.losses()
    exp_avg = {name: made.optimizer.state[U]["exp_avg"].clone() for name, U in made.decomposition.U.items()}
    assert made.merging.after_step(0, g)
    assert set(made.decomposition.C.values()) == {3}
    assert made.merging.left() == {name: len(KEPT.get(name, [])) for name in made.decomposition.names}
    g_after, value_after, gradients_after = made.losses()
    for name, of_site in g_after.items():
        kept = KEPT.get(name, [])
        assert_near(of_site[..., : len(kept)], g[name][..., kept], TOY_STEP, size=1)
        assert of_site[..., len(kept) :].eq(0).all()
        moments = made.optimizer.state[made.decomposition.U[name]]["exp_avg"]
        assert moments[:, : len(kept)].equal(exp_avg[name][:, kept])
        assert moments[:, len(kept) :].eq(0).all()
    assert_near(value_after, value, TOY_STEP, size=10)
    for name, part in gradients.items():
        kept = KEPT[name.partition(" ")[2]]
        assert_near(gradients_after[name][: len(kept)], part[kept], TOY_STEP, size=10)


@pytest.mark.parametrize("kind", ["vector", "transformer"])
def test_a_switched_off_subcomponent_stays_off(target, kind: str):
    """Nothing that a step could do turns on what only fills up a site."""
    made = Made(target, kind)
    made.merging.after_step(0, made.losses()[0])
    for _ in range(5):
        made.losses()
        made.optimizer.step()
    g, _, _ = made.losses()
    for name, of_site in g.items():
        assert of_site[..., len(KEPT.get(name, [])) :].eq(0).all()
    assert made.merging.left() == {name: len(KEPT.get(name, [])) for name in made.decomposition.names}


def test_it_waits_for_its_time_and_for_what_comes_back(target):
    made = Made(target, "vector")
    g = {name: torch.zeros(2, C) for name in made.decomposition.names}
    once = {name: torch.full((2, C), 0.9) for name in made.decomposition.names}
    merging = Merging(Merge(every=3, start=0.5, end=0.8, memory=4), 12, made.decomposition, made.importance, made.optimizer)
    merging.after_step(4, once)
    assert not merging.after_step(5, g)  # 0.9 · 3/4 is above 0.1
    assert not any(merging.after_step(step, g) for step in (6, 7))
    assert not merging.after_step(8, g)  # due, and 0.9 · (3/4)^4 is still above
    assert not any(merging.after_step(step, g) for step in (9, 10, 11))  # 12 is due, but above 0.8 of the steps
    merging = Merging(Merge(every=3, start=0.5), 12, made.decomposition, made.importance, made.optimizer)
    assert not merging.after_step(2, g)  # below half of the steps
    assert merging.after_step(5, g)
    assert set(made.decomposition.C.values()) == {1}


MERGES = {"delta": True, "merge": {"every": 2, "start": 0.2, "threshold": 0.45, "memory": 2}, "steps": 12}
FIELDS = {"losses": {"stochastic_recon": 1.0, "recon": 1.0, "minimality": 0.3}, "optim": {"lr": 0.05}, "C": 8}


GAMMAS = {"attention": {"kind": "attention", "d_gate": 3}, "transformer": {"kind": "transformer", "width": 8, "heads": 2}}


@pytest.fixture(scope="module", params=GAMMAS)
def merged(request, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = tiny_with(**MERGES, **FIELDS, gamma=GAMMAS[request.param], checkpoint={"every": 2, "keep_last": 6}, log_every=1)
    return decompose_config(config, out=tmp_path_factory.mktemp("merged") / "run").path


def shapes(path: Path) -> list[dict[str, int]]:
    return [open_run(path, checkpoint=step).decomposition.C for step in (2, 4, 6, 8, 10, 12)]


def test_a_run_ends_with_fewer_and_opens_at_every_checkpoint(merged: Path):
    found = shapes(merged)
    assert set(found[0].values()) == {8}
    assert sum(found[-1].values()) < sum(found[0].values())
    for before, after in pairwise(found):
        assert all(after[site] <= count for site, count in before.items())
    assert verify(merged).whole
    left = [line["left"] for line in open_run(merged).metrics if "losses" in line]
    assert len(left) == 12
    assert all(count <= found[-1][site] for site, count in left[-1].items())
    assert main(["circuit", str(merged), "--batches", "1", "--adversary", "1"]) == 0
    assert catalogue(open_run(merged), batches=1).counts == found[-1]


@pytest.mark.parametrize("step", [pytest.param(2, marks=pytest.mark.slow), 6])
def test_it_goes_on_across_a_merge_in_the_same_bytes(merged: Path, tmp_path: Path, step: int):
    copy = tmp_path / "run"
    shutil.copytree(merged, copy)
    for folder in checkpoints(copy):
        if int(folder.name.removeprefix("step-")) > step:
            shutil.rmtree(folder)
    config = open_run(merged).config
    decompose_config(config, out=copy, resume=True)
    for name in ("components", "importance", "optimizer"):
        last = f"checkpoints/step-00000012/{name}.safetensors"
        assert (copy / last).read_bytes() == (merged / last).read_bytes()
    assert (copy / "metrics.jsonl").read_bytes() == (merged / "metrics.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"merge": {"every": 50}}, "merge.every 50: .* give delta true"),
        ({"C": "auto"}, "C auto is what merging leaves; give delta true and merge.every"),
        ({"C": "auto", "optim": {"project_from": 0.5}}, "optim.project_from 0.5 leaves no remainder .* C auto"),
        ({"C": "some"}, "C"),
        ({"merge": {"every": 50}, "delta": True, "device": "cuda", "cuda_graph": True}, "cuda_graph true replays tensors of one size"),
    ],
)
def test_what_excludes_it_is_refused(fields: dict[str, object], message: str):
    with pytest.raises(ConfigError, match=message):
        tiny_with(**fields)


def test_automatic_C_begins_at_twice_the_rank_and_ends_with_what_is_used(tmp_path):
    config = tiny_with(**MERGES | {"C": "auto", "losses": {"recon": 1.0, "minimality": 1.0}})
    run = decompose_config(config, out=tmp_path / "run")
    counts = [line["left"] for line in run.metrics if "left" in line]
    assert all(count <= 2 * 4 for left in counts for count in left.values()), "the tiny target has width 4"
    assert sum(run.decomposition.C.values()) < 2 * 4 * len(run.decomposition.sites)
    assert open_run(run.path).decomposition.C == run.decomposition.C
    assert (verify(run.path).whole, open_run(run.path).config.C) == (True, "auto")


def test_it_is_in_the_help_and_in_the_file(capsys: pytest.CaptureFixture[str]):
    assert "merge:" in dump_config(tiny_with(**MERGES))
    assert main(["decompose", "induction-quick", "--help"]) == 0
    assert "--merge.every" in capsys.readouterr().out
