import pytest
import torch
from torch import nn

from paramlens.errors import SiteError
from paramlens.method.hooks import swapped_in
from paramlens.method.sites import at_rest, find_sites
from rounding import assert_near


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 3)
        self.head = nn.Linear(3, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        return self.head(self.embed(tokens))


def test_orientation():
    linear = nn.Linear(3, 5)
    (site,) = find_sites(nn.Sequential(linear), ["0"])
    x = torch.randn(2, 3)
    assert (site.d_in, site.d_out) == (3, 5)
    assert site.W.shape == (3, 5)
    assert_near(x @ site.W + site.bias, linear(x), 4, size=(x.abs() @ site.W.abs() + site.bias.abs()).max().item())


def test_patterns_keep_the_models_order(target):
    names = [site.name for site in find_sites(target, ["blocks.1.attn.v", "blocks.*.attn.[qk]"])]
    assert names == ["blocks.0.attn.q", "blocks.0.attn.k", "blocks.1.attn.q", "blocks.1.attn.k", "blocks.1.attn.v"]


def test_no_match_lists_what_is_there(target):
    with pytest.raises(
        SiteError, match=r"'blocks.0.attn.qq' matches no weight matrix; did you mean blocks.0.attn.q\? there are: blocks.0.attn.q,"
    ):
        find_sites(target, ["blocks.0.attn.qq"])


def test_model_without_linear():
    with pytest.raises(SiteError, match=r"no nn.Linear"):
        find_sites(nn.ReLU(), ["*"])


def test_tied_weight_is_refused():
    with pytest.raises(SiteError, match=r"site head: its weight is tied \(embed.weight = head.weight\)"):
        find_sites(Tied(), ["*"])


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_swap_is_undone_whatever_happens(error: type[BaseException]):
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))

    def own(x):
        return x

    model[1].forward = own
    before = [dict(module.__dict__) for module in model]
    with pytest.raises(error), swapped_in(dict.fromkeys(model, torch.zeros_like)):
        assert model(torch.ones(1, 2)).tolist() == [[0, 0]]
        raise error
    assert [dict(module.__dict__) for module in model] == before
    assert model[1].forward is own
    assert "forward" not in model[0].__dict__


def test_at_rest_restores_modes_and_gradients():
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
    model[1].eval()
    model[0].bias.requires_grad_(False)
    with pytest.raises(KeyboardInterrupt), at_rest(model):
        assert not any(module.training for module in model.modules())
        assert not any(parameter.requires_grad for parameter in model.parameters())
        raise KeyboardInterrupt
    assert [module.training for module in model.modules()] == [True, True, False]
    assert [parameter.requires_grad for parameter in model.parameters()] == [True, False]
