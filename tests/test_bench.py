import json
import subprocess

import pytest
import torch

from paramlens.baselines import bench
from paramlens.baselines.naive import NaiveStep
from paramlens.cli.main import main
from paramlens.errors import ConfigError
from paramlens.method.decomposition import Decomposition
from paramlens.method.generators import generator
from paramlens.method.importance.network import Importance
from paramlens.method.masks import mask_noise
from paramlens.method.sites import at_rest, find_sites
from paramlens.method.start import initialise
from paramlens.method.step import training_step
from paramlens.tasks.induction.model import InductionTransformer
from paramlens.tasks.induction.sequences import induction_task
from rounding import TOY_STEP, assert_near, near

SMALL = {"length": 6, "batch": 3, "C": 5, "threads": 1}


@pytest.mark.parametrize("kind", ["scalar", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("vector", "attention"))])
def test_the_naive_step_is_the_same_step(kind: str):
    """Same losses and gradients as the library's, given the same noise: what is compared is the same work."""
    config = bench.Case(importance=kind, **SMALL).config()
    torch.manual_seed(0)
    model = InductionTransformer(config.task)
    sites = find_sites(model, config.sites)
    decomposition = Decomposition(model, sites, C=config.C)
    importance = Importance({site.name: (site.d_seen, config.C) for site in sites}, config.gamma, max_length=config.task.length)
    initialise(decomposition, config.init, generator=generator("init"))
    importance.initialise(generator("gamma"))
    naive = NaiveStep(config, decomposition, importance, max_length=config.task.length)
    task = induction_task(config.task, model, seed=0, batch=config.batch)
    batch, step = task.batch(0, "train"), 7

    def noise(loss: str, site: str, g: torch.Tensor) -> torch.Tensor:
        keys = torch.randint(2**31, (len(sites),), generator=generator(config.seed, "masks", loss, step))
        return mask_noise(int(keys[decomposition.names.index(site)]), g.detach())

    with at_rest(model):
        ours = training_step(config, task, decomposition, importance, batch, step).total
        theirs = naive(batch.inputs, step, noise, decomposition.names)
        theirs.backward()
    assert theirs.item() == near(ours.item(), TOY_STEP)
    pairs = [*zip(decomposition.U.values(), naive.U, strict=True), *zip(decomposition.V.values(), naive.V, strict=True)]
    for mine, other in pairs:
        assert_near(mine.grad, other.grad, TOY_STEP + 128)
    for i, site in enumerate(sites):
        (group,) = (group for group in importance.groups if site.name in group.names)
        for key, value in group.named_parameters():
            assert_near(
                value.grad[group.names.index(site.name)], naive.gamma[i][key].grad, TOY_STEP + 128, size=value.grad.abs().max().item()
            )


def test_cases_of_a_grid():
    table = bench.cases("table2")
    assert [(case.length, case.batch) for case in table[:4]] == [(16, 64), (64, 64), (1024, 64), (10240, 4)]
    assert {case.importance for case in table} == {"scalar", "vector", "attention"}
    fixed = bench.cases("C", importance="vector", batch=8)
    assert [(case.importance, case.batch, case.C) for case in fixed] == [("vector", 8, C) for C in (25, 50, 100, 200, 400)]
    assert [(case.length, case.batch) for case in bench.cases("length", importance="scalar", batch=2)][:2] == [(16, 2), (32, 2)]
    with pytest.raises(ConfigError, match="grid big: there are like-for-like, table2"):
        bench.cases("big")
    with pytest.raises(ConfigError, match="sites 5: the target has three a block"):
        bench.Case(sites=5).config()


@pytest.mark.slow
def test_bench_prints_what_others_script_against(capsys: pytest.CaptureFixture[str]):
    words = ["bench", "--importance", "vector", "--length", "6", "--batch", "3", "--C", "5", "--threads", "1", "--repeats", "3", "--json"]
    assert main(words) == 0
    document = json.loads(capsys.readouterr().out)
    (case,) = document["cases"]
    assert {key: case[key] for key in ("importance", "length", "batch", "C", "sites", "threads")} == {
        "importance": "vector",
        "length": 6,
        "batch": 3,
        "C": 5,
        "sites": 6,
        "threads": 1,
    }
    assert case["ratio"] == pytest.approx(case["steps_per_s"] / case["naive_steps_per_s"])
    assert case["repeats"] == 3
    assert case["busy_steps_per_s"] > 0
    assert case["peak_bytes"] >= 0
    assert case["naive_peak_bytes"] >= 0


def test_what_would_not_fit_is_left_out_and_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(bench, "free_memory", lambda _device: 1e6)
    (measured,) = bench.bench([bench.Case(**SMALL | {"C": 50})], repeats=3, busy=False, memory=False)
    assert measured.naive_left_out.startswith("needs about")
    assert (measured.naive_steps_per_s, measured.ratio, measured.busy_steps_per_s) == (None, None, None)
    assert measured.steps_per_s > 0


def test_a_gamma_that_the_naive_step_has_not_is_measured_alone():
    (measured,) = bench.bench([bench.Case(importance="shared", **SMALL)], repeats=3, busy=False, memory=False)
    assert (measured.naive_left_out, measured.naive_steps_per_s) == ("has no shared γ", None)
    assert measured.steps_per_s > 0


def test_the_busy_process_is_busy_and_ends(monkeypatch: pytest.MonkeyPatch):
    started = []

    class Watched(subprocess.Popen):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            started.append(self)

    monkeypatch.setattr(bench.subprocess, "Popen", Watched)
    with pytest.raises(KeyError), bench.busy_process():
        assert started[0].poll() is None
        raise KeyError
    assert started[0].returncode is not None
    with Watched(started[0].args, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as orphan:
        orphan.stdin.close()  # as when the process that started it dies
        assert orphan.wait() == 0


@pytest.mark.slow
def test_memory_of_a_step_is_far_below_the_naive_one():
    """Peak beyond what stands before the first step, each in a process of its own, at a size where it shows."""
    case = bench.Case(length=64, batch=16, C=60, threads=1)
    ours, naive = (bench.peak(case.config(), side) for side in ("ours", "naive"))
    if ours is None:
        pytest.skip("no high-water mark to reset on this system")
    assert ours < naive / 2
