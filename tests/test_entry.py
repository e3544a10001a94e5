"""Models that people bring: each is decomposed rightly and comes back as it was, or is refused in one line that says why."""

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, spectral_norm
from torch.utils.checkpoint import checkpoint

from paramlens.analysis.circuit import circuit
from paramlens.errors import ParamLensError, SiteError
from paramlens.method.decomposition import Decomposition
from paramlens.method.entry import require_sound
from paramlens.method.generators import generator
from paramlens.method.masks import Replacement
from paramlens.method.modes import buffers_kept, default_modes
from paramlens.method.sites import at_rest, find_sites
from paramlens.runs.decompose import decompose
from paramlens.runs.integrity import model_sha256
from paramlens.runs.rundir import Run, open_run

BATCHES = [torch.randint(11, (4, 6), generator=generator("batch", i)) for i in range(3)]


class Toy(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, width)
        self.up, self.down = nn.Linear(width, 12), nn.Linear(12, width)
        self.head = nn.Linear(width, 11, bias=False)

    def inner(self, h: torch.Tensor) -> torch.Tensor:
        return self.down(torch.tanh(self.up(h)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.embed(x)
        return self.head(h + self.inner(h))


def run(model: nn.Module, out: Path, batches: object = BATCHES, **fields: object) -> Run:
    fields = {"C": 8, "steps": 2, "threads": 1, "gamma": {"kind": "vector", "d_gate": 2}} | fields
    return decompose(model, batches, out=out / "run", **fields)


def toy(forward: Callable[[Toy, torch.Tensor], torch.Tensor], **attributes: object) -> Toy:
    """A toy whose forward is another one."""
    model = type("Changed", (Toy,), {"forward": forward})()
    for name, value in attributes.items():
        setattr(model, name, value)
    return model


def counted(model: Toy, x: torch.Tensor) -> torch.Tensor:
    model.calls += 1
    model.replaced = model.replaced + 1
    return Toy.forward(model, x)


def with_buffers(forward: Callable[[Toy, torch.Tensor], torch.Tensor]) -> Toy:
    model = toy(forward)
    for name in ("calls", "replaced"):
        model.register_buffer(name, torch.zeros((), dtype=torch.long))
    return model


def late_buffer(model: Toy, x: torch.Tensor) -> torch.Tensor:
    if not hasattr(model, "mask"):
        model.register_buffer("mask", torch.ones(()))
    return Toy.forward(model, x) * model.mask


def writes_into_output(model: Toy, x: torch.Tensor) -> torch.Tensor:
    h = model.embed(x)
    y = model.down(torch.tanh(model.up(h)))
    y += h
    z = model.head(y)
    z *= 2
    return z


def writes_into_input(model: Toy, x: torch.Tensor) -> torch.Tensor:
    h = model.embed(x)
    h += model.inner(h)
    return model.head(h)


@pytest.mark.parametrize("forward", [writes_into_output, writes_into_input], ids=["output", "input"])
def test_residuals_added_in_place(tmp_path: Path, forward: Callable[[Toy, torch.Tensor], torch.Tensor]):
    """Sites' inputs are those that they read, not what the model has written there since."""
    model = toy(forward)
    plain = Toy()
    plain.load_state_dict(model.state_dict())
    inputs = [Decomposition(each, find_sites(each, ["up", "down"]), C=2).target_run(BATCHES[0]).inputs for each in (model, plain)]
    for name in inputs[1]:
        torch.testing.assert_close(inputs[0][name], inputs[1][name])
    found = run(model, tmp_path, steps=3)
    assert found.status == "finished"


def test_a_run_that_enters_late_is_right_where_a_block_writes_into_what_came_before():
    """Whichever block a plan enters at, and whatever a later one has made of what was handed on, it gives the logits of a whole run."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix = nn.Linear(8, 8)

        def forward(self, h: torch.Tensor) -> torch.Tensor:
            return h + self.mix(h)

    class Writes(Block):
        def forward(self, h: torch.Tensor) -> torch.Tensor:
            h += self.mix(h)
            return h + 0

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(11, 8)
            self.layers = nn.ModuleList([Block(), Block(), Block(), Writes(), Block(), Block()])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.embed(x)
            for layer in self.layers:
                h = layer(h)
            return h

    model = Model()
    decomposition = Decomposition(model, find_sites(model, ["*"]), C=2)
    with at_rest(model):
        decomposition.find_blocks(BATCHES[0])
        target = decomposition.target_run(BATCHES[0])
        plans = [{name: Replacement(torch.zeros(4, 6, 2))} for name in decomposition.names]
        torch.testing.assert_close(decomposition(BATCHES[0], plans, target), decomposition(BATCHES[0], plans))


@pytest.mark.parametrize("forward", [counted, late_buffer])
def test_buffers_that_count_come_back_and_the_run_opens(tmp_path: Path, forward: Callable[[Toy, torch.Tensor], torch.Tensor]):
    model = with_buffers(forward)
    before, kept = model_sha256(model), model.replaced
    found = run(model, tmp_path)
    assert model_sha256(model) == before
    assert model.replaced is kept
    assert not hasattr(model, "mask")
    assert open_run(found.path, model=model).step == 2
    run(model, tmp_path, resume=True)
    assert model_sha256(model) == before


def test_buffers_are_kept_bit_for_bit():
    model = nn.Module()
    model.register_buffer("odd", torch.tensor([float("nan"), 1.0]))
    model.register_buffer("none", None)
    odd = model.odd
    with pytest.raises(KeyboardInterrupt), buffers_kept(model):
        model.odd += 1
        model.odd = torch.zeros(3)
        model.none = torch.ones(1)
        raise KeyboardInterrupt
    assert model.odd is odd
    assert model.odd.isnan().tolist() == [True, False]
    assert model.odd[1] == 1
    assert model.none is None


AMBIENT = {
    "inference mode": torch.inference_mode,
    "no gradients": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "another device": lambda: torch.device("meta"),
}


@pytest.mark.parametrize("mode", AMBIENT)
def test_modes_around_a_run_change_nothing(tmp_path: Path, mode: str):
    """The same losses, and the same circuit, inside as outside."""
    torch.manual_seed(0)
    model = Toy()
    losses, active = [], []
    for name, around in (("outside", nullcontext), ("inside", AMBIENT[mode])):
        with around():
            found = run(model, tmp_path / name, batches=BATCHES)
            again = open_run(found.path, model=model, batches=BATCHES)
            active.append(circuit(again, batches=1, adversary=2).to_json()["metrics"])
        losses.append([line.get("losses") for line in found.metrics])
    assert losses[0] == losses[1]
    assert active[0] == active[1]


def test_modes_are_put_back():
    torch.set_default_dtype(torch.float64)
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16), torch.inference_mode():
            with default_modes():
                assert torch.get_default_dtype() == torch.float32
                assert not torch.is_inference_mode_enabled()
                assert not torch.is_autocast_enabled("cpu")
                assert not torch.is_grad_enabled()
            assert torch.is_inference_mode_enabled()
            assert torch.is_autocast_enabled("cpu")
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


class Lora(nn.Linear):
    """x @ W + bias and more, as a subclass."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + 0.1 * x.sum(-1, keepdim=True)


class Matmul(nn.Linear):
    """x @ W + bias in its own words, as FalconLinear."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight.T + self.bias


def patched(forward: Callable[[nn.Linear, torch.Tensor], torch.Tensor]) -> Toy:
    model = Toy()
    model.up.forward = lambda x: forward(model.up, x)
    return model


def replaced(layer: nn.Module) -> Toy:
    model = Toy()
    model.up = layer
    return model


def test_a_linear_in_other_words_is_taken(tmp_path: Path):
    assert run(replaced(Matmul(8, 12)), tmp_path / "a").status == "finished"
    model = patched(lambda layer, x: F.linear(x, layer.weight, layer.bias))
    own = model.up.forward
    assert run(model, tmp_path / "b").status == "finished"
    assert model.up.forward is own


def shared_twice() -> Toy:
    model = toy(lambda self, x: self.head(self.down(self.embed(x))))
    model.again = model.down
    return model


def tied_by_data() -> Toy:
    model = Toy()
    model.head.weight.data = model.embed.weight.data
    return model


def twice(model: Toy, x: torch.Tensor) -> torch.Tensor:
    return model.head(model.inner(model.inner(model.embed(x))))


def functional(model: Toy, x: torch.Tensor) -> torch.Tensor:
    h = torch.tanh(model.up(model.embed(x))) + F.linear(model.embed(x), model.up.weight)
    return model.head(model.down(h))


def changes_weight(model: Toy, x: torch.Tensor) -> torch.Tensor:
    model.up.weight.data.mul_(0.999)
    return Toy.forward(model, x)


def grows(model: Toy, x: torch.Tensor) -> torch.Tensor:
    model.seen.append(1)
    return Toy.forward(model, x) * len(model.seen)


def bfloat(model: Toy, x: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return Toy.forward(model, x)


def part_in_bfloat(model: Toy, x: torch.Tensor) -> torch.Tensor:
    h = model.embed(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        h = model.up(h)
    return model.head(model.down(torch.tanh(h.float())))


def deprecated(layer: Callable[[], nn.Module]) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return layer()


def experts(model: Toy, x: torch.Tensor) -> torch.Tensor:
    h = model.embed(x)
    some = (x > 5).flatten()
    flat = h.flatten(0, 1).clone()
    flat[some] = flat[some] + model.inner(flat[some])
    return model.head(flat.view_as(h))


def sequence_first(model: Toy, x: torch.Tensor) -> torch.Tensor:
    h = model.embed(x.T)
    return (model.head(h + model.inner(h))).transpose(0, 1)


def with_gradients_off(model: Toy, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return Toy.forward(model, x)


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "more than a linear": (lambda: replaced(Lora(8, 12)), r"site up: Lora has a forward of its own, not x @ W \+ bias; .*'!up'"),
    "patched on the instance": (
        lambda: patched(lambda layer, x: F.linear(x, layer.weight, layer.bias) + x.sum(-1, keepdim=True)),
        r"site up: Linear has a forward of its own, not x @ W \+ bias",
    ),
    "parametrized": (lambda: replaced(parametrizations.weight_norm(nn.Linear(8, 12))), r"site up: its weight is computed"),
    "pre-hook on the weight": (lambda: replaced(deprecated(lambda: spectral_norm(nn.Linear(8, 12)))), r"site up: its weight is computed"),
    "integers": (lambda: int_weights(), r"site up: its weight is not a plain matrix of floats \(Tensor of int8"),
    "half": (lambda: Toy().half(), r"dtype float32: site up is torch.float16; convert the model"),
    "bfloat": (lambda: Toy().bfloat16(), r"dtype float32: site up is torch.bfloat16; convert the model"),
    "shared module": (shared_twice, r"site down: its weight is tied \(down.weight = again.weight\)"),
    "tied by its memory": (tied_by_data, r"site head: its weight is tied \(embed.weight = head.weight\).*'!head'"),
    "called twice": (lambda: toy(twice), r"site up: the model calls it 2 times per run; .*'!up'"),
    "never called": (
        lambda: toy(lambda self, x: self.head(self.down(torch.tanh(F.linear(self.embed(x), self.up.weight))))),
        r"site up: the model calls it 0 times",
    ),
    "used elsewhere too": (lambda: toy(functional), r"site up: the model uses its weight outside the module as well"),
    "weight that changes": (lambda: toy(changes_weight), r"the model (changes its own weight up.weight|gives other logits)"),
    "dropout": (lambda: toy(lambda self, x: F.dropout(Toy.forward(self, x), 0.5)), r"logits for the same batch differ from run to run"),
    "a list that grows": (lambda: toy(grows, seen=[]), r"logits for the same batch differ from run to run"),
    "autocast inside": (lambda: toy(bfloat), r"site down: the model gives it bfloat16"),
    "autocast around one": (lambda: toy(part_in_bfloat), r"site up: the model calls it under torch.autocast"),
    "checkpoint": (
        lambda: toy(lambda self, x: self.head(checkpoint(self.inner, self.embed(x), use_reentrant=False))),
        r"site up: the model computes it again during the backward pass \(activation checkpointing\)",
    ),
    "old checkpoint": (
        lambda: toy(lambda self, x: self.head(checkpoint(self.inner, self.embed(x), use_reentrant=True))),
        r"site up: the model calls it with gradients off",
    ),
    "gradients off": (lambda: toy(with_gradients_off), r"site up: the model calls it with gradients off"),
    "detached": (
        lambda: toy(lambda self, x: self.head(self.embed(x) + self.inner(self.embed(x)).detach())),
        r"site up: the logits of the first batch do not depend on its output",
    ),
    "unused": (
        lambda: toy(lambda self, x: (self.inner(self.embed(x)), self.head(self.embed(x)))[1]),
        r"site up: the logits .* do not depend",
    ),
    "one logit": (lambda: toy(lambda self, x: Toy.forward(self, x)[..., :1]), r"\(4, 6, 1\) is one number, and softmax over one number"),
    "no axis of tokens": (lambda: squeezed(), r"output \(4, 6\) has no axis of classes or tokens"),
    "one number a row": (lambda: toy(lambda self, x: Toy.forward(self, x).sum((1, 2))), r"output \(4,\) has no axis of classes or tokens"),
    "token ids": (lambda: toy(lambda self, x: Toy.forward(self, x).argmax(-1)), r"returned int64 \(4, 6\); logits must be floating point"),
    "not finite": (lambda: toy(lambda self, x: Toy.forward(self, x) / 0), r"logits on the first batch are not finite"),
    "experts": (lambda: toy(experts), r"site up: is given \(\d+, 8\), while the batch has 4 rows: it sees some of the positions"),
    "positions first": (lambda: toy(sequence_first), r"site up: is given \(6, 4, 8\), .*batch_first=True"),
    "fails": (lambda: toy(lambda self, x: self.head(x)), r"the model fails on the first batch \(RuntimeError: "),
    "compiled": (lambda: torch.compile(Toy(), backend="eager"), r"model: compiled by torch.compile"),
    "a compiled part": (lambda: replaced(torch.compile(nn.Linear(8, 12), backend="eager")), r"model.up: compiled by torch.compile"),
    "lazy": (lambda: replaced(deprecated(lambda: nn.LazyLinear(12))), r"model.up.weight: has no shape yet \(a lazy module\)"),
    "traced": (lambda: deprecated(lambda: torch.jit.trace(Toy(), BATCHES[0])), r"model: made by torch.jit"),
    "scripted": (lambda: deprecated(lambda: torch.jit.script(nn.Sequential(nn.Linear(2, 2)))), r"model: made by torch.jit"),
    "data parallel": (lambda: nn.DataParallel(Toy()), r"model: wrapped in DataParallel.*; give model.module"),
    "meta": (lambda: Toy().to("meta"), r"model.embed.weight: is on the meta device"),
    "half on meta": (lambda: replaced(nn.Linear(8, 12, device="meta")), r"model.up.weight: is on the meta device"),
    "inference tensors": (lambda: made_for_inference(), r"model.embed.weight: was made under torch.inference_mode"),
}


def int_weights() -> Toy:
    model = Toy()
    model.up.weight = nn.Parameter(torch.zeros(12, 8, dtype=torch.int8), requires_grad=False)
    return model


def made_for_inference() -> Toy:
    with torch.inference_mode():
        return Toy()


def squeezed() -> Toy:
    model = toy(lambda self, x: self.score(self.embed(x) + self.inner(self.embed(x))).squeeze(-1))
    model.score = nn.Linear(8, 1)
    del model.head
    return model


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_decomposed_is_refused_in_one_line(tmp_path: Path, name: str):
    torch.manual_seed(0)
    make, message = REFUSED[name]
    model = make()
    with pytest.raises(ParamLensError, match=message) as refused:
        run(model, tmp_path)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "run" / "run.json").exists()
    if isinstance(model, Toy):
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules() if module is not model.up)
        assert all(parameter.requires_grad for parameter in model.parameters() if parameter.is_floating_point())


def test_what_is_refused_is_left_out(tmp_path: Path):
    """Each of these is one site of several: without it the rest is decomposed."""
    for name, sites in {
        "tied by its memory": ["*", "!head"],
        "used elsewhere too": ["*", "!up"],
        "more than a linear": ["*", "!up"],
    }.items():
        torch.manual_seed(0)
        found = run(REFUSED[name][0](), tmp_path / name, sites=sites)
        assert sites[1][1:] not in found.decomposition.names


def test_checkpointing_of_transformers_is_off_where_nothing_is_trained(tmp_path: Path):
    from architectures import config, random_model

    model = random_model(config("llama"))
    (getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable)()
    model.train()
    found = run(model, tmp_path, sites=["*.mlp.*"])
    assert found.status == "finished"
    assert model.training


def test_mixed_flags_and_hooks_come_back(tmp_path: Path):
    model = Toy()
    model.up.weight.requires_grad_(False)
    fired: list[int] = []
    model.up.register_forward_hook(lambda *_: fired.append(1))
    run(model, tmp_path)
    assert [parameter.requires_grad for parameter in model.parameters()] == [True, False, True, True, True, True]
    assert len(model.up._forward_hooks) == 1
    assert fired


class Flat(Toy):
    """OPT's way: what the inner layers are given is all positions of all sequences in a row."""

    def inner(self, h: torch.Tensor) -> torch.Tensor:
        return super().inner(h.reshape(-1, h.shape[-1])).view_as(h)


def test_flattened_positions_are_the_positions_that_they_are():
    torch.manual_seed(0)
    flat, plain = Flat(), Toy()
    plain.load_state_dict(flat.state_dict())
    results = []
    for model in (flat, plain):
        decomposition = Decomposition(model, find_sites(model, ["*"]), C=3)
        with torch.no_grad():
            for value, other in zip(decomposition.parameters(), range(99), strict=False):
                value.copy_(torch.randn(value.shape, generator=generator("start", other)))
        with at_rest(model):
            target = require_sound(decomposition, BATCHES[0])
            g = {name: torch.rand(4, 6, 3, generator=generator(name), requires_grad=True) for name in decomposition.names}
            plans = [{name: Replacement(value, key=3) for name, value in g.items()}, {"up": Replacement(g["up"])}, {}]
            logits = decomposition(BATCHES[0], plans, target)
            gradients = torch.autograd.grad(logits.square().sum(), [*g.values(), *decomposition.parameters()])
            given = decomposition.masked_inputs(BATCHES[0], plans[0])
        results.append([*target.inputs.values(), *given.values(), logits.detach(), *gradients])
    for mine, other in zip(*results, strict=True):
        torch.testing.assert_close(mine, other)


def test_transformer_encoder(tmp_path: Path):
    """Its attention uses its output's weight without calling that module: a site as well. With the batch second, that is said."""

    def make(*, batch_first: bool) -> nn.Module:
        layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=batch_first)
        encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=batch_first)
        return nn.Sequential(nn.Embedding(11, 8), encoder, nn.Linear(8, 11))

    assert len(run(make(batch_first=True), tmp_path).decomposition.names) == 7
    with pytest.raises(ParamLensError, match=r"plans stacked along the batch|batch_first"):
        run(make(batch_first=False), tmp_path / "second")


def test_names_with_brackets_are_names_when_a_run_is_opened(tmp_path: Path):
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(11, 8)
            self.each = nn.ModuleDict({"w[0]": nn.Linear(8, 8), "w0": nn.Linear(8, 8), "w*": nn.Linear(8, 8), "!w": nn.Linear(8, 8)})
            self.head = nn.Linear(8, 11)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.embed(x)
            for layer in self.each.values():
                h = h + torch.tanh(layer(h))
            return self.head(h)

    found = run(Model(), tmp_path)
    assert found.decomposition.names == ("each.w[0]", "each.w0", "each.w*", "each.!w", "head")
    model = Model()
    assert [site.name for site in find_sites(model, ["each.w[0]"])] == ["each.w[0]"]
    assert [site.name for site in find_sites(model, ["each.w*"])] == ["each.w*"]
    assert [site.name for site in find_sites(model, ["each.?[[]0]", "head"])] == ["each.w[0]", "head"]


def test_patterns_that_exclude():
    model = Toy()

    def names(*patterns: str) -> list[str]:
        return [site.name for site in find_sites(model, patterns)]

    assert names("*", "!head") == ["up", "down"]
    assert names("!head", "*") == ["up", "down"]
    for patterns, message in {
        ("!head",): r"sites !head: nothing but exclusions; name what to take as well, as in '\*' '!head'",
        ("up", "!up"): r"nothing is left after the exclusions",
        ("*", "!haed"): r"sites 'haed' matches no weight matrix; did you mean head\?",
    }.items():
        with pytest.raises(SiteError, match=message):
            names(*patterns)


def test_slices_that_are_not_known_are_said_to_be_so():
    model = nn.ModuleDict({"attn": nn.ModuleDict({"qkv": nn.Linear(8, 24)})})
    for pattern in ("attn.qkv[q]", "*.qkv[qv]", "attn.qkv[*]"):
        with pytest.raises(SiteError, match=r"slices are not available of attn.qkv, as it is not known .*; give '.*qkv' for the whole"):
            find_sites(model, [pattern])
