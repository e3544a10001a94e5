"""Inputs that people of this field report elsewhere, tried here: each is taken and right, or refused in one plain line.

Every test names a public report of such an input. docs/compatibility.md lists all of them with what happened before.
"""

import collections
import dataclasses
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import nn
from torch.nn.utils import prune

import paramlens
from paramlens.config.file import load_config
from paramlens.errors import ParamLensError
from paramlens.method.decomposition import Decomposition, call
from paramlens.method.generators import generator
from paramlens.method.losses.divergence import LossAt
from paramlens.method.masks import Replacement
from paramlens.method.settings import Init
from paramlens.method.sites import at_rest, find_sites
from paramlens.method.start import initialise
from paramlens.runs.rundir import Run, open_run
from paramlens.tasks.language_models.loading import load_language

VOCABULARY = 11
BATCHES = [torch.randint(1, VOCABULARY, (4, 6), generator=torch.Generator().manual_seed(i)) for i in range(3)]
TOKENS = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0}


class Toy(nn.Module):
    """A model of one block on tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 8)
        self.up, self.down, self.unembed = nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(8, VOCABULARY, bias=False)

    def forward(self, x: torch.Tensor) -> Any:
        hidden = self.embed(x)
        return self.unembed(hidden + self.down(self.middle(self.up(hidden))))

    def middle(self, hidden: torch.Tensor) -> torch.Tensor:
        return torch.relu(hidden)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def short(tmp_path: Path) -> Callable[..., Run]:
    """The shortest run: one step of the smallest γ."""

    def run(model: nn.Module, batches: Any = BATCHES, **fields: Any) -> Run:
        few = {"sites": "*", "C": 4, "steps": 1, "threads": 1, "gamma": {"kind": "vector", "d_gate": 2}, "out": tmp_path / "run"}
        return paramlens.decompose(model, batches, **few | fields)

    return run


def recon(run: Run) -> float:
    return next(line for line in run.metrics if "losses" in line)["losses"]["recon"]


def refused(match: str, function: Callable[[], object]) -> None:
    """Raise unless `function` ends in one line of the library's own that says `match`, with exit code 2."""
    with pytest.raises(ParamLensError, match=match) as caught:
        function()
    assert caught.value.exit_code == 2
    assert len(str(caught.value).splitlines()) == 1


def largest_difference(model: nn.Module, inputs: Any, *, sites: str = "*") -> float:
    """Between the target's logits and those of exact factors with masks of ones, relative to the largest logit."""
    decomposition = Decomposition(model, find_sites(model, [sites]), C=16)
    initialise(decomposition, Init(kind="svd"), generator=generator("start"))
    with at_rest(model), torch.no_grad():
        target = decomposition.target_run(inputs)
        ones = {name: Replacement(torch.ones(*given.shape[:-1], 16)) for name, given in target.inputs.items()}
        logits = decomposition(inputs, [ones])[0]
    return float((logits - target.logits).abs().max() / target.logits.abs().max())


# ---- what a model returns


def giving(function: Callable[[torch.Tensor], Any]) -> nn.Module:
    """A toy whose output is `function` of its logits."""

    class Model(Toy):
        def forward(self, x: torch.Tensor) -> Any:
            return function(super().forward(x))

    torch.manual_seed(0)
    return Model()


Output = collections.namedtuple("Output", "logits cache")


@pytest.mark.parametrize(
    "function",
    [
        pytest.param(lambda logits: (logits.mean(), logits), id="(loss, logits)"),
        pytest.param(lambda logits: (logits.flatten(1).mean(1), logits, [logits]), id="(loss of each sequence, logits, states)"),
        pytest.param(lambda logits: {"loss": logits.mean(), "logits": logits}, id="dict"),
        pytest.param(lambda logits: [logits, logits.mean()], id="list"),
        pytest.param(lambda logits: Output(logits, None), id="namedtuple"),
        pytest.param(lambda logits: dataclasses.make_dataclass("Output", ["loss", "logits"])(None, logits), id="dataclass"),
    ],
)
def test_logits_are_found_in_what_models_return(function: Callable[[torch.Tensor], Any], short: Callable[..., Run]):
    """davidtvs/pytorch-lr-finder#55, meta-pytorch/captum#308, #665 and #1196: a loss before the logits, a dictionary, a list."""
    torch.manual_seed(0)
    plain = Toy()
    assert torch.equal(call(giving(function), BATCHES[0]), call(plain, BATCHES[0]))
    assert short(giving(function)).step == 1


@pytest.mark.parametrize("function", [lambda logits: None, lambda logits: {"scores": logits}, lambda logits: []])
def test_an_output_without_logits_is_refused(function: Callable[[torch.Tensor], Any], short: Callable[..., Run]):
    """meta-pytorch/captum#745: what a model returned is to be named, not what it was given."""
    refused("the model returned (NoneType|dict|list); it must return logits", lambda: short(giving(function)))


def test_log_probabilities_are_logits_too(short: Callable[..., Run], tmp_path: Path):
    """Randl/MobileNetV2-pytorch#5: log_softmax within the model; taken twice it changes nothing."""
    torch.manual_seed(0)
    plain = short(Toy(), out=tmp_path / "plain")
    assert recon(short(giving(lambda logits: logits.log_softmax(-1)))) == pytest.approx(recon(plain), rel=1e-4)


def test_probabilities_are_refused(short: Callable[..., Run]):
    """lansinuote/Huggingface_Toturials#6, clvrai/Relation-Network-Tensorflow#5: softmax within the model is taken twice, silently."""
    refused("the model returns probabilities", lambda: short(giving(lambda logits: logits.softmax(-1))))


def test_divergences_of_low_precision_logits_are_taken_in_float32():
    """vllm-project/speculators#788, OpenRLHF/OpenRLHF#634: a divergence between near distributions is lost in bfloat16."""
    target = torch.randn(2, 3, 50, generator=torch.Generator().manual_seed(1)).bfloat16()
    masked = (target + 0.05 * torch.randn(2, 3, 50, generator=torch.Generator().manual_seed(2))).bfloat16()
    at = LossAt()
    found = at.divergence(at.log_probs(target), masked[None])
    p, q = (logits.double().log_softmax(-1) for logits in (target, masked))
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-4)


# ---- what a model does while it runs


def test_a_model_may_write_into_what_it_is_given(short: Callable[..., Run]):
    """huggingface/transformers#47741: CTRL and others write into the caller's inputs_embeds, so that a second call gives other logits."""
    config = transformers.CTRLConfig(vocab_size=VOCABULARY, n_embd=8, n_layer=1, n_head=2, dff=12, n_positions=16)
    batches = [{"inputs_embeds": torch.randn(2, 5, 8)} for _ in range(2)]
    before = [batch["inputs_embeds"].clone() for batch in batches]
    short(transformers.CTRLLMHeadModel(config), batches, sites="*.ffn.*", steps=2)
    assert all(torch.equal(batch["inputs_embeds"], kept) for batch, kept in zip(batches, before, strict=True))


def test_running_statistics_stay(short: Callable[..., Run]):
    """kdexd/virtex#16: BatchNorm and dropout in training mode; statistics and mode are as they were."""
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Linear(5, 4))
    model(torch.randn(8, 6))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    short(model, [torch.randn(4, 6)])
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("kind", ["dropout", "batch statistics"])
def test_models_that_no_batch_repeats_are_refused(kind: str, short: Callable[..., Run]):
    """pytorch/pytorch#26338, karpathy/nanoGPT#240: F.dropout listens to no mode; statistics of a batch join its rows."""

    class Model(Toy):
        def middle(self, hidden: torch.Tensor) -> torch.Tensor:
            if kind == "dropout":
                return nn.functional.dropout(hidden, 0.5)
            return nn.functional.batch_norm(hidden.transpose(1, 2), None, None, training=True).transpose(1, 2)

    refused("logits for the same batch differ from run to run|plans stacked along the batch differ", lambda: short(Model()))


# ---- batches


def test_a_cache_in_a_batch_is_refused_and_untouched(short: Callable[..., Run]):
    """huggingface/transformers#17490 and #13849: past_key_values, which every call makes longer."""
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**TOKENS, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2)
    )
    with torch.no_grad():
        cache = model(BATCHES[0][:, :3], use_cache=True).past_key_values
    batch = {"input_ids": BATCHES[0][:, 3:], "past_key_values": cache}
    refused("past_key_values is a cache", lambda: short(model, [batch], sites="*.mlp.*"))
    assert cache.get_seq_length() == 3


def test_a_batch_without_values_is_refused(short: Callable[..., Run]):
    """hiyouga/LlamaFactory#3062: "Cannot copy out of meta tensor; no data!"."""
    refused("batch 0: is on the meta device", lambda: short(Toy(), [BATCHES[0].to("meta")]))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_either_kind_of_token_numbers_is_taken(dtype: torch.dtype, short: Callable[..., Run]):
    """jadore801120/attention-is-all-you-need-pytorch#48: int32 tokens, as NumPy made them on Windows."""
    assert short(Toy(), [batch.to(dtype) for batch in BATCHES]).step == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(lambda tokens: tokens + VOCABULARY, "step 1: .*below the size of the vocabulary", id="beyond the vocabulary"),
        pytest.param(lambda tokens: -tokens, "step 1: .*below the size of the vocabulary", id="negative"),
        pytest.param(lambda tokens: tokens.double(), "step 1: .*DoubleTensor", id="float64"),
        pytest.param(lambda tokens: tokens.to(torch.uint8), "step 1: .*ByteTensor", id="bytes"),
    ],
)
def test_a_later_batch_that_the_model_cannot_take(change: Callable[..., Any], message: str, short: Callable[..., Run]):
    """huggingface/transformers#15867, shoarora/transformers-trainers#12 (int16), pytorch/pytorch#105243: an error of torch in mid-run."""
    refused(message, lambda: short(Toy(), [BATCHES[0], change(BATCHES[1])], steps=2))


@pytest.mark.parametrize("shape", [(1, 1), (1, 6), (4, 1)])
@pytest.mark.parametrize("kind", ["vector", "attention"])
def test_one_sequence_of_one_token(shape: tuple[int, int], kind: str, short: Callable[..., Run]):
    """TransformerLensOrg/TransformerLens#245: batches and sequences of length one lose an axis."""
    batch = BATCHES[0][: shape[0], : shape[1]]
    assert short(Toy(), [batch], gamma={"kind": kind, "d_gate": 2}, last_token_only=True).step == 1


# ---- sites and weights


def test_hooks_of_ones_own_are_kept_and_obeyed():
    """TransformerLensOrg/TransformerLens#985: hooks of one's own that change what a site is given, by keyword too, and what it makes."""

    class Model(Toy):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            hidden = self.embed(x)
            return self.unembed(hidden + self.down(torch.relu(self.up(input=hidden))))

    model = Model()
    model.up.register_forward_pre_hook(lambda module, args, kwargs: (args, {"input": kwargs["input"] * 3}), with_kwargs=True)
    model.down.register_forward_hook(lambda module, args, output: output * 2)
    assert largest_difference(model, BATCHES[0]) < 1e-5
    assert (len(model.up._forward_pre_hooks), len(model.down._forward_hooks)) == (1, 1)


def test_layers_within_adapters_are_sites():
    """huggingface/peft#1057: a LoRA layer holds the layer that it stands for, and two of its own."""

    class Adapter(nn.Module):
        def __init__(self, base_layer: nn.Linear) -> None:
            super().__init__()
            self.base_layer = base_layer
            self.lora_A, self.lora_B = nn.Linear(8, 2, bias=False), nn.Linear(2, 12, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.base_layer(x) + self.lora_B(self.lora_A(x))

    model = Toy()
    model.up = Adapter(model.up)  # pyright: ignore[reportAttributeAccessIssue]
    assert largest_difference(model, BATCHES[0]) < 1e-5


def test_a_wrapper_that_hands_attributes_on_is_a_model(short: Callable[..., Run]):
    """huggingface/peft#1401: `__getattr__` asks the model within."""

    class Wrapper(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.base_model = model

        def __getattr__(self, name: str) -> Any:
            try:
                return super().__getattr__(name)
            except AttributeError:
                return getattr(self.base_model, name)

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return self.base_model(*args, **kwargs)

    assert short(Wrapper(Toy())).decomposition.names == ("base_model.up", "base_model.down", "base_model.unembed")


@pytest.mark.parametrize(
    ("model", "sites"),
    [
        pytest.param(nn.Sequential(nn.Linear(1, 5), nn.Tanh(), nn.Linear(5, 1), nn.Tanh(), nn.Linear(1, 3)), "*", id="width 1"),
        pytest.param(Toy(), "*", id="C above every width"),
    ],
)
@pytest.mark.parametrize("kind", ["svd", "svd_rotated", "random"])
def test_narrow_weights_and_many_subcomponents(model: nn.Module, sites: str, kind: str, short: Callable[..., Run]):
    """MuLabPKU/PiSSA#16: sites of width 1; more subcomponents than a weight has rank."""
    batches = BATCHES if isinstance(model, Toy) else [torch.randn(4, 1)]
    assert short(model, batches, sites=sites, C=40, init={"kind": kind}).step == 1


@pytest.mark.parametrize("rank", [0, 1])
def test_weights_of_low_rank_are_kept_exactly(rank: int, short: Callable[..., Run]):
    """syp2ysy/SVF#17: the singular values of a weight become nan; here a weight of zeros, or of one direction."""
    model = Toy()
    with torch.no_grad():
        model.up.weight.copy_(rank * torch.outer(torch.randn(12), torch.randn(8)))
    run = short(model, sites=["up", "unembed"], C=8, init={"kind": "svd_rotated"}, optim={"project_from": 0.0})
    made = run.decomposition.U["up"] @ run.decomposition.V["up"]
    assert torch.allclose(made.T, model.up.weight, atol=1e-5)


def test_layers_shared_by_blocks_are_refused(short: Callable[..., Run]):
    """google-research/albert#200, ultralytics/ultralytics#15757: one layer that stands for all of them is called once a block."""
    config = transformers.AlbertConfig(
        vocab_size=VOCABULARY, embedding_size=8, hidden_size=8, intermediate_size=12, num_hidden_layers=3, num_attention_heads=2
    )
    model = transformers.AlbertForMaskedLM(config)
    refused("the model calls it 3 times per run", lambda: short(model, [{"input_ids": BATCHES[0]}], sites="*.ffn"))


def test_a_weight_used_without_its_module_is_a_site(short: Callable[..., Run]):
    """pytorch/pytorch#78109: nn.MultiheadAttention reads out_proj's weight and never calls it."""

    class Model(Toy):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def middle(self, hidden: torch.Tensor) -> torch.Tensor:
            h = hidden[..., :8]
            return torch.cat([self.attention(h, h, h)[0], hidden[..., 8:]], -1)

    assert short(Model(), sites="attention.out_proj").decomposition.names == ("attention.out_proj",)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("change", ["weight_norm", "spectral_norm", "prune"])
def test_computed_weights_are_refused(change: str, short: Callable[..., Run]):
    """pytorch/pytorch#69353: pruned or normalised weights are made anew at every call, so that an edit of them is lost."""
    model = Toy()
    if change == "prune":
        prune.l1_unstructured(model.up, "weight", 0.5)
    else:
        getattr(nn.utils, change)(model.up)
    refused("site up: its weight is computed", lambda: short(model, sites="up"))


@pytest.mark.parametrize("sites", [{"up"}, ("up",), "up", iter(["up"])])
def test_patterns_come_in_any_series(sites: Any, short: Callable[..., Run]):
    """instructlab/training#40, foundation-model-stack/fms-hf-tuning#39: modules as a string, a set, a tuple, a generator."""
    assert short(Toy(), sites=sites).decomposition.names == ("up",)


def test_sites_that_are_no_patterns_are_refused(short: Callable[..., Run]):
    """instructlab/training#40: None, or the modules themselves."""
    refused("sites: None; give patterns", lambda: short(Toy(), sites=None))
    model = Toy()
    refused("sites.0: Linear.*give text", lambda: short(model, sites=[model.up]))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(value: float, short: Callable[..., Run]):
    """NikoNairre/CT-CIG#4 and huggingface/transformers#8221: nan and inf in a checkpoint; where no site holds them they do not matter."""
    model = Toy()
    model.unused = nn.Linear(3, 3)
    nn.init.constant_(model.unused.weight, value)
    assert short(model, sites=["up", "down"]).step == 1
    with torch.no_grad():
        model.up.weight[0, 0] = -value
    refused("site up: its weight holds values that are not finite", lambda: short(model, sites=["up", "down"], overwrite=True))


def test_an_attribute_for_every_name_is_no_compiled_model(short: Callable[..., Run]):
    """huggingface/peft#1349: a wrapper whose `__getattr__` knows every name."""

    class Model(Toy):
        def __getattr__(self, name: str) -> Any:
            try:
                return super().__getattr__(name)
            except AttributeError:
                return None

    assert short(Model()).step == 1


def test_wrapped_and_compiled_models_are_refused(short: Callable[..., Run]):
    """archinetai/surgeon-pytorch#1, pytorch/pytorch#101107: copies of DataParallel, and torch.compile's `_orig_mod`."""
    refused("wrapped in DataParallel", lambda: short(nn.DataParallel(Toy())))
    refused("compiled by torch.compile", lambda: short(torch.compile(Toy(), backend="eager")))


def test_weights_without_values_are_refused(short: Callable[..., Run]):
    """tloen/alpaca-lora#368: weights offloaded by device_map lie on the meta device."""
    model = Toy()
    model.up = nn.Linear(8, 12, device="meta")
    refused("model.up.weight: is on the meta device", lambda: short(model))


# ---- numbers


def test_numbers_of_numpy_are_numbers(short: Callable[..., Run]):
    """UCL-CCS/EasyVVUQ#138, bigscience-workshop/lm-evaluation-harness#94: a sweep's np.int64 is "not an integer"."""
    run = short(Toy(), C=np.int64(4), steps=np.int32(1), seed=np.uint8(3), optim={"lr": np.float32(0.5), "betas": (np.float64(0.5), 0.9)})
    assert run.config == load_config(run.path / "config.yaml")
    assert (run.config.C, run.config.seed, run.config.optim.lr, run.config.optim.betas) == (4, 3, 0.5, (0.5, 0.9))


@pytest.mark.parametrize("value", [np.float64(3), np.bool_(True), np.array(3), torch.tensor(3)])
def test_other_numbers_of_steps_are_refused(value: Any, short: Callable[..., Run]):
    """UCL-CCS/EasyVVUQ#147: what is no whole number stays refused."""
    refused("steps: .*give a whole number", lambda: short(Toy(), steps=value))


@pytest.mark.parametrize("seed", [2**63, 2**64 - 1])
def test_large_seeds_are_taken(seed: int, short: Callable[..., Run]):
    """pytorch/torchtitan#746: a seed above 2**63."""
    assert short(Toy(), seed=seed).config.seed == seed


@pytest.mark.parametrize("seed", [2**64, 2**70, -1])
def test_seeds_beyond_the_generators_are_refused(seed: int, short: Callable[..., Run]):
    """pytorch/torchtitan#746, ecmwf/anemoi-core#1217: a seed that no generator takes."""
    refused("seed: .*give", lambda: short(Toy(), seed=seed))


@pytest.mark.parametrize(
    ("written", "message"), [("010", "010 is 8 in YAML 1.1 and 10"), ("1:30", "1:30 is 90 in YAML 1.1"), ("0o10", "give a whole number")]
)
def test_numbers_that_yaml_reads_in_two_ways_are_refused(written: str, message: str, tmp_path: Path):
    """yaml/pyyaml#107, opensanctions/opensanctions#3845: 010 is octal, 1:30 is in base 60."""
    file = tmp_path / "config.yaml"
    file.write_text(f"steps: {written}\n", encoding="utf-8")
    refused(message, lambda: load_config(file))


# ---- places


def test_batches_may_change_the_directory(short: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """hydra-ecosystem/hydra#990: the working directory changes while a run with a relative path is under way, and after it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()

    def batch(step: int) -> torch.Tensor:
        os.chdir(tmp_path / "elsewhere" if step else tmp_path)
        return BATCHES[step % 3]

    run = short(Toy(), batch, out="run", steps=3, checkpoint={"every": 1})
    assert run.path == tmp_path / "run"
    assert run.step == 3
    assert not any((tmp_path / "elsewhere").iterdir())
    assert paramlens.circuit(run, batches=1, adversary=0).metrics


@pytest.mark.parametrize("name", ["x" * 300, "a\0b", "a\udcffb"])
def test_names_that_no_file_can_have_are_refused(name: str, short: Callable[..., Run], tmp_path: Path):
    """bitsandbytes-foundation/bitsandbytes#35, Aider-AI/aider#3022: "File name too long" out of a question whether it exists."""
    refused("cannot be a directory of a run", lambda: short(Toy(), out=tmp_path / name))
    refused("cannot be a directory of a run|no such run", lambda: open_run(str(tmp_path / name)))
    refused("cannot be read|no configuration", lambda: load_config(name))
    refused("no such folder", lambda: load_language(name))


@pytest.mark.parametrize("name", ["two words", "ünï 🙂 'quoted' \"#%?", "line\nbreak", "-dash"])
def test_names_that_files_can_have_are_taken(name: str, short: Callable[..., Run], tmp_path: Path):
    """ggml-org/llama.cpp#5802: letters beyond ASCII, spaces, quotes and line breaks in a path."""
    run = short(Toy(), out=tmp_path / name)
    assert open_run(tmp_path / name, model=run.decomposition.model).step == 1


# ---- processes and threads


def test_a_run_in_another_thread(short: Callable[..., Run]):
    """ndif-team/nnsight#280: served from a thread that is not the main one."""
    runs: list[Run] = []
    thread = threading.Thread(target=lambda: runs.append(short(Toy())))
    thread.start()
    thread.join()
    assert runs[0].step == 1


def test_one_model_in_two_threads_is_refused(short: Callable[..., Run], tmp_path: Path):
    """ndif-team/nnsight#280, huggingface/transformers#43765: forwards replaced by one thread are run by the other."""
    model, under_way, tried = Toy(), threading.Event(), threading.Event()

    def batch(step: int) -> torch.Tensor:
        under_way.set()
        assert tried.wait(60)
        return BATCHES[step % 3]

    runs: list[Run] = []
    thread = threading.Thread(target=lambda: runs.append(short(model, batch, out=tmp_path / "first")))
    thread.start()
    assert under_way.wait(60)
    try:
        refused("model: another thread is running it", lambda: short(model, out=tmp_path / "second"))
    finally:
        tried.set()
        thread.join()
    assert runs[0].step == 1
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
