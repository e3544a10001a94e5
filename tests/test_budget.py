"""Memory is looked at before a run: too little names what to lower, with figures that hold."""

import re

import pytest

from paramlens.budget import diagnose, free_memory, require_memory
from paramlens.configfile import load_config
from paramlens.errors import ConfigError
from paramlens.sites import find_sites
from paramlens.targets import skeleton


@pytest.fixture(scope="module")
def figure_6():
    config = load_config("gpt2-facts")
    model, length, vocabulary = skeleton(config)
    return config, find_sites(model, config.sites), {"length": length, "vocabulary": vocabulary}


def total(config, sites, size) -> int:
    return diagnose(config, sites, **size).bytes["total"]


def test_too_little_memory_names_each_remedy_with_its_figure(figure_6):
    config, sites, size = figure_6
    with pytest.raises(ConfigError) as error:
        require_memory(config, sites, **size, free=20 * 2**30)
    text = str(error.value)
    assert "needs 49.1 GiB of memory on cpu, 20.0 GiB are free; lower one of: gamma.kind shared (" in text
    gamma = config.gamma.model_copy
    for field, changed in {
        "gamma.kind shared": {"gamma": gamma(update={"kind": "shared"})},
        "gamma.kind scalar": {"gamma": gamma(update={"kind": "scalar"})},
        "gamma.d_gate 16": {"gamma": gamma(update={"d_gate": 16})},
        "C 192": {"C": 192},
    }.items():
        needed = total(config.model_copy(update=changed), sites, size)
        assert needed < 20 * 2**30
        assert f"{field} ({needed / 2**30:.1f} GiB)" in text
    found = re.search(r"the first (\d+) of 48: ([\d.]+) GiB", text)
    assert total(config, sites[: int(found[1])], size) <= 20 * 2**30 < total(config, sites[: int(found[1]) + 1], size)


def test_enough_memory_says_nothing(figure_6):
    config, sites, size = figure_6
    require_memory(config, sites, **size, free=60 * 2**30)
    assert free_memory("cpu") is None or free_memory("cpu") > 2**20
