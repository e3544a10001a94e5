import warnings

import pytest
import torch

from paramlens.config.file import make_config
from paramlens.errors import BatchError, ConfigError
from paramlens.kernels.flex import flex_by_offset
from paramlens.method.generators import generator
from paramlens.method.importance import attention
from paramlens.method.importance.network import Importance
from paramlens.method.importance.settings import KINDS, Gamma
from paramlens.method.importance.sigmoids import lower
from rounding import TOY_STEP, assert_near, near

SHAPES = {"a": (4, 5), "b": (6, 5), "c": (4, 5)}


def make(max_length: int | None = 8, **fields: object) -> Importance:
    importance = Importance(SHAPES, Gamma(d_gate=3, **fields), max_length=max_length)
    importance.initialise(generator(0))
    return importance


def inputs(n: int = 8) -> dict[str, torch.Tensor]:
    return {name: torch.randn(2, n, d, generator=generator(name)) for name, (d, _) in SHAPES.items()}


U = {name: torch.randn(d, C, generator=generator("U", name)) for name, (d, C) in SHAPES.items()}


def test_same_shapes_share_a_group_and_order_is_kept():
    importance = make(kind="vector")
    assert [group.names for group in importance.groups] == [("a", "c"), ("b",)]
    assert list(importance(inputs(), U)) == ["a", "b", "c"]


@pytest.mark.parametrize("kind", KINDS)
def test_shapes_and_independence_of_sites(kind: str):
    """A site's importance is a function of that site's parameters, and but for the transformer of its input, alone."""
    importance, x = make(kind=kind), inputs()
    pre = importance(x, U)
    assert all(value.shape == (2, 8, 5) for value in pre.values())
    (gradient,) = torch.autograd.grad(pre["a"].square().sum(), importance.groups[0].w_out)
    assert gradient[0].abs().sum() > 0
    assert gradient[1].abs().sum() == 0
    for other in ("b", "c"):
        changed = importance(x | {other: x[other] + 1.0}, U)
        assert changed["a"].equal(pre["a"]) is (kind != "transformer")


@pytest.mark.parametrize(
    ("kind", "sees"), [("vector", False), ("scalar", False), ("attention", True), ("attention_shared", True), ("transformer", True)]
)
def test_only_attention_sees_other_positions(kind: str, sees: bool):
    importance, x = make(kind=kind), inputs()
    changed = x | {"a": x["a"].clone()}
    changed["a"][:, 2] += 1.0
    difference = (importance(x, U)["a"] - importance(changed, U)["a"]).abs().amax((0, 2))
    assert difference[2] > 0
    assert bool((difference[[0, 1, 3, 4, 5, 6, 7]] > 0).all()) is sees


def test_attention_is_bidirectional_and_knows_positions():
    importance = make(kind="attention")
    same = {name: torch.ones(1, 8, d) for name, (d, _) in SHAPES.items()}
    pre = importance(same, U)["a"][0]
    assert not torch.allclose(pre[0], pre[5]), "equal tokens at different positions differ"


@pytest.mark.parametrize("relative", ["offset", "query"])
def test_positions_beyond_the_tables_share_their_last_entries(relative):
    importance = make(kind="attention", max_length=8, relative=relative)
    assert importance(inputs(3), U)["b"].shape == (2, 3, 5)
    spelled_out = make(kind="attention", max_length=20, relative=relative)
    offsets = (torch.arange(40) - 20).clamp(-7, 7) + 8
    with torch.no_grad():
        for short, long in zip(importance.parameters(), spelled_out.parameters(), strict=True):
            if long.shape[1:2] == (20,):
                long.copy_(short[:, torch.arange(20).clamp(max=7)])
            else:
                long.copy_(short[:, offsets] if long.shape[1:2] == (40,) else short)
    for name, pre in importance(inputs(20), U).items():
        torch.testing.assert_close(pre, spelled_out(inputs(20), U)[name])


def test_a_length_that_was_given_is_a_bound():
    importance = Importance(SHAPES, Gamma(d_gate=3, max_length=8))
    assert importance(inputs(8), U)["b"].shape == (2, 8, 5)
    with pytest.raises(BatchError, match=r"batch of 9 positions, but gamma.max_length is 8; give gamma.max_length 9"):
        importance(inputs(9), U)


def test_attention_needs_a_length_and_a_position_axis():
    with pytest.raises(ConfigError, match=r"gamma\.max_length"):
        make(max_length=None, kind="attention")
    with pytest.raises(
        BatchError,
        match=r"site a: the attention γ needs inputs \(batch, pos, d_in\), but these have the leading axes \(3,\); use gamma.kind vector",
    ):
        make(kind="attention")({name: torch.ones(3, d) for name, (d, _) in SHAPES.items()}, U)


def test_the_transformer_needs_a_position_axis_and_one_batch_at_all_sites():
    importance, x = make(kind="transformer"), inputs()
    with pytest.raises(
        BatchError,
        match=r"site a: the transformer γ needs inputs \(batch, pos, d_in\), but these have the leading axes \(3,\); use gamma.kind vector",
    ):
        importance({name: torch.ones(3, d) for name, (d, _) in SHAPES.items()}, U)
    with pytest.raises(
        BatchError,
        match=r"site b: the transformer γ needs inputs \(batch, pos, d_in\) with one \(batch, pos\) at all sites, but these have the "
        r"leading axes \(2, 7\), those of a \(2, 8\); use gamma.kind vector",
    ):
        importance(x | {"b": x["b"][:, 1:]}, U)
    with pytest.raises(BatchError, match=r"site b: its input has the leading axes \(2, 7\), the padding mask \(2, 8\)"):
        importance(x | {"b": x["b"][:, 1:]}, U, torch.ones(2, 8, dtype=torch.bool))


@pytest.mark.parametrize("scale", [0.0, 1e-3, 1e3])
def test_the_transformer_reads_directions(scale: float):
    """What γ reads does not grow with a site's input; an input of 0 is as good as any."""
    importance, x = make(kind="transformer"), inputs()
    for name, pre in importance(x | {"b": scale * x["b"]}, U).items():
        assert pre.isfinite().all()
        if scale == 1e3:
            torch.testing.assert_close(pre, importance(x, U)[name], rtol=0, atol=1e-3)  # but for what is added to the mean square


def test_scalar_gradient_reaches_u():
    importance = make(kind="scalar")
    reads = {name: value.clone().requires_grad_() for name, value in U.items()}
    importance(inputs(), reads)["a"].sum().backward()
    assert reads["a"].grad.abs().sum() > 0


def test_starts():
    on = make(kind="vector", output_bias=1.0)
    assert torch.equal(on.groups[0].b_out, torch.ones(2, 5))
    assert on.groups[0].b_in.abs().sum() == 0
    local = make(kind="attention", relative_init="local").groups[0].relative.mean(0)
    assert local[8] > local[4] > local[0], "nearer offsets start higher"
    wide = Importance({"a": (400, 5)}, Gamma(kind="vector", d_gate=50), max_length=None)
    wide.initialise(generator(0))
    assert wide.groups[0].w_in.std().item() == pytest.approx(400**-0.5, rel=0.02)
    assert wide.groups[0].w_out.std().item() == pytest.approx(50**-0.5, rel=0.15)


@pytest.mark.parametrize("relative", ["offset", "query"])
@pytest.mark.parametrize("kind", KINDS)
def test_removing_subcomponents_is_slicing_every_parameter_along_its_axis(kind, relative):
    """What is kept has the pre-activations that it had: each parameter says along which axis subcomponents lie, or that they share it."""
    whole, kept = make(kind=kind, relative=relative), [0, 2, 3]
    smaller = Importance({name: (d_in, len(kept)) for name, (d_in, _) in SHAPES.items()}, whole.gamma, max_length=8)
    with torch.no_grad():
        for before, after in zip(whole.groups, smaller.groups, strict=True):
            for name, parameter in before.named_parameters():
                axis = before.declared[name].C_axis
                sliced = parameter if axis is None else parameter.index_select(1 + axis, torch.tensor(kept))
                after.get_parameter(name).copy_(sliced)
        if whole.trunk is not None:
            smaller.trunk.load_state_dict(whole.trunk.state_dict())
    ours = smaller(inputs(), {name: value[:, kept] for name, value in U.items()})
    for name, pre in whole(inputs(), U).items():
        assert_near(ours[name], pre[..., kept], TOY_STEP, size=16)  # sums of a dozen products of normal numbers


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_are_as_they_declare(kind):
    importance = make(kind=kind)
    group = importance.groups[0]
    assert {name: tuple(value.shape) for name, value in group.named_parameters()} == {
        name: (2, *declared.sizes(5)) for name, declared in group.declared.items()
    }
    assert sum(declared.count(5) for declared in group.declared.values()) * 2 == sum(value.numel() for value in group.parameters())
    assert [name for name, declared in group.declared.items() if declared.lr_factor is not None] == ["relative"] * kind.startswith(
        "attention"
    )


def test_names_in_the_file():
    """A site's parameters begin with its name; what all sites share begins with a dot, as no module's name does."""
    importance = make(kind="transformer", layers=3)
    named = importance.named_values()
    assert {name for name in named if not name.startswith(".")} == {f"{site}.{key}" for site in SHAPES for key in ("w_out", "b_out")}
    assert {name.removeprefix(".trunk.") for name in named if name.startswith(".")} == set(importance.trunk.declared)
    assert named[".trunk.w_in"].shape == (4 + 6 + 4, 64)
    assert named[".trunk.up"].shape == (3, 64, 256)
    assert sum(value.numel() for value in named.values()) == sum(value.numel() for value in importance.parameters())
    assert all("." in name and not name.startswith(".") for name in make(kind="attention").named_values())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "vector", "width": 32}, "width 32: only for kind transformer, not vector; leave it out"),
        ({"layers": 3, "heads": 2}, "layers 3, heads 2: only for kind transformer, not attention; leave it out"),
        ({"kind": "transformer", "heads": 3}, "width 64 must be a multiple of 6, twice heads 3: rotary position encodings turn pairs"),
        ({"kind": "transformer", "layers": 0}, "layers"),
    ],
)
def test_sizes_without_effect_or_sense_are_refused(fields: dict[str, object], message: str):
    with pytest.raises(ConfigError, match=message):
        make_config({"gamma": fields})
    assert make_config({"gamma": {"kind": "vector", "width": 64, "layers": 2, "heads": 4}}).gamma.width == 64, "as config.yaml has them"


def test_site_parameters_are_views():
    importance = make(kind="vector")
    with torch.no_grad():
        importance.site_parameters()["c"]["b_out"].fill_(7.0)
    assert importance.groups[0].b_out[1].tolist() == [7.0] * 5
    assert importance.groups[0].b_out[0].tolist() == [0.0] * 5


def test_dead_importance_is_revived_only_by_reconstruction():
    pre = torch.full((1, 1, 2), -0.5, requires_grad=True)
    g = lower(pre)
    (-(g[..., 0]) + g[..., 1]).sum().backward()
    assert pre.grad.flatten().tolist() == near([-0.01, 0.0], 1)


def test_long_sequences_go_one_by_one_and_give_the_same(monkeypatch: pytest.MonkeyPatch):
    importance, x = make(kind="attention"), inputs()
    weights = {name: torch.randn(2, 8, 5, generator=generator("w", name)) for name in SHAPES}

    def values_and_gradients():
        pre = importance(x, U)
        total = sum((weights[name] * pre[name]).sum() for name in SHAPES)
        return [*pre.values(), *torch.autograd.grad(total, importance.parameters())]

    whole = values_and_gradients()
    monkeypatch.setattr(attention, "SCORES", 100)
    for mine, other in zip(values_and_gradients(), whole, strict=True):
        assert_near(mine, other, TOY_STEP)


def test_flex_attention_is_the_same_attention():
    """Forward only: PyTorch has no gradient of flex attention on a CPU."""
    n, d, sites = 6, 16, 3
    q, k, v = (torch.randn(sites, 2, n, d, generator=generator("flex", i)) for i in range(3))
    relative = torch.randn(sites, 2 * 8, generator=generator("relative"))
    place = torch.arange(n)
    r = relative[:, place[None] - place[:, None] + 8]
    scores = (q @ k.mT + r[:, None]) / d**0.5
    expected = scores.softmax(-1) @ v
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that flex attention is slow uncompiled
        ours = flex_by_offset(q, k, v, relative, compiled=False)
    assert_near(ours, expected, 16 + 8 + 12, size=v.abs().max().item() * (1 + scores.abs().max().item()))
