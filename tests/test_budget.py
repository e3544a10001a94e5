"""Memory is looked at before a run: what is foretold is what a process takes, and too little names what to lower, with figures."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from conftest import TINY, TINY_FACTS, tiny_with
from paramlens.config.file import load_config, make_config
from paramlens.errors import ConfigError
from paramlens.kernels import resources
from paramlens.kernels.resources import free_memory
from paramlens.method.importance.network import Importance
from paramlens.method.importance.settings import KINDS
from paramlens.method.sites import find_sites
from paramlens.runs import budget
from paramlens.runs.budget import Footprint, diagnose, footprint, require_memory
from paramlens.runs.decompose import decompose, decompose_config
from paramlens.runs.forecast import diagnose_config, forecast, require_training_room
from paramlens.tasks.induction.model import InductionTransformer


@pytest.fixture(scope="module")
def figure_6():
    config = load_config("gpt2-facts")
    sites, size, _ = forecast(config)
    return config, sites, size


def total(config, sites, size) -> int:
    return diagnose(config, sites, size, libraries=budget.COMPILED).bytes["total"]


def test_too_little_memory_names_each_remedy_with_its_figure(figure_6):
    config, sites, size = figure_6
    needed = total(config, sites, size)
    with pytest.raises(ConfigError) as error:
        require_memory(config, sites, size, free=20 * 2**30)
    text = str(error.value)
    assert f"needs {needed / 2**30:.1f} GiB of memory on cpu, 20.0 GiB are free; lower one of: gamma.kind shared (" in text
    remedies = re.findall(r"(gamma.kind \w+|gamma.d_gate \d+|C \d+) \((\d+(?:\.\d)?) (GiB|MiB)\)", text)
    assert [remedy.split()[0] for remedy, *_ in remedies] == ["gamma.kind", "gamma.kind", "gamma.d_gate", "C"]
    for remedy, figure, unit in remedies:
        field, value = remedy.split()
        changed = load_config("gpt2-facts", overrides={field: value if field == "gamma.kind" else int(value)})
        needed = total(changed, sites, size)
        assert needed < 20 * 2**30
        assert f"{needed / 2**30:.1f}" == figure if unit == "GiB" else f"{needed / 2**20:.0f}" == figure
    found = re.search(r"the first (\d+) of 48: ([\d.]+) GiB", text)
    assert total(config, sites[: int(found[1])], size) <= 20 * 2**30 < total(config, sites[: int(found[1]) + 1], size)


def test_enough_memory_says_nothing(figure_6):
    require_memory(*figure_6, free=90 * 2**30)
    assert free_memory("cpu") > 2**20
    assert free_memory("mps") is None


def test_the_callers_own_rows_count_and_not_the_configurations(monkeypatch):
    """`batch` is of configurations: 64 by default, whatever the caller's batches are."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Embedding(2000, 8), torch.nn.Linear(8, 2000))
    seen = []
    monkeypatch.setattr("paramlens.runs.decompose.require_memory", lambda _config, _sites, size: seen.append(size))
    decompose(model, [torch.zeros(3, 5, dtype=torch.long)], C=2, steps=1, gamma={"kind": "vector", "d_gate": 2})
    [size] = seen
    assert (size.rows, size.length, size.vocabulary, size.last) == (3, 5, 2000, False)


def test_a_batch_that_is_too_large_names_fewer_rows():
    config = tiny_with(gamma={"kind": "vector", "d_gate": 2})
    sites = find_sites(InductionTransformer(config.task), config.sites)
    with pytest.raises(ConfigError, match=r"lower one of: batch \d+ \("):
        require_memory(config, sites, Footprint(2**24, 8, 7, kept=4000), free=9 * 2**30)


def test_what_the_model_keeps_is_counted_as_autograd_does():
    """All of it, for one sequence: inputs of products, and what each elementwise function needs; no parameter, nothing twice."""

    class StoredTensors(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.site, self.after = torch.nn.Linear(6, 10), torch.nn.Linear(10, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.site(x)
            return self.after(y * y.exp())

    torch.manual_seed(0)
    model = StoredTensors()
    size = footprint(model, find_sites(model, ["site"]), torch.randn(9, 3, 6))
    assert (size.rows, size.length, size.vocabulary) == (9, 3, 4)
    site = 4 * 3 * (6 + 1)  # the site's input, and its mask of one subcomponent
    product = 4 * 3 * (10 + 10)  # y and y.exp(); with frozen weights the product itself is not needed
    assert site + product <= size.kept <= site + product + 4 * 3 * 3


@pytest.mark.parametrize("kind", KINDS)
def test_gamma_has_as_many_parameters_as_foretold(kind):
    """At sites of two shapes, with all of γ's numbers: those of each site, and those that all share."""
    config = make_config(TINY_FACTS | {"gamma": {"kind": kind}})
    sites, size, _ = forecast(config)
    assert len({site.d_seen for site in sites}) == 2
    importance = Importance({site.name: (site.d_seen, config.C) for site in sites}, config.gamma, max_length=size.length)
    found = diagnose(config, sites, size)
    assert found.parameters["gamma"] == sum(value.numel() for value in importance.parameters())
    assert found.bytes["gamma"] == 4 * found.parameters["gamma"]


@pytest.mark.parametrize("layers", [1, 3])
def test_what_the_transformer_keeps_is_counted(layers):
    config = make_config(TINY_FACTS | {"gamma": {"kind": "transformer", "layers": layers}})
    sites, size, _ = forecast(config)
    importance = Importance({site.name: (site.d_seen, config.C) for site in sites}, config.gamma)
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[id(tensor.untyped_storage())] = tensor.untyped_storage()
        return tensor

    x = {site.name: torch.ones(size.rows, size.length, site.d_seen) for site in sites}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        importance(x, {site.name: torch.zeros(site.d_seen, config.C) for site in sites})
    own = {id(value.untyped_storage()) for value in importance.parameters()}
    held = sum(storage.nbytes() for key, storage in kept.items() if key not in own)
    trunk = importance.kind.trunk.activations(config.gamma, length=size.length)
    counted = 4 * size.rows * size.length * (trunk + sum(site.d_seen for site in sites))
    assert held <= counted <= 1.2 * held


@pytest.mark.parametrize("name", ["induction-quick", "facts-small"])
def test_the_shape_alone_foretells_what_weights_would(name):
    config = load_config(name, overrides={} if name == "induction-quick" else {"task.miniature.width": 32, "task.miniature.blocks": 2})
    sites, size, target = forecast(config)
    with torch.device("cpu"):
        from paramlens.tasks.facts.miniature import miniature_model

        task = config.task
        model = InductionTransformer(task) if name == "induction-quick" else miniature_model(task.miniature, task.miniature.vocabulary)
    ids = torch.zeros(2, size.length, dtype=torch.long)
    real = footprint(
        model.eval(), find_sites(model, config.sites), ids if name == "induction-quick" else {"input_ids": ids, "use_cache": False}
    )
    assert (size.vocabulary, size.length) == (real.vocabulary, real.length)
    assert target == 4 * sum(value.numel() for value in [*model.parameters(), *model.buffers()])
    assert [site.name for site in sites] == [site.name for site in find_sites(model, config.sites)]
    assert 1 / 1.3 < size.kept / real.kept < 2.1  # on the meta device attention keeps its pattern, which a CPU's fused one does not


LOSSES = {
    "stochastic_recon": 1.0,
    "stochastic_recon_layerwise": 1.0,
    "layerwise_sites": 2,
    "recon": 0.5,
    "faithfulness": 1.0,
    "minimality": 0.1,
}

PEAK = """
import json, sys, psutil, torch
from paramlens.runs import budget
from paramlens.runs.budget import diagnose, footprint
from paramlens.config.file import load_config, make_config
from paramlens import decompose
from paramlens.method.sites import find_sites
from pathlib import Path
kind, fields, out = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
torch.manual_seed(0)
if kind == "toy":
    from paramlens.tasks.induction.model import InductionTransformer
    model, vocabulary = InductionTransformer(load_config("induction-quick").task), 128
else:
    from transformers import GPT2Config, GPT2LMHeadModel
    model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=128, n_head=4, vocab_size=4000, bos_token_id=0, eos_token_id=0)).eval()
    vocabulary = 4000
ids = torch.randint(vocabulary, (32, 64))
inputs = ids if kind == "toy" else {"input_ids": ids, "use_cache": False}
config = make_config({"device": "cpu", **fields})
size = footprint(model, find_sites(model, config.sites), inputs)
standing = psutil.Process().memory_info().rss
foretold = diagnose(config, find_sites(model, config.sites), size, libraries=budget.COMPILED).bytes["total"]
decompose(model, [inputs], out=out, **fields)
lines = Path("/proc/self/status").read_text().splitlines()
peak = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
print(json.dumps({"standing": standing, "foretold": foretold, "peak": peak}))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of a process is read where Linux tells it")
@pytest.mark.parametrize("kind", ["toy", "GPT-2"])
@pytest.mark.slow
@pytest.mark.parametrize("gamma", ["vector", "attention", "transformer"])
def test_a_process_takes_what_was_foretold(kind, gamma, tmp_path):
    sites = ["*.attn.[qkv]"] if kind == "toy" else ["*.c_attn", "*.mlp.*"]
    fields = {"sites": sites, "C": 32, "steps": 2, "threads": 1, "gamma": {"kind": gamma, "d_gate": 8}, "losses": LOSSES}
    command = [sys.executable, "-c", PEAK, kind, json.dumps(fields), str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    whole = (found["standing"] + found["foretold"]) / found["peak"]
    assert 1 / 1.3 < whole < 1.3, found
    beyond = found["foretold"] / (found["peak"] - found["standing"])
    assert 1 / 2 < beyond < 2, found


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"batch": 4_000_000_000}, r"needs \d+\.\d GiB of memory on cpu, [\d.]+ [GM]iB are free; lower one of: .*batch \d+ \("),
        ({"C": 4_000_000_000}, r"needs \d+\.\d GiB of memory .*, C \d+ \("),
        ({"C": 2**62}, "no machine has memory for that many parameters"),
        ({"gamma": {"kind": "attention", "max_length": 2**40}}, r"needs \d+\.\d GiB of memory"),
        ({"gamma": {"kind": "transformer", "width": 2**20}}, r"needs \d+\.\d GiB of memory"),
        ({"gamma": {"kind": "transformer", "width": 2**40}}, r"gamma.width 1099511627776: no machine has memory"),
        ({"task": TINY["task"] | {"width": 2**40}}, "task: the target is larger than any machine's memory"),
        ({"task": TINY["task"] | {"blocks": 2**40}}, "task.blocks: 1099511627776: give 1000 or less"),
        ({"task": TINY["task"] | {"training": {"batch": 4_000_000_000}}}, r"task.training.batch 4000000000: training the target needs"),
        ({"task": {"kind": "facts", "miniature": {"batch": 10**9}}, "sites": ["*.mlp.*"]}, r"task.miniature.batch 1000000000: training"),
    ],
)
def test_absurd_sizes_are_refused_before_anything_is_made(fields, message, tmp_path, monkeypatch):
    """Nothing is drawn, trained or written."""
    monkeypatch.setattr("paramlens.runs.targets.train", lambda *_args, **_how: pytest.fail("a target was trained"))
    with pytest.raises(ConfigError, match=message):
        decompose_config(make_config(TINY | fields), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_container_leaves_less_than_the_machine_has(tmp_path):
    groups = tmp_path / "cgroup"
    groups.write_text("0::/user/job\n")
    assert list(resources._memory_left(tmp_path / "none", groups)) == []

    def group(path: str, **values: str) -> None:
        folder = tmp_path / "fs" / path
        folder.mkdir(parents=True, exist_ok=True)
        for name, value in values.items():
            (folder / name.replace("_", ".", 1)).write_text(value)

    group("user/job", memory_max="max\n", memory_current="7000\n", memory_stat="inactive_file 500\n")
    group("user", memory_max="10000\n", memory_current="9000\n", memory_stat="anon 3\ninactive_file 500\nfile 7\n")
    assert list(resources._memory_left(tmp_path / "fs", groups)) == [1500]
    groups.write_text("9:memory:/old\n8:cpu:/\n")
    group("memory/old", memory_limit_in_bytes="4000\n", memory_usage_in_bytes="5000\n", memory_stat="total_inactive_file 10\n")
    assert list(resources._memory_left(tmp_path / "fs", groups)) == [0]


def test_doctor_counts_target_and_libraries(monkeypatch):
    config = load_config("facts-small")
    told = diagnose_config(config).bytes
    assert told["libraries"] > 100 * 2**20
    assert told["target"] > 4 * 1600 * 128
    assert told["total"] == sum(count for name, count in told.items() if name != "total")
    monkeypatch.setattr("paramlens.runs.forecast.free_memory", lambda _device: 10**6)
    with pytest.raises(ConfigError, match=r"task.miniature.batch 64: training the target needs .* give \d+ or less"):
        require_training_room(config)
