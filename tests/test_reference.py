"""The library equals the slow transcription in tests/reference.py: values and gradients, every γ kind, every loss."""

import pytest
import torch

import reference
from conftest import TINY, tiny_with
from paramlens.kernels import mlps, native
from paramlens.method.decomposition import Decomposition, call
from paramlens.method.generators import generator
from paramlens.method.hooks import swapped_in
from paramlens.method.importance.network import Importance
from paramlens.method.importance.settings import Gamma
from paramlens.method.importance.sigmoids import lower, upper
from paramlens.method.losses.faithfulness import faithfulness
from paramlens.method.losses.minimality import minimality
from paramlens.method.losses.reconstruction import RECONSTRUCTIONS
from paramlens.method.masks import Replacement, mask_noise
from paramlens.method.settings import Adversary, Init
from paramlens.method.sites import at_rest, find_sites
from paramlens.method.sources import fresh_sources, sources_of
from paramlens.method.start import initialise
from paramlens.method.step import training_step
from paramlens.tasks.induction.model import InductionTransformer
from paramlens.tasks.induction.sequences import induction_task
from rounding import TOY, TOY_STEP, assert_near, bound, near

RELATIVE = {torch.float32: bound(TOY_STEP, 1), torch.float64: 1e5 * bound(TOY_STEP, 1, torch.float64)}
"""Of the sum of the sizes of what is added up. Double precision is held to half of its digits more than single, and leaves room for the
condition of g^p, whose slope near g = 0 magnifies what g lost."""
KINDS = [
    ("scalar", "offset"),
    ("vector", "offset"),
    ("attention", "offset"),
    ("attention", "query"),
    ("shared", "offset"),
    ("attention_shared", "offset"),
    ("transformer", "offset"),
]
SMALL = {"transformer": {"width": 8, "heads": 2}}
"""Sizes of a γ kind, for its loops."""


def relative_error(ours: torch.Tensor, theirs: torch.Tensor, size: float | None = None) -> float:
    """Length of the difference over that of `theirs`, or over `size`, the sum of the lengths of what was added up to it."""
    length = theirs.double().norm().clamp(min=1e-30).item() if size is None else size
    return (ours.double() - theirs.double()).norm().item() / length


def make(kind: str, relative: str, dtype: torch.dtype, *, C: int = TINY["C"], delta: bool = False, **losses: float):
    """A decomposition of a tiny target with every subcomponent's γ spread around both kinks."""
    config = tiny_with(
        gamma={"kind": kind, "d_gate": 3, "relative": relative} | SMALL.get(kind, {}),
        losses=losses or {"recon": 1.0},
        dtype=str(dtype).removeprefix("torch."),
        last_token_only=False,
        C=C,
        delta=delta,
    )
    torch.manual_seed(1)
    model = InductionTransformer(config.task).to(dtype)
    sites = find_sites(model, config.sites)
    decomposition = Decomposition(model, sites, C=C, dtype=dtype, delta=delta)
    initialise(decomposition, Init(kind="random"), generator=generator("test"))
    importance = Importance({site.name: (site.d_seen, config.C) for site in sites}, config.gamma, max_length=config.task.length).to(dtype)
    importance.initialise(generator("γ"))
    with torch.no_grad():
        for parameter in importance.parameters():
            parameter.add_(0.5 * torch.randn(parameter.shape, generator=generator("noise", *parameter.shape), dtype=dtype))
    task = induction_task(config.task, model, seed=0, batch=3)
    return config, task, decomposition, importance


def reference_pre(config, decomposition, importance, inputs):
    parameters = importance.site_parameters()
    if config.gamma.kind == "transformer":
        seen = {name: inputs[name] for name in decomposition.names}
        return reference.transformer(seen, dict(importance.trunk.named_parameters()), parameters, config.gamma.heads)
    return {
        name: reference.gamma(
            config.gamma.kind, config.gamma.relative, inputs[name], decomposition.U[name], parameters[name], config.task.length
        )
        for name in decomposition.names
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("kind", "relative"), KINDS)
def test_gamma(kind: str, relative: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(native, "cached_numbers", lambda: 100)  # several uneven chunks
    monkeypatch.setattr(native, "MIN_NUMBERS", 100)
    monkeypatch.setattr(mlps, "MIN_CHUNK", 5)
    monkeypatch.setattr(mlps, "WHOLE", 1)
    config, task, decomposition, importance = make(kind, relative, dtype)
    target = decomposition.target_run(task.batch(0, "train").inputs)
    ours = importance(target.inputs, decomposition.U)
    theirs = reference_pre(config, decomposition, importance, target.inputs)
    parameters = [*importance.parameters(), *([decomposition.U[name] for name in decomposition.names] if kind == "scalar" else [])]
    weights = {name: torch.randn(value.shape, generator=generator(name), dtype=dtype) for name, value in ours.items()}
    gradients = [torch.autograd.grad(sum((weights[name] * pre[name]).sum() for name in weights), parameters) for pre in (ours, theirs)]
    for name in ours:
        assert relative_error(ours[name], theirs[name]) < RELATIVE[dtype]
    for mine, other in zip(*gradients, strict=True):
        assert relative_error(mine, other) < RELATIVE[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("padded", [False, True])
def test_transformer_of_sites_of_two_shapes(padded: bool, dtype: torch.dtype):
    """One trunk over sites of different d_in and C, in the order of the sites and not of the shapes; padding is seen by nobody."""
    shapes = {"a": (4, 5), "b": (6, 3), "c": (4, 5)}
    importance = Importance(shapes, Gamma(kind="transformer", width=8, heads=2, layers=2, output_bias=0.3)).to(dtype)
    importance.initialise(generator("γ"))
    inputs = {name: torch.randn(2, 7, d_in, generator=generator(name), dtype=dtype) for name, (d_in, _) in shapes.items()}
    U = {name: torch.zeros(shape, dtype=dtype) for name, shape in shapes.items()}
    present = torch.tensor([[True] * 7, [False] * 2 + [True] * 4 + [False]]) if padded else None
    ours = importance(inputs, U, present)
    theirs = reference.transformer(inputs, dict(importance.trunk.named_parameters()), importance.site_parameters(), 2, present)
    if padded:
        theirs = {name: value * present[..., None] for name, value in theirs.items()}
    weights = {name: torch.randn(value.shape, generator=generator("w", name), dtype=dtype) for name, value in ours.items()}
    gradients = [
        torch.autograd.grad(sum((weights[name] * pre[name]).sum() for name in weights), list(importance.parameters()))
        for pre in (ours, theirs)
    ]
    for name in ours:
        assert relative_error(ours[name], theirs[name]) < RELATIVE[dtype]
    for mine, other in zip(*gradients, strict=True):
        assert relative_error(mine, other) < RELATIVE[dtype]


@pytest.mark.parametrize(("ours", "theirs"), [(lower, reference.lower), (upper, reference.upper)])
def test_sigmoid_pair(ours, theirs):
    pre = torch.tensor([-2.0, -0.3, 0.0, 1e-9, 0.4, 1.0, 1.2, 5.0], dtype=torch.float64).repeat(2, 1).requires_grad_()
    slope = torch.stack([torch.linspace(0.5, 1.5, 8), -torch.linspace(0.5, 1.5, 8)]).double()
    results = [(function(pre), torch.autograd.grad((slope * function(pre)).sum(), pre)[0]) for function in (ours, theirs)]
    for mine, other in zip(*results, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=0)


def test_sigmoid_pair_by_hand():
    pre = torch.tensor([-1.0, 0.5, 3.0], requires_grad=True)
    assert lower(pre).tolist() == [0.0, 0.5, 1.0]
    assert upper(pre).tolist() == near([0.0, 0.5, 1.02], 4)
    (raising,) = torch.autograd.grad(lower(pre).sum() * -1, pre)  # descent would raise g
    (lowering,) = torch.autograd.grad(lower(pre).sum(), pre)
    assert raising.tolist() == near([-0.01, -1.0, 0.0], 1)
    assert lowering.tolist() == near([0.0, 1.0, 0.0], 1)
    (minimal,) = torch.autograd.grad(upper(pre).sum(), pre)
    assert minimal.tolist() == near([0.0, 1.0, 0.01], 1)


def reference_masks(name, g, config, step):
    """The masks of a loss, from the same random numbers in the same order, and the plans they make: site → its mask and Δ's."""
    rng = generator(config.seed, "masks", name, step)
    kind = RECONSTRUCTIONS[name]
    plans = []
    for _ in range(config.losses.samples if kind.mask == "stochastic" else 1):
        masks = {site: (value, None) for site, value in g.items()}
        if kind.mask == "stochastic":
            keys = torch.randint(2**31, (len(g),), generator=rng).tolist()
            noise = {site: mask_noise(key, g[site].detach()) for site, key in zip(g, keys, strict=True)}
            keys = torch.randint(2**31, (len(g),), generator=rng).tolist() if config.delta else [None] * len(g)
            remainders = {
                site: None if key is None else mask_noise(key, g[site].detach()[..., 0]) for site, key in zip(g, keys, strict=True)
            }
            masks = {site: (value + (1 - value) * noise[site], remainders[site]) for site, value in g.items()}
        if kind.sites == "all":
            plans.append(masks)
        elif kind.sites == "each":
            plans += [{site: mask} for site, mask in masks.items()]
        else:
            k = int(torch.randint(1, len(masks) + 1, (), generator=rng))
            keys = torch.rand(len(masks), generator=rng)
            chosen = set(keys.argsort()[:k].tolist())
            plans.append({site: mask for i, (site, mask) in enumerate(masks.items()) if i in chosen})
    return plans


@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=pytest.mark.slow), torch.float64])
@pytest.mark.parametrize("last_token_only", [False, True])
@pytest.mark.parametrize("name", [*RECONSTRUCTIONS, "all together"])
def test_step(name: str, last_token_only: bool, dtype: torch.dtype):
    """Losses, total and the gradients of U, V and γ of a whole step, against one pass per plan."""
    names = tuple(RECONSTRUCTIONS) if name == "all together" else (name,)
    coefficients = {loss: 0.3 + i for i, loss in enumerate(names)} | {
        "faithfulness": 10.0,
        "minimality": 0.1,
        "p_start": 0.9,
        "p_final": 0.1,
    }
    check_step("attention", "offset", dtype, coefficients | {"samples": 2}, last_token_only)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("kind", "relative"), KINDS)
def test_step_of_every_gamma(kind: str, relative: str, dtype: torch.dtype):
    losses = {"stochastic_recon": 1.0, "stochastic_recon_layerwise": 1.0, "recon": 0.5, "faithfulness": 10.0, "minimality": 0.1}
    check_step(kind, relative, dtype, losses, last_token_only=False)


@pytest.mark.parametrize("last_token_only", [False, True])
def test_step_with_the_remainder(last_token_only: bool):
    """Δ is a component of its own in stochastic losses, also with fewer subcomponents than W's rank of 4."""
    losses = {loss: 0.3 + i for i, loss in enumerate(RECONSTRUCTIONS)} | {"minimality": 0.1}
    check_step("attention", "offset", torch.float64, losses, last_token_only, C=3, delta=True)


@pytest.mark.parametrize(("delta", "kind"), [(False, "fresh"), (True, "fresh"), (True, "persistent")])
def test_the_adversary(delta: bool, kind: str):
    """Sources of each group of rows, the ascent, the loss at its end with the gradients of U, V and γ, and what persistent sources keep."""
    losses = {"adversarial": 1.0, "recon": 0.5}
    config, task, decomposition, importance = make("vector", "offset", torch.float64, C=3, delta=delta, **losses)
    config = config.model_copy(update={"adversary": Adversary(sources=kind, start=0.2, groups=2, ascents=3, step_size=0.3)})
    batch, step = task.batch(0, "train"), 7
    parameters = [*decomposition.parameters(), *importance.parameters()]
    with at_rest(task.model):
        with torch.no_grad():
            assert "adversarial" not in training_step(config, task, decomposition, importance, batch, 1).losses
        persistent = sources_of(config.adversary)
        ours = training_step(config, task, decomposition, importance, batch, step, sources=persistent)
        our_gradients = [parameter.grad for parameter in parameters]
        target = decomposition.target_run(batch.inputs)
        pre = reference_pre(config, decomposition, importance, target.inputs)
        g = {site: reference.lower(value) for site, value in pre.items()}
        fixed = {site: value.detach() for site, value in g.items()}

        def run(masks):
            forwards = {}
            for site in decomposition.sites:
                mask, m = masks[site.name]
                U, V = decomposition.U[site.name], decomposition.V[site.name]
                forwards[site.module] = lambda x, s=site, U=U, V=V, mask=mask, m=m: reference.masked_site(
                    x, U, V, mask, s.bias, None if m is None else (s.W, m)
                )
            with swapped_in(forwards):
                return reference.kl(target.logits, call(task.model, batch.inputs), last_token_only=False)

        def attacked(g, sources):
            masks = {}
            for site, value in g.items():
                rows = [sources[site][row * 2 // 3] for row in range(3)]  # three rows, two groups
                mask = torch.stack([row_g + (1 - row_g) * s[:3] for row_g, s in zip(value, rows, strict=True)])
                masks[site] = mask, torch.stack([s[3].expand(value.shape[1]) for s in rows]) if delta else None
            return run(masks)

        sources = fresh_sources(fixed, groups=2, delta=delta, generator=generator(config.seed, "masks", "adversarial", step))
        for _ in range(3):
            sources = {site: value.requires_grad_() for site, value in sources.items()}
            slopes = torch.autograd.grad(attacked(fixed, sources), sources.values())
            sources = {
                site: (value + 0.3 * slope.sign()).clamp(0, 1).detach()
                for (site, value), slope in zip(sources.items(), slopes, strict=True)
            }
        sources = {site: value.requires_grad_() for site, value in sources.items()}
        value = attacked(g, sources)
        recon = run({site: (mask, None) for site, mask in g.items()})
    assert relative_error(ours.losses["adversarial"], value) < RELATIVE[torch.float64]
    assert persistent.kept.keys() == ({} if kind == "fresh" else sources).keys()
    for slope, (site, kept) in zip(torch.autograd.grad(value, sources.values(), retain_graph=True), persistent.kept.items(), strict=False):
        clear = slope.abs() > 1e-9  # the sign of a smaller slope is rounding
        assert_near(kept[clear], (sources[site] + 0.3 * slope.sign()).clamp(0, 1)[clear], TOY, size=1)
    how = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
    theirs, *parts = (torch.autograd.grad(part, parameters, **how) for part in (value + 0.5 * recon, value, 0.5 * recon))
    for mine, their, *sizes in zip(our_gradients, theirs, *parts, strict=True):
        assert relative_error(mine, their, sum(size.norm().item() for size in sizes)) < RELATIVE[torch.float64]


def check_step(kind: str, relative: str, dtype: torch.dtype, losses: dict[str, float], last_token_only: bool, **fields: int):
    config, task, decomposition, importance = make(kind, relative, dtype, **fields, **losses)
    config = config.model_copy(update={"last_token_only": last_token_only})
    step = 7 if dtype == torch.float64 else 1  # a low p is ill-conditioned near g = 0: single precision is compared at p = 0.83
    batch = task.batch(0, "train")
    inputs = batch.inputs
    parameters = {f"U {n}": v for n, v in decomposition.U.items()} | {f"V {n}": v for n, v in decomposition.V.items()}
    parameters |= {f"γ {n}": v for n, v in importance.named_parameters()}

    with at_rest(task.model):
        ours = training_step(config, task, decomposition, importance, batch, step)
        our_gradients = [parameter.grad for parameter in parameters.values()]

        target = decomposition.target_run(inputs)
        pre = reference_pre(config, decomposition, importance, target.inputs)
        g = {site: reference.lower(value) for site, value in pre.items()}

        def run(plan):
            forwards = {}
            for site in decomposition.sites:
                if site.name in plan:
                    mask, m = plan[site.name]
                    forwards[site.module] = lambda x, s=site, mask=mask, m=m: reference.masked_site(
                        x, decomposition.U[s.name], decomposition.V[s.name], mask, s.bias, None if m is None else (s.W, m)
                    )
            with swapped_in(forwards):
                return call(task.model, inputs)

        values = {
            name: reference.reconstruction(run, target.logits, reference_masks(name, g, config, step), last_token_only)
            for name in RECONSTRUCTIONS
            if getattr(config.losses, name)
        }
    W = {site.name: site.W for site in decomposition.sites}
    if config.losses.faithfulness:
        values["faithfulness"] = reference.faithfulness(W, decomposition.U, decomposition.V)
    p = 0.9 - 0.8 * step / (config.steps - 1)
    values["minimality"] = reference.minimality(pre, p, config.losses.minimality_eps)
    parts = [getattr(config.losses, name) * value for name, value in values.items()]
    how = {"allow_unused": True, "materialize_grads": True, "retain_graph": True}
    their_gradients, *gradients = (torch.autograd.grad(each, parameters.values(), **how) for each in (sum(parts), *parts))

    assert set(ours.losses) == set(values)
    divergences = [name for name in values if name in RECONSTRUCTIONS]
    for name, value in values.items():
        # a divergence is a difference of log-probabilities: what they lose to rounding it loses too
        size = target.logits.log_softmax(-1).abs().max().item() if name in divergences else abs(value.item())
        assert abs(ours.losses[name].item() - value.item()) < bound(TOY, size, dtype) + RELATIVE[dtype] * abs(value.item()), name
    for i, (name, mine) in enumerate(zip(parameters, our_gradients, strict=True)):
        size = sum(gradient[i].norm().item() for gradient in gradients)
        assert relative_error(mine, their_gradients[i], size) < RELATIVE[dtype], name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_faithfulness_and_minimality(dtype: torch.dtype):
    _, task, decomposition, importance = make("vector", "offset", dtype)
    W = {site.name: site.W for site in decomposition.sites}
    expected = reference.faithfulness(W, decomposition.U, decomposition.V)
    assert relative_error(faithfulness(decomposition), expected) < RELATIVE[dtype]
    pre = importance(decomposition.target_run(task.batch(0, "train").inputs).inputs, decomposition.U)
    for p in (0.9, 0.1):
        ours = minimality(pre, p=p, eps=1e-12)
        assert relative_error(ours, reference.minimality(pre, p, 1e-12)) < RELATIVE[dtype]


def test_masked_site_by_hand():
    """x = (1, 2), one subcomponent reading their sum and one the difference, masked by 1/2 and 1."""
    U = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    V = torch.tensor([[10.0, 0.0], [0.0, 1.0]])
    linear = torch.nn.Linear(2, 2, bias=True)
    (site,) = find_sites(torch.nn.Sequential(linear), ["0"])
    decomposition = Decomposition(torch.nn.Sequential(linear), [site], C=2)
    with torch.no_grad():
        decomposition.U["0"].copy_(U)
        decomposition.V["0"].copy_(V)
        linear.bias.copy_(torch.tensor([100.0, 200.0]))
    mask = torch.tensor([[[0.5, 1.0]]])
    out = decomposition(torch.tensor([[[1.0, 2.0]]]), [{"0": Replacement(mask)}])
    assert out.tolist() == [[[[115.0, 199.0]]]]
    assert reference.masked_site(torch.tensor([[[1.0, 2.0]]]), U, V, mask, linear.bias).tolist() == [[[115.0, 199.0]]]
