"""Algorithm 2, against pruning done by hand on the weights themselves."""

import json

import pytest
import torch

from paramlens.baselines.svd import Pruned, pruned_to, svd_baseline
from paramlens.errors import ConfigError
from paramlens.method.losses.divergence import kl_divergence
from rounding import near, near_divergence


def pruned_kl(run, ranks: dict[str, int], batches: int) -> float:
    """KL(target ‖ target with every site's weight cut to its rank), by writing the cut weights into the model."""
    model, task = run.decomposition.model, run.task
    values = []
    for index in range(batches):
        inputs = task.batch(index, "circuit").inputs
        with torch.no_grad():
            before = {name: model.get_submodule(name).weight.clone() for name in ranks}
            log_probs = model(inputs)[:, -1:].log_softmax(-1)
            for name, rank in ranks.items():
                left, singular, right = torch.linalg.svd(before[name].double())
                model.get_submodule(name).weight.copy_(left[:, :rank] * singular[:rank] @ right[:rank])
            values.append(kl_divergence(log_probs, model(inputs)[:, -1:][None]).item())
            for name, weight in before.items():
                model.get_submodule(name).weight.copy_(weight)
    return sum(values) / batches


def some_logits(run) -> torch.Tensor:
    return run.decomposition.model(run.task.batch(0, "circuit").inputs)


def test_the_path_is_greedy_over_all_sites(tiny_run):
    """Each pick is the best of all sites' next ones, none of which the by-hand pruning finds better."""
    result = svd_baseline(tiny_run, batches=2)
    full = dict.fromkeys(tiny_run.decomposition.names, 4)
    assert result.curve[0].ranks == full
    logits = some_logits(tiny_run)
    assert result.curve[0].kl == near_divergence(0, logits)
    assert [point.total for point in result.curve] == list(range(24, -1, -1))
    for before, after in list(zip(result.curve, result.curve[1:], strict=False))[::5]:
        attempts = {site: pruned_kl(tiny_run, before.ranks | {site: rank - 1}, 2) for site, rank in before.ranks.items() if rank}
        assert after.kl == near_divergence(min(attempts.values()), logits)
        [picked] = [site for site in full if after.ranks[site] != before.ranks[site]]
        assert attempts[picked] == near_divergence(min(attempts.values()), logits)


def test_it_stops_before_the_first_pick_that_exceeds_the_tolerance():
    curve = [Pruned(kl, {"a": rank}, rank) for kl, rank in ((0.0, 3), (0.2, 2), (0.1, 1), (0.9, 0))]
    assert [pruned_to(curve, tolerance).total for tolerance in (0.0, 0.15, 0.2, 0.5, 1.0)] == [3, 3, 1, 1, 0]
    assert pruned_to(curve[1:], 0.0).total == 2  # nothing is below: nothing is pruned


def test_counts_beside_it_are_those_of_the_circuit(tiny_run):
    from paramlens.analysis.circuit import circuit

    result, table = svd_baseline(tiny_run, batches=2, tolerance=0.01), circuit(tiny_run, batches=2, adversary=0)
    assert result.recon == near_divergence(table.metrics["recon"], some_logits(tiny_run))
    assert result.counted.kl == near_divergence(table.metrics["recon_rounded"], some_logits(tiny_run))
    for name, site in table.sites.items():
        assert result.counted.unique[name] == site.unique
        assert result.counted.active[name] == near(max(site.active.values()), 64)
    assert result.kl <= result.tolerance == 0.01
    assert result.factor_unique == pytest.approx(sum(result.ranks.values()) / sum(result.counted.unique.values()))
    assert sum(result.decomposition[-1].unique.values()) >= sum(result.decomposition[0].unique.values())
    assert json.loads(json.dumps(result.to_json()))["ranks"] == result.ranks


def test_many_at_once_and_wrong_numbers(tiny_run):
    assert [point.total for point in svd_baseline(tiny_run, batches=1, at_once=4).curve] == list(range(24, -1, -4))
    with pytest.raises(ConfigError, match="tolerance -1.0: give nats"):
        svd_baseline(tiny_run, tolerance=-1.0)
    with pytest.raises(ConfigError, match="at_once 0"):
        svd_baseline(tiny_run, at_once=0)
    with pytest.raises(ConfigError, match="batches 0: give 1 or more"):
        svd_baseline(tiny_run, batches=0)
