"""Whatever architecture a model is of: what is taken of it holds, what is not is refused, and the model stays as it was."""

import pytest
import torch
from torch import nn

import architectures
from paramlens.errors import ParamLensError, SiteError
from paramlens.method.decomposition import Decomposition
from paramlens.method.entry import require_sound
from paramlens.method.generators import generator
from paramlens.method.sites import Site, at_rest, find_sites
from paramlens.runs.integrity import model_sha256
from paramlens.tasks.language_models.encoding import model_inputs

NAMES = architectures.names()
FUSED = {
    "bloom": ["query_key_value"],
    "codegen": ["qkv_proj"],
    "dbrx": ["Wqkv"],
    "falcon": ["query_key_value"],
    "falcon_heads": ["query_key_value"],
    "falcon_new": ["query_key_value"],
    "gpt2": ["c_attn"],
    "gpt_bigcode": ["c_attn"],
    "gpt_bigcode_24": ["c_attn"],
    "gpt_bigcode_heads": ["c_attn"],
    "gpt_neox": ["query_key_value"],
    "gpt_neox_japanese": ["query_key_value"],
    "minimax": ["qkv_proj"],
    "mpt": ["Wqkv"],
    "openai_gpt": ["c_attn"],
    "persimmon": ["query_key_value"],
    "phi3": ["qkv_proj"],
}
FIRST = {"bert", "bloom", "falcon", "gemma3", "gpt2", "gpt_neox", "jamba", "llama", "mamba", "minimax", "mixtral", "opt", "qwen3", "xlnet"}
"""Architectures whose every site `make test` tries; the others it leaves to the whole suite."""
REFUSED = {"xlnet": r"axes are \(pos, batch, d\)"}
"""Architectures that compute in a way in which their sites cannot be replaced, and what is said of that."""


def inputs() -> dict[str, object]:
    return model_inputs(torch.randint(architectures.VOCABULARY, (3, 6), generator=generator("ids")))


def called_once(model: nn.Module) -> list[Site]:
    """All modules x @ W + bias that `find_sites` takes and the model calls once; embeddings have tests of their own."""
    calls: dict[str, int] = {}
    hooks, sites = [], []
    for name, module in ((name, module) for name, module in model.named_modules() if not isinstance(module, nn.Embedding)):
        try:
            sites += find_sites(model, [name])
        except SiteError:
            continue
        hooks.append(module.register_forward_hook(lambda *_, name=name: calls.update({name: calls.get(name, 0) + 1})))
    with torch.no_grad():
        model(**inputs())
    for hook in hooks:
        hook.remove()
    return [site for site in sites if calls.get(site.name) == 1]


def left_on(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + ("forward" in m.__dict__) for m in model.modules())


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name not in FIRST)) for name in NAMES])
def test_every_site_that_is_taken_holds(name: str):
    model = architectures.random_model(architectures.config(name))
    before = model_sha256(model)
    sites = called_once(model)
    assert len(sites) >= 4
    decomposition = Decomposition(model, sites, C=2)
    with at_rest(model):
        if name in REFUSED:
            with pytest.raises(ParamLensError, match=REFUSED[name]):
                require_sound(decomposition, inputs())
        else:
            target = require_sound(decomposition, inputs())
            assert torch.equal(target.logits, model(**inputs()).logits)
    assert not left_on(model)
    assert model_sha256(model) == before
    assert all(parameter.requires_grad for parameter in model.parameters() if parameter.is_floating_point())


@pytest.mark.parametrize("name", FUSED)
def test_slices_are_the_models_queries_keys_and_values(name: str):
    model = architectures.random_model(architectures.config(name))
    for leaf in FUSED[name]:
        sites = find_sites(model, [f"*.{leaf}[*]"])
        with at_rest(model):
            require_sound(Decomposition(model, sites, C=2), inputs())
        assert all(site.columns is not None for site in sites)


@pytest.mark.parametrize("name", ["gpt2", "gpt_bigcode", "falcon_new", "codegen", "minimax", "phi3", "persimmon"])
@pytest.mark.parametrize("wrong", ["k q v", "q v k", "v k q", "shifted", "one column"])
def test_a_wrong_split_is_never_taken(name: str, wrong: str, monkeypatch: pytest.MonkeyPatch):
    from paramlens.method.sites import fused, linear

    def broken(*args: object, **kwargs: object) -> dict[str, torch.Tensor] | None:
        found = fused.fused_columns(*args, **kwargs)
        if found is None:
            return None
        q, k, v = (found[part] for part in "qkv")
        if wrong == "shifted":
            every = torch.cat([q, k, v]).sort().values
            return {part: (columns + 1) % len(every) for part, columns in found.items()}
        if wrong == "one column":
            q, v = torch.cat([v[:1], q[1:]]), torch.cat([q[:1], v[1:]])
            return {"q": q, "k": k, "v": v}
        return dict(zip(wrong.split(), (q, k, v), strict=True))

    if name == "minimax" and wrong == "q v k":
        pytest.skip("linear attention without a softmax is the same in keys and values")
    model = architectures.random_model(architectures.config(name))
    monkeypatch.setattr(linear, "fused_columns", broken)
    taken = find_sites(model, [f"*.0.*{FUSED[name][0]}[*]"])
    with at_rest(model), pytest.raises(SiteError, match=r"its slices are not the queries, keys and values of its attention"):
        require_sound(Decomposition(model, taken, C=2), inputs())
