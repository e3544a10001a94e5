"""Direct paths, measured, beside the models themselves: what sites are really given, and how logits really move."""

import pytest
import torch
import transformers as T
from torch import nn

from language_models import CONFIGS, random_model
from paramlens.analysis.norms import factor, norm_of
from paramlens.analysis.paths import find_paths
from paramlens.errors import SiteError
from paramlens.method.sites import at_rest, find_sites
from paramlens.tasks.language_models.encoding import model_inputs

IDS = torch.tensor([[5, 17, 200, 41, 9, 123, 77]])
WITH_TABLE = {"gpt2", "opt", "xglm", "gpt1"}
"""Positions are added to their embeddings."""

LAST = {"bloom": "dense_4h_to_h", "opt": "fc2", "gpt2": "c_proj", "gptj": "fc_out", "phi": "fc2", "xglm": "fc2", "starcoder2": "c_proj"}
FINAL = {
    "bloom": "transformer.ln_f",
    "mpt": "transformer.norm_f",
    "opt": "model.decoder.final_layer_norm",
    "gpt_neox": "gpt_neox.final_layer_norm",
}
FINAL |= {"gpt2": "transformer.ln_f", "gptj": "transformer.ln_f", "xglm": "model.layer_norm", "phi": "model.final_layernorm"}


def all_sites(model: nn.Module):
    sites = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | T.pytorch_utils.Conv1D):
            try:
                sites += find_sites(model, [name])
            except SiteError:  # a tied weight
                continue
    return sites


@pytest.mark.parametrize("name", sorted(CONFIGS.keys() - {"falcon", "mixtral", "gpt1", "rwkv"}))
def test_direct_paths_are_those_of_the_model(name: str):
    """The first block is given what its path makes of an embedding, and the last MLP moves the logits as its path says.

    The true derivative also has what a norm's scale does: multiples of what passes the norm, the logits themselves and the site's output.
    """
    model = random_model(name)
    sites = all_sites(model)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    with at_rest(model), torch.no_grad():
        paths = find_paths(model, sites, model_inputs(IDS), embedding=embedding, head=head)
        last = next(site for site in reversed(sites) if site.name.endswith(LAST.get(name, ("down_proj", "dense_4h_to_h"))))
        given, out = {}, {}

        def keep(name, args, output):
            given[name], out[name] = args[0], output

        hooks = [site.module.register_forward_hook(lambda _m, args, output, name=site.name: keep(name, args, output)) for site in sites]
        logits = model(**model_inputs(IDS)).logits[0, -1]
        for hook in hooks:
            hook.remove()
        first = [
            site
            for site in sites
            if site.name in paths.reads and ".0." in site.name and site.d_in == 16 and ".mlp." not in site.name and ".ffn." not in site.name
        ]
        assert first
        for site in first if name not in WITH_TABLE else []:
            torch.testing.assert_close(
                paths.reads[site.name].embedding(embedding(IDS[0, :1])), given[site.name][0, :1], rtol=1e-3, atol=1e-4
            )

        v, step = torch.randn(1, 16), 1e-2
        moved = []
        for by in (step * v, -step * v):
            hook = last.module.register_forward_hook(lambda _m, _a, output, by=by: output + by)
            moved.append(model(**model_inputs(IDS)).logits[0, -1])
            hook.remove()
        true = (moved[0] - moved[1]) / (2 * step)
        to_logits = paths.writes[last.name]
        final = model.get_submodule(FINAL.get(name, "model.norm"))
        constant = head(final(torch.zeros(1, 1, 16)))[0, 0]
        columns = [to_logits(v)[0], to_logits(out[last.name].reshape(-1, 16)[-1:])[0], logits, constant]
        basis = torch.stack([column / column.norm().clamp(min=1e-6) for column in columns], 1).double()
        found = torch.linalg.pinv(basis, rtol=1e-6) @ true.double()
    assert found[0] > 0
    assert (basis @ found - true).norm() < 2e-2 * true.norm(), name


def test_what_is_not_a_direct_path_is_left_out():
    """A query writes nothing to the stream; a mixture of time steps is no embedding; where norms stand in the stream it ends."""
    for name, site in (("olmo2", "model.layers.0.self_attn.q_proj"), ("rwkv", "rwkv.blocks.1.attention.key")):
        model = random_model(name)
        with at_rest(model):
            paths = find_paths(
                model, all_sites(model), model_inputs(IDS), embedding=model.get_input_embeddings(), head=model.get_output_embeddings()
            )
        assert site not in paths.writes
        assert (site in paths.reads) == (name == "olmo2")  # OLMo 2's attention is given the stream as it is
    model = random_model("gpt1")
    with at_rest(model):
        paths = find_paths(model, all_sites(model), model_inputs(IDS), embedding=model.get_input_embeddings(), head=model.lm_head)
    assert set(paths.writes) == {"transformer.h.1.mlp.c_proj"}
    assert all(".h.0." in name for name in paths.reads)


class OnePlus(nn.Module):
    """As Gemma has it, under a name that says nothing."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-0.5, 0.5, 6))

    def forward(self, x):
        return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * (1 + self.weight)


class Centred(nn.Module):
    def forward(self, x):
        x = x - x.mean(-1, keepdim=True)
        return x / x.square().mean(-1, keepdim=True).sqrt() + 3


def test_a_norm_is_what_acts_like_one():
    layer = nn.LayerNorm(6)
    nn.init.uniform_(layer.weight, -1, 1)
    nn.init.uniform_(layer.bias)
    for module, gain, centred in (
        (OnePlus(), torch.linspace(0.5, 1.5, 6), False),
        (Centred(), torch.ones(6), True),
        (layer, layer.weight, True),
    ):
        found = norm_of(module, torch.zeros(1, 6))
        assert found is not None
        assert found.centred == centred
        torch.testing.assert_close(found.gain, gain.detach(), rtol=1e-4, atol=1e-5)
    for other in (nn.Linear(6, 6), nn.Identity(), nn.GELU(), nn.Tanh(), nn.Dropout(), nn.Embedding(3, 6), nn.Bilinear(6, 6, 6)):
        assert norm_of(other.eval(), torch.zeros(1, 6)) is None


def test_a_factor_is_exact_or_none():
    a = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert factor(3 * a, a) == pytest.approx(3)
    assert factor(a + 1, a) is None
    assert factor(0 * a, a) is None
    assert factor(a, 0 * a) is None
    assert factor(a, a[:1]) is None
