"""The second stream: data that is not decomposed, on which what was found on the first must not matter."""

import pytest
import torch
from torch import Tensor, nn

from conftest import TINY, tiny_with
from paramlens import decompose, open_run
from paramlens.analysis.held_out import held_out
from paramlens.analysis.off_data import off_data
from paramlens.errors import ConfigError
from paramlens.method.batch import Batch
from paramlens.method.evaluate import importances
from paramlens.method.generators import generator
from paramlens.method.losses.divergence import LossAt
from paramlens.method.losses.elsewhere import elsewhere_loss
from paramlens.method.masks import Replacement, mask_noise
from paramlens.runs.decompose import decompose_config
from rounding import TOY, near_divergence

ALL: dict[str, object] = {
    "losses": {"recon": 1.0, "elsewhere": 1.0, "elsewhere_masks": "all", "minimality": 0.01},
    "delta": True,
    "C": 3,
    "steps": 4,
    "log_every": 1,
}


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory):
    config = tiny_with(**ALL, task=TINY["task"] | {"elsewhere": 3})
    return decompose_config(config, out=tmp_path_factory.mktemp("both") / "run")


def test_the_second_stream_is_shuffled_sequences_of_its_own(both):
    assert both.task is not None
    assert both.task.elsewhere is not None
    first, again, next_one = both.task.elsewhere(0), both.task.elsewhere(0), both.task.elsewhere(1)
    assert first.inputs.equal(again.inputs)
    assert not first.inputs.equal(next_one.inputs)
    assert len(first.inputs) == 3
    assert first.answers is None
    assert [line["losses"]["elsewhere"] > 0 for line in both.metrics if "losses" in line] == [True] * 4


def test_it_is_there_again_in_a_run_that_is_opened(both):
    again = open_run(both.path)
    assert again.task is not None
    assert again.task.elsewhere is not None
    assert again.task.elsewhere(2).inputs.equal(both.task.elsewhere(2).inputs)


@pytest.mark.parametrize("last_token_only", [False, True])
def test_with_all_at_random_the_loss_is_that_of_uniform_masks_and_all_of_the_remainder(both, last_token_only: bool):
    run = both
    other = run.task.elsewhere(0)
    _, g = importances(run.decomposition, run.importance, run.task.batch(0, "train"))
    how = {"masks": "all", "last_token_only": last_token_only}
    with torch.no_grad():
        value = elsewhere_loss(run.decomposition, other, g, generator=generator("keys"), **how)
        keys = torch.randint(2**31, (len(g),), generator=generator("keys")).tolist()
        target = run.decomposition.target_run(other.inputs)
        plan = {}
        for (site, each), key in zip(g.items(), keys, strict=True):
            mask = mask_noise(key, torch.zeros(*target.inputs[site].shape[:-1], each.shape[-1]))
            plan[site] = Replacement(mask, remainder=torch.ones(mask.shape[:-1]))
        at = LossAt(last_token_only)
        log_probs = at.log_probs(target.logits)
        by_hand = at.divergence(log_probs, run.decomposition(other.inputs, [plan]))[0]
    assert value.item() == near_divergence(by_hand.item(), log_probs, TOY)
    assert value.item() > 0


def test_the_importances_get_no_gradient_from_it(both):
    _, g = importances(both.decomposition, both.importance, both.task.batch(0, "train"))
    g = {site: value.detach().requires_grad_() for site, value in g.items()}
    U = next(iter(both.decomposition.U.values()))
    with torch.enable_grad():
        loss = elsewhere_loss(both.decomposition, both.task.elsewhere(0), g, masks="all", generator=generator("keys"))
        slopes = torch.autograd.grad(loss, [U, *g.values()], allow_unused=True)
    assert slopes[0].abs().sum() > 0
    assert all(each is None for each in slopes[1:])


def test_off_the_data_is_also_measured_with_the_remainder_on(both, tiny_run):
    found = off_data(both, held_out(both, batches=1), threshold=0.1)
    assert found is not None
    assert found.with_remainder is not None
    assert found.with_remainder != found.recon
    without = off_data(tiny_run, held_out(tiny_run, batches=1), threshold=0.1)
    assert without is not None
    assert without.with_remainder is None


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up, self.head = nn.Embedding(9, 6), nn.Linear(6, 8), nn.Linear(8, 9)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.relu(self.up(self.embed(ids))))


def own(tmp_path, **given: object):
    torch.manual_seed(0)
    fields = {"sites": ["up"], "gamma": {"kind": "vector", "d_gate": 2}, "out": tmp_path / "run"} | ALL | given
    return decompose(Tokens(), [torch.randint(9, (4, 5)) for _ in range(2)], **fields)


def test_a_second_stream_of_ones_own(tmp_path):
    seen = list[int]()

    def second(step: int) -> Batch:
        seen.append(step)
        return Batch(torch.randint(9, (2, 3), generator=generator("second", step)))

    run = own(tmp_path, elsewhere=second)
    assert seen == [0, 1, 2, 3]
    assert all(line["losses"]["elsewhere"] > 0 for line in run.metrics if "losses" in line)


@pytest.mark.parametrize(("masks", "delta"), [("own", False), ("own", True), ("all", True)])
def test_inputs_without_positions_have_a_second_stream_too(tmp_path, masks: str, delta: bool):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    fields = ALL | {"losses": {"recon": 1.0, "elsewhere": 1.0, "elsewhere_masks": masks}, "delta": delta, "gamma": {"kind": "vector"}}
    run = decompose(model, [torch.randn(5, 6)], elsewhere=[torch.randn(4, 6)], sites=["0", "2"], out=tmp_path / "run", **fields)
    assert all(line["losses"]["elsewhere"] > 0 for line in run.metrics if "losses" in line)


def test_what_it_cannot_be_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="elsewhere: batches of other data and a coefficient losses.elsewhere go together"):
        own(tmp_path)
    with pytest.raises(ConfigError, match="losses.elsewhere_masks all: .* give delta true with it"):
        own(tmp_path, elsewhere=[torch.randint(9, (2, 3))], delta=False)
    with pytest.raises(ConfigError, match="elsewhere: Tensor is not a series of batches"):
        own(tmp_path, elsewhere=torch.randint(9, (2, 3)))
    with pytest.raises(ConfigError, match="losses.elsewhere and task.elsewhere"):
        tiny_with(**ALL)
