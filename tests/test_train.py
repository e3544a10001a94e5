import os
import signal

import pytest
import torch
from torch import nn

import rounding
from conftest import tiny_with
from paramlens.errors import BatchError, ConfigError, DivergedError, RunDirError, SiteError
from paramlens.method import step as step_module
from paramlens.method.evaluate import evaluate, importances
from paramlens.method.importance.network import Importance
from paramlens.method.settings import Optim
from paramlens.runs import decompose as decompose_module
from paramlens.runs import train
from paramlens.runs.decompose import decompose, decompose_config
from paramlens.runs.layout import read_metrics
from paramlens.tracking.tracker import Silent
from rounding import near


class Toy(nn.Module):
    """Two sites, no positions, a dropout that must rest while the target runs."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.drop, self.second = nn.Linear(4, 6), nn.Dropout(0.5), nn.Linear(6, 3)

    def forward(self, x):
        return self.second(self.drop(self.first(x)).relu())


def batches(step: int) -> torch.Tensor:
    return torch.randn(5, 2, 4, generator=torch.Generator().manual_seed(step))


TOY = {
    "C": 7,
    "steps": 6,
    "threads": 1,
    "gamma": {"kind": "vector", "d_gate": 3},
    "init": {"kind": "svd"},
    "checkpoint": {"every": 3},
    "evaluate": {"every": 3},
    "log_every": 2,
}


def parameters(run) -> list[torch.Tensor]:
    return [*run.decomposition.parameters(), *run.importance.parameters()]


def test_rate():
    cosine = Optim(schedule="cosine", warmup=2)
    assert [train.rate(cosine, step, 6) for step in range(6)] == pytest.approx([1 / 3, 2 / 3, 1, 0.8535534, 0.5, 0.1464466])
    assert [train.rate(Optim(schedule="linear"), step, 4) for step in range(4)] == pytest.approx([1, 0.75, 0.5, 0.25])
    constant = Optim(schedule="constant", warmup=0.01)
    assert [train.rate(constant, step, 200) for step in (0, 1, 2, 199)] == pytest.approx([1 / 3, 2 / 3, 1, 1])


def test_any_module_is_decomposed_and_given_back(tmp_path):
    model = Toy().train()
    model.second.bias.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    flags = [(p.requires_grad, p.grad) for p in model.parameters()]
    run = decompose(model, batches, out=tmp_path / "run", **TOY)
    assert run.decomposition.names == ("first", "second")
    assert run.step == 6
    assert run.status == "finished"
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [(p.requires_grad, p.grad) for p in model.parameters()] == flags
    assert model.training
    assert model.drop.training
    assert not any("forward" in module.__dict__ for module in model.modules())


@pytest.mark.parametrize("kind", ["scalar", "vector", "shared"])
def test_batches_without_positions(kind: str):
    run = decompose(Toy(), lambda step: batches(step)[:, 0], **TOY | {"gamma": {"kind": kind, "d_gate": 3}})
    assert run.step == 6


def test_resume_with_another_model_changes_nothing(tmp_path):
    decompose(Toy(), batches, out=tmp_path / "run", **TOY)
    other = Toy()
    with torch.no_grad():
        other.first.weight.mul_(2)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(RunDirError, match="with other weights than this model.s .*; give the model it was made from"):
        decompose(other, batches, out=tmp_path / "run", resume=True, **TOY)
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


def test_dataloaders_and_callers_without_gradients():
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(batches(0)), batch_size=2)
    with torch.no_grad():
        run = decompose(Toy(), loader, **TOY)
    assert run.step == 6


@pytest.mark.parametrize("wrong", [None, 5, "abc", torch.ones(3, 2, 4), {"x": torch.ones(1)}])
def test_batches_that_are_none(wrong):
    with pytest.raises(ConfigError, match=r"batches: \w+ is not a series of batches; give a list of batches"):
        decompose(Toy(), wrong, **TOY)


def test_models_that_cannot_be_decomposed():
    with pytest.raises(ConfigError, match="model: an nn.Module is needed, not function"):
        decompose(batches, batches, **TOY)
    with pytest.raises(SiteError, match="no nn.Linear"):
        decompose(nn.Identity(), batches, **TOY)
    normed = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)))
    with pytest.raises(SiteError, match="site 0: its weight is computed"):
        decompose(normed, batches, **TOY)
    with pytest.raises(SiteError, match="'scond' matches no weight matrix; did you mean second"):
        decompose(Toy(), batches, sites="scond", **TOY)


def test_the_callers_random_state_is_left_alone():
    model = Toy()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    decompose(model, batches, **TOY)
    assert torch.equal(torch.rand(3), expected)


def test_last_token_needs_positions():
    with pytest.raises(ConfigError, match=r"last_token_only true: the model's logits \(5, 3\) have no position axis"):
        decompose(Toy(), lambda step: batches(step)[:, 0], last_token_only=True, **TOY)


def test_sequences_and_iterables_of_batches():
    listed = [batches(step) for step in range(3)]
    cycled = decompose(Toy(), listed, **TOY)
    iterated = decompose(Toy(), iter_again(listed), **TOY)
    assert all(torch.equal(a, b) for a, b in zip(parameters(cycled), parameters(iterated), strict=True))
    with pytest.raises(BatchError, match="an empty sequence"):
        decompose(Toy(), [], **TOY)
    with pytest.raises(BatchError, match="the iterable is exhausted"):
        decompose(Toy(), iter(listed), **TOY)
    with pytest.raises(ConfigError, match="batches from an iterable cannot be taken up at a step"):
        decompose(Toy(), iter_again(listed), resume=True, out="nowhere", **TOY)


class iter_again:  # noqa: N801
    def __init__(self, items):
        self.items = items

    def __iter__(self):
        return iter(self.items)


def test_fields_are_checked():
    with pytest.raises(ConfigError, match="decompose: optim.lrr: unknown field; did you mean optim.lr"):
        decompose(Toy(), batches, optim={"lrr": 1}, **TOY)
    with pytest.raises(ConfigError, match=r"dtype float64: site first is torch.float32"):
        decompose(Toy(), batches, dtype="float64", **TOY)


def test_training_lowers_the_loss(tmp_path):
    fields = TOY | {
        "steps": 60,
        "log_every": 1,
        "losses": {"recon": 1.0, "faithfulness": 10.0, "minimality": 0.001},
        "init": {"kind": "random"},
    }
    run = decompose(Toy(), batches, optim={"lr": 2e-2}, **fields)
    lines = [line for line in run.metrics if "losses" in line]
    assert lines[-1]["losses"]["faithfulness"] < 0.1 * lines[0]["losses"]["faithfulness"]
    assert lines[-1]["losses"]["recon"] < 0.5 * lines[0]["losses"]["recon"]


def test_warmup_fits_the_weights_before_the_first_step():
    cold = decompose(Toy(), batches, **TOY | {"init": {"kind": "random"}, "log_every": 1})
    warm = decompose(Toy(), batches, **TOY | {"init": {"kind": "random", "warmup_steps": 300}, "log_every": 1})
    first = [next(line["losses"]["faithfulness"] for line in run.metrics if "losses" in line) for run in (cold, warm)]
    assert first[1] < 0.01 * first[0]


def test_same_seed_same_bytes_other_seed_other_run():
    runs_ = [decompose(Toy(), batches, seed=seed, **TOY) for seed in (0, 0, 1)]
    files = [{path.name: path.read_bytes() for path in (run.path / "checkpoints/step-00000006").iterdir()} for run in runs_]
    assert files[0] == files[1]
    assert files[0]["components.safetensors"] != files[2]["components.safetensors"]
    assert (runs_[0].path / "metrics.jsonl").read_bytes() == (runs_[1].path / "metrics.jsonl").read_bytes()


def test_metrics_lines(tiny_run):
    trained = [line["step"] for line in tiny_run.metrics if "losses" in line]
    evaluated = [line["step"] for line in tiny_run.metrics if "evaluation" in line]
    assert trained == [3, 6, 9, 12]
    assert evaluated == [6, 12]
    line = next(line for line in tiny_run.metrics if "losses" in line)
    assert set(line["losses"]) == {"stochastic_recon", "stochastic_recon_layerwise", "recon", "faithfulness", "minimality"}
    coefficients = tiny_run.config.losses
    assert line["total"] == near(sum(getattr(coefficients, name) * value for name, value in line["losses"].items()), rounding.TOY_STEP)
    assert set(line["active"]) == set(tiny_run.decomposition.names)


def test_interrupt_finishes_the_step_saves_and_resumes_exactly(tmp_path):
    """Ctrl-C at step 5: a checkpoint there, and after resuming the same bytes as an undisturbed run."""
    config = tiny_with(steps=10, log_every=1)

    class PressAtFive(Silent):
        def update(self, logged):
            if logged.step == 5:
                os.kill(os.getpid(), signal.SIGINT)

    whole = decompose_config(config, out=tmp_path / "whole")
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        decompose_config(config, out=tmp_path / "cut", tracker=PressAtFive())
    assert signal.getsignal(signal.SIGINT) is before
    assert [path.name for path in (tmp_path / "cut" / "checkpoints").iterdir()].count("step-00000005") == 1
    assert '"interrupted"' in (tmp_path / "cut" / "run.json").read_text()
    resumed = decompose_config(config, out=tmp_path / "cut", resume=True)
    assert resumed.status == "finished"
    assert all(torch.equal(a, b) for a, b in zip(parameters(whole), parameters(resumed), strict=True))
    assert (tmp_path / "whole/metrics.jsonl").read_bytes() == (tmp_path / "cut/metrics.jsonl").read_bytes()


def test_second_interrupt_stops_at_once():
    with train.interrupts() as interrupted:
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupted()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_resume_refuses_what_differs(tmp_path):
    decompose_config(tiny_with(), out=tmp_path / "run")
    with pytest.raises(ConfigError, match=r"another configuration \(C 5 → 6; optim.lr 0.001 → 0.1\)"):
        decompose_config(tiny_with(C=6, optim={"lr": 0.1}), out=tmp_path / "run", resume=True)
    with pytest.raises(decompose_module.RunDirError, match="nothing to resume there"):
        decompose_config(tiny_with(), out=tmp_path / "other", resume=True)
    assert decompose_config(tiny_with(), out=tmp_path / "run", resume=True).step == 12


def test_non_finite_loss_stops_before_the_update(tmp_path, monkeypatch: pytest.MonkeyPatch):
    """U goes bad before step 5: named with its site, nothing updated, the checkpoint of step 4 intact."""
    seen = {}

    def spoiled(*args, **kwargs):
        decomposition, step = args[2], args[5]
        if step == 5:
            with torch.no_grad():
                decomposition.U["blocks.1.attn.v"][0, 0] = float("nan")
            seen["V"] = decomposition.V["blocks.0.attn.q"].clone()
            seen["decomposition"] = decomposition
        return original(*args, **kwargs)

    original = step_module.training_step
    monkeypatch.setattr(step_module, "training_step", spoiled)
    with pytest.raises(DivergedError) as error:
        decompose_config(tiny_with(), out=tmp_path / "run")
    losses = "stochastic_recon, stochastic_recon_layerwise, recon, faithfulness"
    assert str(error.value).startswith(f"step 5: loss {losses} is not finite (U at blocks.1.attn.v); nothing was updated.")
    assert torch.equal(seen["decomposition"].V["blocks.0.attn.q"], seen["V"])
    run = decompose_module.open_run(tmp_path / "run")
    assert (run.step, run.status) == (4, "diverged")


def test_non_finite_gradient_stops_too(tmp_path, monkeypatch: pytest.MonkeyPatch):
    def spoiled(*args, **kwargs):
        args[2].U["blocks.0.attn.v"].register_hook(lambda gradient: gradient * float("inf"))
        return original(*args, **kwargs)

    original = step_module.training_step
    monkeypatch.setattr(step_module, "training_step", spoiled)
    with pytest.raises(DivergedError, match=r"step 0: a gradient is not finite \(the gradient of U at blocks.0.attn.v\)"):
        decompose_config(tiny_with(), out=tmp_path / "run")


def test_a_gradient_of_what_all_sites_share_is_named(tmp_path, monkeypatch: pytest.MonkeyPatch):
    def spoiled(*args, **kwargs):
        args[3].trunk.up.register_hook(lambda gradient: gradient * float("nan"))
        return original(*args, **kwargs)

    original = step_module.training_step
    monkeypatch.setattr(step_module, "training_step", spoiled)
    with pytest.raises(DivergedError, match=r"step 0: a gradient is not finite \(the gradient of γ's up in the trunk\)"):
        decompose_config(tiny_with(gamma={"kind": "transformer", "width": 8, "heads": 2}), out=tmp_path / "run")


def test_non_finite_target_is_refused_before_anything_is_written(tmp_path):
    model = Toy()
    with torch.no_grad():
        model.second.bias.fill_(float("nan"))
    with pytest.raises(DivergedError, match="the target's logits on the first batch are not finite"):
        decompose(model, batches, out=tmp_path / "run", **TOY)
    assert not (tmp_path / "run").exists()


def test_wrong_input_replaces_nothing(tmp_path):
    decompose_config(tiny_with(), out=tmp_path / "run")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(decompose_module.RunDirError, match="exists; resume continues it"):
        decompose_config(tiny_with(), out=tmp_path / "run")
    with pytest.raises(SiteError, match="matches no weight matrix"):
        decompose_config(tiny_with(sites=["nope"]), out=tmp_path / "run", overwrite=True)
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


def test_batch_longer_than_the_table(tmp_path):
    with pytest.raises(BatchError, match=r"batch of 2 positions, but gamma.max_length is 1"):
        decompose(Toy(), batches, out=tmp_path / "run", **TOY | {"gamma": {"kind": "attention", "max_length": 1}})
    assert not (tmp_path / "run").exists()


def test_held_out_metrics_are_means_over_batches(tiny_run):
    config = tiny_run.config.model_copy(update={"evaluate": tiny_run.config.evaluate.model_copy(update={"batches": 3})})
    three = train.held_out(config, tiny_run.task, tiny_run.decomposition, tiny_run.importance)
    assert read_metrics(tiny_run.path)[-1]["evaluation"]["faithfulness"] == near(three["faithfulness"], rounding.TOY)
    assert 0 <= three["accuracy_masked"] <= 1
    singles = []
    for index in range(3):
        batch = tiny_run.task.batch(index, "evaluate")
        target, g = importances(tiny_run.decomposition, tiny_run.importance, batch)
        singles.append(evaluate(tiny_run.task, tiny_run.decomposition, batch, target, g, last_token_only=True, seed=config.seed)["recon"])
    assert three["recon"] == near(sum(singles) / 3, 8)
    assert len(set(singles)) == 3


def test_every_group_gets_its_own_rate(tiny_run):
    optim = {"name": "adamw", "lr": 1e-3, "gamma_lr": 1e-2, "betas": [0.8, 0.9], "weight_decay": 0.3}
    config = tiny_with(optim=optim, gamma={"kind": "attention", "d_gate": 3, "relative_lr": 5.0})
    importance = Importance({site.name: (site.d_seen, config.C) for site in tiny_run.decomposition.sites}, config.gamma, max_length=8)
    optimizer = train.make_optimizer(config, tiny_run.decomposition, importance)
    assert isinstance(optimizer, torch.optim.AdamW)
    assert [group["full_lr"] for group in optimizer.param_groups] == pytest.approx([1e-3, 1e-2, 5e-2])
    assert [len(group["params"]) for group in optimizer.param_groups] == [12, 8, 1]
    assert all((group["betas"], group["weight_decay"]) == ((0.8, 0.9), 0.3) for group in optimizer.param_groups)


def test_the_schedule_is_applied():
    """At a rate that a warm-up of a million steps keeps near zero, nothing moves."""
    still = decompose(Toy(), batches, optim={"warmup": 1e6}, **TOY)
    moved = decompose(Toy(), batches, **TOY)

    def distance(run) -> float:
        U, V = run.decomposition.U, run.decomposition.V
        return max((U[site.name] @ V[site.name] - site.W).abs().max().item() for site in run.decomposition.sites)

    assert distance(still) < 1e-6 < distance(moved)


def test_stacking_is_checked_before_anything_is_written(tmp_path):
    class PositionFirst(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            return self.layer(x.transpose(0, 1).reshape(-1, 4)).reshape(x.shape[1], x.shape[0], 4).transpose(0, 1)

    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.head(self.layer(x).mean(1))

    with pytest.raises(BatchError, match="plans stacked along the batch differ from single ones"):
        decompose(PositionFirst(), batches, out=tmp_path / "run", **TOY)
    with pytest.raises(SiteError, match=r"sites layer and head: inputs lead with \(5, 2\) and \(5,\)"):
        decompose(Pooled(), batches, out=tmp_path / "run", **TOY)
    assert not (tmp_path / "run").exists()


def test_fused_fast_paths_do_not_bypass_a_site():
    """nn.TransformerEncoderLayer at rest would otherwise never call its linears, and every reconstruction look perfect."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
    run = decompose(layer, batches, sites=["linear*"], **TOY | {"init": {"kind": "random"}, "C": 1})
    assert run.metrics[-1]["evaluation"]["recon"] > 1e-4


def test_linear_with_a_forward_of_its_own_is_refused():
    class Scaled(nn.Linear):
        def forward(self, x):
            return 3 * super().forward(x)

    with pytest.raises(SiteError, match="site 0: Scaled has a forward of its own"):
        decompose(nn.Sequential(Scaled(4, 3)), batches, **TOY)


@pytest.mark.parametrize("form", ["tensor", "mapping", "tuple"])
def test_a_model_that_can_unembeds_its_last_position_alone(form: str):
    """Masked runs under last_token_only ask a Hugging Face model for no other logits."""

    class Keeper(Toy):
        def __init__(self):
            super().__init__()
            self.kept = []

        def forward(self, input_ids, logits_to_keep=0):
            self.kept.append(logits_to_keep)
            return self.second(self.first(input_ids).relu())[:, -logits_to_keep:]

    model = Keeper()
    x = torch.randn(2, 5, 4)
    batch = {"tensor": x, "mapping": {"input_ids": x}, "tuple": (x,)}[form]
    run = decompose(model, [batch], sites="*", C=5, steps=2, last_token_only=True, gamma={"kind": "vector"}, losses={"recon": 1.0})
    assert run.status == "finished"
    assert 1 in model.kept
    assert 0 in model.kept, "the target itself runs whole"
