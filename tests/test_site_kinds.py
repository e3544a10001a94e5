"""Kinds of sites beside nn.Linear: raw parameters as TransformerLens keeps them, nn.MultiheadAttention, embeddings, stacked experts."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from torch.nn import functional as F

import paramlens
import reference
from paramlens.analysis.edit import Edit
from paramlens.errors import ConfigError, SiteError
from paramlens.method.decomposition import Decomposition
from paramlens.method.entry import require_sound
from paramlens.method.generators import generator
from paramlens.method.masks import Replacement
from paramlens.method.settings import Init
from paramlens.method.sites import Product, Site, at_rest, find_sites, replaced
from paramlens.method.start import initialise
from rounding import assert_near

VOCABULARY, D, HEADS, HIDDEN = 11, 8, 2, 12
TOKENS = torch.randint(0, VOCABULARY, (3, 5), generator=generator("kinds"))


class Attention(nn.Module):
    """Queries, keys, values and output with a weight per head, in the operations of TransformerLens' attention."""

    def __init__(self, *, as_linear: bool) -> None:
        super().__init__()
        self.as_linear = as_linear
        for name in ("W_Q", "W_K", "W_V"):
            setattr(self, name, nn.Parameter(torch.randn(HEADS, D, D // HEADS) / D**0.5))
        self.W_O = nn.Parameter(torch.randn(HEADS, D // HEADS, D) / D**0.5)
        self.b_Q, self.b_O = nn.Parameter(torch.randn(HEADS, D // HEADS)), nn.Parameter(torch.randn(D))

    def project(self, x: Tensor, W: Tensor) -> Tensor:
        if self.as_linear:
            heads, d, width = W.shape
            return F.linear(x, W.permute(0, 2, 1).reshape(heads * width, d)).view(*x.shape[:2], heads, width)
        return torch.einsum("bpd,hde->bphe", x, W)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x, self.W_Q) + self.b_Q, self.project(x, self.W_K), self.project(x, self.W_V)
        scores = torch.einsum("bqhe,bkhe->bhqk", q, k) / (D // HEADS) ** 0.5
        scores = scores.masked_fill(torch.ones(x.shape[1], x.shape[1]).triu(1).bool(), -torch.inf)
        z = torch.einsum("bhqk,bkhe->bqhe", scores.softmax(-1), v)
        if self.as_linear:
            return F.linear(z.flatten(2), self.W_O.permute(2, 0, 1).reshape(D, D), self.b_O)
        return torch.einsum("bphe,hed->bpd", z, self.W_O) + self.b_O


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.W_in, self.W_out = nn.Parameter(torch.randn(D, HIDDEN) / D**0.5), nn.Parameter(torch.randn(HIDDEN, D) / HIDDEN**0.5)
        self.b_in = nn.Parameter(torch.randn(HIDDEN))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.addmm(self.b_in, x.view(-1, D), self.W_in).view(*x.shape[:-1], HIDDEN)
        return F.gelu(hidden) @ self.W_out


class Block(nn.Module):
    def __init__(self, *, as_linear: bool) -> None:
        super().__init__()
        self.attn, self.mlp = Attention(as_linear=as_linear), Mlp()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(x)
        return x + self.mlp(x)


class Hooked(nn.Module):
    """A model as TransformerLens' HookedTransformer is built, without nn.Linear."""

    def __init__(self, *, as_linear: bool = True) -> None:
        super().__init__()
        self.W_E, self.W_pos = nn.Parameter(torch.randn(VOCABULARY, D)), nn.Parameter(torch.randn(9, D))
        self.blocks = nn.ModuleList(Block(as_linear=as_linear) for _ in range(2))
        self.W_U, self.b_U = nn.Parameter(torch.randn(D, VOCABULARY) / D**0.5), nn.Parameter(torch.randn(VOCABULARY))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.W_E[tokens, :] + self.W_pos[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return torch.einsum("bpd,dv->bpv", x, self.W_U) + self.b_U


class Encoder(nn.Module):
    """nn.TransformerEncoder with a causal mask."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(D, HEADS, HIDDEN, dropout=0.0, batch_first=True, norm_first=True)
        self.embed, self.head = nn.Embedding(VOCABULARY, D), nn.Linear(D, VOCABULARY)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, tokens: Tensor) -> Tensor:
        causal = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
        return self.head(self.encoder(self.embed(tokens), mask=causal, is_causal=True))


def mixtral() -> nn.Module:
    config = transformers.MixtralConfig(
        vocab_size=VOCABULARY,
        hidden_size=D,
        intermediate_size=HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=1,
        num_local_experts=3,
        num_experts_per_tok=2,
    )
    model = transformers.MixtralForCausalLM(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.4)
    return model


KINDS: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "einsum": (lambda: Hooked(as_linear=False), ["*"]),
    "linear": (Hooked, ["*"]),
    "one head": (Hooked, ["blocks.0.attn.W_?[1]"]),
    "lookup": (Hooked, ["W_E", "*W_U", "blocks.1.mlp.*"]),
    "attention": (Encoder, ["*in_proj_weight", "*out_proj", "*linear?"]),
    "part of attention": (Encoder, ["*.0.self_attn.in_proj_weight[qv]"]),
    "embedding": (Encoder, ["embed", "head"]),
    "experts": (mixtral, ["*experts*"]),
    "one expert": (mixtral, ["model.layers.1.mlp.experts.down_proj[1]", "*gate.weight"]),
}


@pytest.fixture(params=KINDS)
def model_and_sites(request: pytest.FixtureRequest) -> tuple[nn.Module, tuple[Site, ...]]:
    make, patterns = KINDS[request.param]
    torch.manual_seed(0)
    model = make()
    return model, find_sites(model, patterns)


def decomposed(model: nn.Module, sites: tuple[Site, ...], C: int) -> Decomposition:
    decomposition = Decomposition(model, sites, C=C)
    with torch.no_grad():
        for i, value in enumerate(decomposition.parameters()):
            value.copy_(torch.randn(value.shape, generator=generator("factors", i)) / 3)
    return decomposition


def logits_of(model: nn.Module) -> Tensor:
    with torch.no_grad():
        output: Any = model(TOKENS)
    return output if isinstance(output, Tensor) else output.logits


def test_masks_of_ones_give_the_target(model_and_sites: tuple[nn.Module, tuple[Site, ...]]):
    model, sites = model_and_sites
    decomposition = Decomposition(model, sites, C=max(min(site.d_in, site.d_out) for site in sites))
    initialise(decomposition, Init(kind="svd"), generator=generator("start"))
    before = [dict(module.__dict__) for module in model.modules()]
    with at_rest(model), torch.no_grad():
        target = require_sound(decomposition, TOKENS)
        ones = {name: Replacement(torch.ones(3, 5, C)) for name, C in decomposition.C.items()}
        alone, untouched = decomposition(TOKENS, [ones, {}], target)
        own = logits_of(model)
    if isinstance(model, Encoder):  # alone, it runs PyTorch's fused kernel
        assert_near(target.logits, own, 4000, size=own.abs().max().item())
    else:
        assert torch.equal(target.logits, own)
    size = target.logits.abs().max().item()
    assert_near(alone, own, 4000, size=size)
    assert_near(untouched, own, 4000, size=size)
    after = [dict(module.__dict__) for module in model.modules()]
    assert [list(each) for each in before] == [list(each) for each in after]


def test_masked_products_and_their_gradients_are_the_reference(model_and_sites: tuple[nn.Module, tuple[Site, ...]]):
    """One site at a time: W + bias of it written as Σ_c U_c V_c is what a run with masks of ones computes; masks enter row by row."""
    model, sites = model_and_sites
    for site in (sites[0], sites[-1]):
        decomposition = decomposed(model, (site,), C=3)
        U, V = decomposition.U[site.name], decomposition.V[site.name]
        g = torch.rand(3, 5, 3, generator=generator("masks"), requires_grad=True)
        seen: list[Tensor] = []
        compute = partial(explicit_product, site, U, V, g, seen)
        with at_rest(model):
            x = decomposition.target_run(TOKENS).inputs[site.name]
            logits = decomposition(TOKENS, [{site.name: Replacement(g)}])[0]
            mine = torch.autograd.grad(logits.square().sum(), [U, V, g])
            with replaced({site: Product(compute, leading=(3, 5))}):
                output: Any = model(TOKENS)
            expected = output if isinstance(output, Tensor) else output.logits
            theirs = torch.autograd.grad(expected.square().sum(), [U, V, g])
        assert torch.equal(seen[0], x)
        for a, b in zip((logits, *mine), (expected, *theirs), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * max(1.0, b.abs().max().item()))


def explicit_product(site: Site, U: Tensor, V: Tensor, g: Tensor, seen: list[Tensor], x: Tensor, _target: object) -> Tensor:
    seen.append(x)
    return reference.masked_site(site.vectors(x), U, V, g, site.bias)


def test_a_written_weight_is_what_the_masked_run_computes(model_and_sites: tuple[nn.Module, tuple[Site, ...]]):
    """U V written into the model gives what masks of ones give: the product that is replaced is the weight's only one."""
    model, sites = model_and_sites
    decomposition = decomposed(model, sites, C=3)
    with at_rest(model), torch.no_grad():
        ones = {name: Replacement(torch.ones(3, 5, 3)) for name in decomposition.names}
        masked = decomposition(TOKENS, [ones])[0]
        for site in sites:
            site.write(decomposition.U[site.name] @ decomposition.V[site.name])
        torch.testing.assert_close(logits_of(model), masked, rtol=1e-3, atol=1e-4 * max(1.0, masked.abs().max().item()))


@pytest.mark.parametrize(
    "kind", ["lookup", "embedding", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("linear", "attention", "experts"))]
)
def test_decomposed_edited_and_loaded_again(kind: str, tmp_path: Path):
    make, patterns = KINDS[kind]
    torch.manual_seed(0)
    model = make()
    fields: dict[str, Any] = {"steps": 3, "C": 4, "sites": patterns, "gamma": {"kind": "vector"}}
    run = paramlens.decompose(model, lambda step: TOKENS, out=tmp_path / "run", **fields)
    again = paramlens.open_run(tmp_path / "run", model=model)
    assert again.decomposition.names == tuple(site.name for site in find_sites(model, patterns))
    for name, U in run.decomposition.U.items():
        assert torch.equal(again.decomposition.U[name], U)
    edited = make()
    edited.load_state_dict(model.state_dict())
    for site in find_sites(edited, patterns):
        U, V = again.decomposition.U[site.name].detach(), again.decomposition.V[site.name].detach()
        site.write(site.W - U[:, :1] @ V[:1])
    save_model(edited, str(tmp_path / "edited.safetensors"))
    loaded = make().eval()
    load_model(loaded, tmp_path / "edited.safetensors")
    assert torch.equal(logits_of(loaded), logits_of(edited.eval()))
    assert not torch.equal(logits_of(loaded), logits_of(model.eval()))


def test_names():
    def names(model: nn.Module, *patterns: str) -> list[str]:
        return [site.name for site in find_sites(model, patterns)]

    hooked, encoder, experts = Hooked(), Encoder(), mixtral()
    block = ["W_Q[0]", "W_Q[1]", "W_K[0]", "W_K[1]", "W_V[0]", "W_V[1]", "W_O[0]", "W_O[1]"]
    own = [*(f"attn.{name}" for name in block), "mlp.W_in", "mlp.W_out"]
    assert names(hooked, "*") == ["W_U", *(f"blocks.{i}.{name}" for i in range(2) for name in own)]
    assert names(hooked, "blocks.1.attn.W_Q") == ["blocks.1.attn.W_Q[0]", "blocks.1.attn.W_Q[1]"]
    assert names(hooked, "*.W_Q[*]", "!*[1]") == ["blocks.0.attn.W_Q[0]", "blocks.1.attn.W_Q[0]"]
    assert names(hooked, "*W_E") == ["W_E"]
    assert names(encoder, "*.0.self_attn.*") == ["encoder.layers.0.self_attn.out_proj"]
    assert names(encoder, "*.0.*.in_proj_weight[qk]") == [f"encoder.layers.0.self_attn.in_proj_weight[{part}]" for part in "qk"]
    assert all(isinstance(experts.get_submodule(name), nn.Linear) for name in names(experts, "*"))
    assert names(experts, "*.0.*down_proj[2]") == ["model.layers.0.mlp.experts.down_proj[2]"]
    assert names(experts, "*embed*") == ["model.embed_tokens"]
    with pytest.raises(SiteError, match="did you mean blocks.1.attn.W_Q"):
        names(hooked, "blocks.1.attn.W_QQ")


class Odd(nn.Module):
    """A weight used in a way that is given."""

    def __init__(self, use: Callable[[Tensor, nn.Parameter], Tensor]) -> None:
        super().__init__()
        self.embed, self.head, self.W, self.use = (
            nn.Embedding(VOCABULARY, D),
            nn.Linear(D, VOCABULARY),
            nn.Parameter(torch.randn(D, D)),
            use,
        )

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.use(self.embed(tokens), self.W))


ODD: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], str]] = {
    "transposed": (lambda x, W: F.linear(x, W), "site W: the model uses it in a product that is not x @ W, such as that of its transpose"),
    "unknown": (lambda x, W: (x[..., None] * W).sum(-2), r"site W: the model uses it in mul, an operation on a weight that is not known"),
    "a part": (lambda x, W: x[..., :2] @ W[:2], "site W: the model uses it in a product that is not x @ W"),
    "twice": (lambda x, W: x @ W @ W, "site W: the model calls it 2 times"),
    "values": (lambda x, W: x * W.sum(), "site W: the model uses it in sum"),
    "rows": (lambda x, W: W[x.argmax(-1)], "site W: the model uses it in rows looked up by number"),
    "of its own accord": (lambda x, W: x + 0 * W.detach().double().float()[0], "site W: the model uses it in double"),
    "einsum of three": (lambda x, W: torch.einsum("bpd,de,e->bpe", x, W, torch.ones(D)), "site W: the model uses it in einsum"),
    "trace": (lambda x, W: x * torch.einsum("bpd,dd->bp", x, W)[..., None], "site W: the model uses it in einsum 'bpd,dd->bp'"),
}


@pytest.mark.parametrize("how", ODD)
def test_a_use_that_is_no_product_is_refused(how: str):
    use, message = ODD[how]
    model = Odd(use)
    with at_rest(model), pytest.raises(SiteError, match=message):
        require_sound(Decomposition(model, find_sites(model, ["W"]), C=2), TOKENS)
    assert "W" not in model.__dict__


@pytest.mark.parametrize(
    "use",
    [
        lambda x, W: torch.matmul(x, W.t().contiguous().mT),
        lambda x, W: F.linear(x, W.swapaxes(0, 1)),
        lambda x, W: torch.baddbmm(torch.zeros(D), x.flatten(0, 1)[None], W.unsqueeze(0)).view(x.shape),
        lambda x, W: x @ W.view(D * D).unflatten(0, (D, D)),
        lambda x, W: torch.einsum("...Z,Z A->...A", x, W.clone()),
        lambda x, W: (W.T @ x.mT).mT,
    ],
)
def test_ways_to_write_a_product(use: Callable[[Tensor, Tensor], Tensor]):
    torch.manual_seed(0)
    model = Odd(use)
    with at_rest(model):
        target = require_sound(Decomposition(model, find_sites(model, ["W"]), C=2), TOKENS)
        assert torch.equal(target.logits, logits_of(model))


def test_the_scalar_importance_of_an_embedding_is_refused(tmp_path: Path):
    fields: dict[str, Any] = {"steps": 1, "C": 2, "sites": ["embed"], "gamma": {"kind": "scalar"}}
    with pytest.raises(ConfigError, match="gamma.kind scalar: at the embedding embed"):
        paramlens.decompose(Encoder(), lambda step: TOKENS, out=tmp_path / "run", **fields)


def test_no_vector_of_the_vocabulary_is_made():
    """x @ U of an embedding is rows of U, and γ sees the table's rows."""
    model = Encoder()
    [site] = find_sites(model, ["embed"])
    decomposition = decomposed(model, (site,), C=3)
    with at_rest(model):
        run = decomposition.target_run(TOKENS)
    assert torch.equal(run.inputs["embed"], TOKENS[..., None])
    assert torch.equal(run.seen["embed"], model.embed.weight[TOKENS])
    assert (site.d_in, site.d_out, site.d_seen) == (VOCABULARY, D, D)
    assert torch.equal(decomposition.inner("embed", run.inputs["embed"]), decomposition.U["embed"][TOKENS])


def test_an_edited_expert_is_loaded_again_by_transformers(tmp_path: Path):
    model = mixtral()
    [site] = find_sites(model, ["*.1.*down_proj[2]"])
    edit = Edit(model, None, (), "subtraction", {site.name: site.W * 0.5})
    saved = edit.save(tmp_path / "edited")
    with edit.applied() as edited:
        expected = logits_of(edited.eval())
    assert torch.equal(logits_of(transformers.AutoModelForCausalLM.from_pretrained(saved).eval()), expected)
    assert not torch.equal(logits_of(model), expected)
