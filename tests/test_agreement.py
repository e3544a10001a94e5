import dataclasses

import pytest
import torch

from paramlens.analysis.agreement import Agreement, _compared, _mean, _Parts, _unit, agreement
from paramlens.errors import ConfigError, RunDirError
from paramlens.runs.decompose import decompose_config
from paramlens.runs.rundir import open_run
from rounding import TOY, bound

NONE = (torch.zeros(8, 3).double(), torch.zeros(8, 4).double())


@pytest.fixture
def pair(tiny_run):
    """The same run twice, opened apart."""
    return open_run(tiny_run.path), open_run(tiny_run.path)


def test_a_run_agrees_with_itself_whatever_the_order_and_sign(pair):
    one, other = pair
    order = torch.randperm(5, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for U, V in zip(other.decomposition._U, other.decomposition._V, strict=True):
            U.copy_(-3 * U[:, order])
            V.copy_(-V[order] / 3)
        for group in other.importance.typed_groups:
            for name in ("w_in", "b_in", "w_out", "b_out"):
                value = getattr(group, name)
                value.copy_(value[:, order])
    result = agreement([one, other], batches=2)
    for site in result.sites.values():
        assert site.agreement == pytest.approx(1, abs=bound(TOY, 1))
        assert site.direction == pytest.approx(1, abs=bound(TOY, 1))
        assert site.pattern == pytest.approx(1, abs=bound(TOY, 1))
        assert site.chance < 0.9
    for site, matched in result.pairs[0].items():
        inverse = order.argsort().tolist()
        assert {i: j for i, j, _ in matched.matches} == {i: inverse[i] for i, _, _ in matched.matches}, site


def test_opposite_parts_are_not_alike():
    """The cosine of rank-1 matrices has a sign: outer(u, v) and outer(-u, v) are as far apart as can be."""
    g = torch.rand(2, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    a = _Parts([0, 1], torch.eye(2, 3).double(), torch.eye(2, 4).double(), g)
    assert _compared(a, a, NONE).direction == pytest.approx(1)
    assert _compared(a, dataclasses.replace(a, reads=-a.reads), NONE).direction == 0
    assert _compared(a, dataclasses.replace(a, reads=-a.reads, writes=-a.writes), NONE).direction == pytest.approx(1)


def test_a_part_that_writes_nothing_is_like_none():
    g = torch.rand(2, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    a = _Parts([0, 1], _unit(torch.eye(2, 3).double()), _unit(torch.zeros(2, 4).double()), g)
    assert _compared(a, a, NONE).direction == 0


def test_patterns_and_weights_by_hand():
    """Two parts with importances 0.5 and 0.25; the other run has the first alone: 2 x 0.5 of 0.5 + 0.25 + 0.5 has a partner."""
    g = torch.tensor([[1.0, 0.0, 1.0, 0.0], [0.0, 0.5, 0.0, 0.5]], dtype=torch.float64)
    both = _Parts([3, 7], torch.eye(2, 3).double(), torch.eye(2, 4).double(), g)
    first = _Parts([2], both.reads[:1], both.writes[:1], g[:1])
    result = _compared(both, first, NONE)
    assert result.agreement == result.direction == result.pattern == pytest.approx(0.8)
    assert result.matches == [(3, 2, pytest.approx(1))]
    second = dataclasses.replace(first, g=g[1:])  # active exactly where the first is not
    assert _compared(both, second, NONE).matches == [(3, 2, pytest.approx(0.5))]  # same direction, opposite pattern


def test_where_nothing_is_active_there_is_nothing_to_compare():
    """Neither full agreement nor none: no number, and a mean over the pairs that have one."""
    g = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    one = _Parts([0], torch.eye(1, 3).double(), torch.eye(1, 4).double(), g)
    none = _Parts([], one.reads[:0], one.writes[:0], g[:0])
    empty = _compared(none, none, NONE)
    assert (empty.agreement, empty.direction, empty.pattern, empty.chance, empty.parts) == (None, None, None, None, (0, 0))
    assert _mean([empty, _compared(one, one, NONE)]).agreement == pytest.approx(1)
    assert _mean([empty]).agreement is None
    result = Agreement(["a", "b"], 0.1, 2, {"up": empty}, [{"up": empty}], "svd_rotated")
    assert [cell.text for cell in result.tables()[0].rows[0]] == ["up", "-", "-", "-", "-", "0.0, 0.0"]
    assert "1 sites: - on average" in result.summary()


def test_a_part_without_partner_counts_as_unlike(pair):
    """All but one subcomponent of the other are switched off: agreement is the share of importance that still has a partner."""
    one, other = pair
    with torch.no_grad():
        for group in other.importance.typed_groups:
            group.w_out[:, 1:] = 0
            group.b_out[:, 1:] = -1
    result = agreement([one, other], batches=2).pairs[0]
    for site in result.values():
        assert site.parts == (site.parts[0], 1)
        assert site.direction < 0.9


@pytest.mark.slow
def test_means_over_pairs_and_chance(tiny, tiny_run, tmp_path):
    seeds = [decompose_config(tiny.model_copy(update={"seed": seed}), out=tmp_path / str(seed), target=tiny_run.path) for seed in (1, 2)]
    result = agreement([tiny_run, *seeds], batches=2)
    assert (len(result.pairs), result.init, result.sequences) == (3, "svd", 8)
    for name, site in result.sites.items():
        assert site.agreement == pytest.approx(sum(pair[name].agreement for pair in result.pairs) / 3)
        assert 0 <= site.agreement <= 1
    assert result == agreement([open_run(run.path) for run in (tiny_run, *seeds)], batches=2)


def test_chance_is_what_the_same_weight_gives(tiny, tiny_run, tmp_path):
    """Two untrained rotations of one weight are as alike as chance says, and far more alike than directions at random would be."""
    fields = {"init": tiny.init.model_copy(update={"kind": "svd_rotated"}), "steps": 1, "C": 16}
    slow = tiny.optim.model_copy(update={"lr": 1e-9})
    seeds = [
        decompose_config(tiny.model_copy(update={**fields, "optim": slow, "seed": seed}), out=tmp_path / str(seed), target=tiny_run.path)
        for seed in (1, 2)
    ]
    for site in agreement(seeds, batches=1).sites.values():
        assert site.direction == pytest.approx(site.chance, abs=0.15)
        assert 0.3 < site.chance < 0.9


def test_what_cannot_be_compared(tiny, tiny_run, tmp_path):
    with pytest.raises(ConfigError, match="threshold nan: importances lie in"):
        agreement([tiny_run, tiny_run], threshold=float("nan"))
    with pytest.raises(ConfigError, match="give two runs or more"):
        agreement([tiny_run])
    other = decompose_config(tiny.model_copy(update={"seed": 5}), out=tmp_path / "other")
    with pytest.raises(RunDirError, match="decomposes another target"):
        agreement([tiny_run, other])
    fewer = tiny.model_copy(update={"sites": ("blocks.0.attn.q",)})
    with pytest.raises(RunDirError, match="its sites are not those of"):
        agreement([tiny_run, decompose_config(fewer, out=tmp_path / "fewer", target=tiny_run.path)])
    with pytest.raises(ConfigError, match="no data to look at"):
        agreement([dataclasses.replace(tiny_run, task=None), tiny_run])
