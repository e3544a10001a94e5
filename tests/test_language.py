"""Language models of transformers: any architecture decomposes, text becomes tokens and back, and what cannot be loaded is refused."""

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from paramlens.errors import BatchError, ConfigError, SiteError
from paramlens.method.decomposition import Decomposition
from paramlens.method.generators import generator
from paramlens.method.masks import Replacement
from paramlens.method.settings import Init
from paramlens.method.sites import at_rest, find_sites
from paramlens.method.start import initialise
from paramlens.runs.decompose import decompose
from paramlens.runs.rundir import open_run
from paramlens.tasks.language_models.encoding import encode, encode_fact, encode_sentence, model_inputs, padded
from paramlens.tasks.language_models.loading import language_skeleton, load_language
from paramlens.tasks.language_models.tokens import token_texts
from rounding import GPT, assert_near, bound

STORIES = Path(__file__).parents[2] / "shared" / "models" / "stories260K"

SMALL = {"vocab_size": 31, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
SHARED = SMALL | {"num_key_value_heads": 2, "max_position_embeddings": 32}
MODELS = {
    "gpt2": (GPT2Config(vocab_size=31, n_positions=32, n_embd=16, n_layer=2, n_head=4), ["transformer.h.*.mlp.*", "*.c_attn[qkv]"], 10),
    "gpt2 whole": (GPT2Config(vocab_size=31, n_positions=32, n_embd=16, n_layer=2, n_head=4), ["transformer.h.*.c_*"], 8),
    "neox": (GPTNeoXConfig(**SMALL, max_position_embeddings=32), ["*.query_key_value[qv]", "*.dense*"], 10),
    "llama": (LlamaConfig(**SHARED), ["model.layers.*_proj"], 14),
    "mistral": (MistralConfig(**SHARED, sliding_window=4), ["model.layers.*_proj"], 14),
    "qwen2": (Qwen2Config(**SHARED), ["*.self_attn.[qk]_proj", "*.down_proj"], 6),
    "qwen3": (Qwen3Config(**SHARED, head_dim=8), ["*.self_attn.*_proj"], 8),
}


def random_model(name: str):
    config, patterns, count = MODELS[name]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2) if parameter.dim() > 1 else torch.nn.init.uniform_(parameter, 0.5, 1)
    return model.eval(), patterns, count


def ids(rows: int = 3, length: int = 6) -> torch.Tensor:
    return torch.randint(31, (rows, length), generator=generator("ids"))


@pytest.mark.parametrize("name", MODELS)
def test_all_masks_at_one_are_the_target_and_none_replaced_is_it_bit_for_bit(name: str):
    """Conv1D, Linear, slices of fused projections: U V = W gives the target's logits, zero masks do not, an empty plan changes no bit."""
    model, patterns, count = random_model(name)
    sites = find_sites(model, patterns)
    assert len(sites) == count
    decomposition = Decomposition(model, sites, C=24)
    initialise(decomposition, Init(kind="svd_rotated"), generator=generator("init"))
    inputs = model_inputs(ids())
    with at_rest(model), torch.no_grad():
        decomposition.find_blocks(inputs)
        target = decomposition.target_run(inputs)
        assert torch.equal(target.logits, model(**inputs).logits)
        ones = {site.name: Replacement(torch.ones(3, 6, 24)) for site in sites}
        off = {site.name: Replacement(torch.zeros(3, 6, 24)) for site in sites}
        single = {sites[-1].name: ones[sites[-1].name]}
        logits = decomposition(inputs, [{}, ones, single, off], target)
        assert torch.equal(decomposition(inputs, [{}])[0], target.logits)
    largest = max(1.0, target.logits.abs().max().item())
    for same in logits[:3]:
        assert_near(same, target.logits, GPT + 8 * 24, size=largest)
    assert (logits[3] - target.logits).abs().max() > 10 * bound(GPT, largest)


@pytest.mark.parametrize("name", ["gpt2", "neox"])
def test_a_slice_of_a_fused_projection_is_what_the_model_uses_for_it(name: str):
    """With the values' slice alone replaced by zero parts, attention adds its output bias and nothing else at every position."""
    model, _, _ = random_model(name)
    [site] = find_sites(model, ["*.0.*c_attn[v]" if name == "gpt2" else "*.0.*query_key_value[v]"])
    decomposition = Decomposition(model, [site], C=4)
    inputs, seen = model_inputs(ids()), []
    output = model.transformer.h[0].attn.c_proj if name == "gpt2" else model.gpt_neox.layers[0].attention.dense
    hook = output.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    with at_rest(model), torch.no_grad():
        decomposition(inputs, [{site.name: Replacement(torch.zeros(3, 6, 4))}])
    hook.remove()
    assert_near(seen[0], site.bias.expand_as(seen[0]), 16)


def test_writing_a_weight_back_changes_nothing():
    """`Site.write(Site.W)` keeps every bit, for a Conv1D, a Linear and slices of both."""
    for name in ("gpt2", "neox"):
        model, patterns, _ = random_model(name)
        before = {key: value.clone() for key, value in model.state_dict().items()}
        for site in find_sites(model, patterns):
            site.write(site.W.clone())
            site.write(site.W + 0)
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_fused_projections_are_taken_whole_or_in_slices():
    model, _, _ = random_model("gpt2")
    assert [site.name for site in find_sites(model, ["*.0.attn.c_attn[qv]"])] == [f"transformer.h.0.attn.c_attn[{part}]" for part in "qv"]
    assert len(find_sites(model, ["*.c_attn[*]"])) == 6
    with pytest.raises(SiteError, match=r"c_attn is taken whole and in slices; leave one of them out"):
        find_sites(model, ["*.c_attn", "*.c_attn[q]"])
    with pytest.raises(SiteError, match=r"sites '\*\.c_attn\[x\]' matches no weight matrix; there are: transformer.h.0.attn.c_attn, "):
        find_sites(model, ["*.c_attn[x]"])


def test_a_tied_head_is_refused_with_both_its_places():
    model, _, _ = random_model("gpt2")
    with pytest.raises(SiteError, match=r"site lm_head: its weight is tied \(transformer.wte.weight = lm_head.weight\)"):
        find_sites(model, ["lm_head"])


class Called(torch.nn.Module):
    """Calls its layers by keyword and returns a tuple, logits first."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = torch.nn.Linear(5, 5), torch.nn.Linear(5, 7)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, int]:
        return self.b(input=self.a(input=x).relu()), 3


def test_keywords_and_tuples(tmp_path: Path):
    torch.manual_seed(0)
    batches = [torch.randn(4, 3, 5)]
    run = decompose(Called(), batches, C=5, steps=2, out=tmp_path / "run", gamma={"kind": "vector", "d_gate": 2}, init={"kind": "svd"})
    assert run.metrics[-1]["evaluation"]["recon"] >= 0
    model = run.task.model
    ones = {name: Replacement(torch.ones(4, 3, 5)) for name in run.decomposition.names}
    with torch.no_grad():
        torch.testing.assert_close(run.decomposition(batches[0], [ones])[0], model(batches[0])[0], rtol=0.05, atol=0.05)


def test_padded_sentences_mark_their_own_tokens(facts_run):
    tokenizer = facts_run.task.tokenizer
    batch = padded(tokenizer, [[5, 6, 7], [8, 9]])
    assert batch.present.tolist() == [[True] * 3, [True, True, False]]
    assert batch.inputs["input_ids"][1].tolist() == [8, 9, 9]
    assert padded(tokenizer, [[5, 6], [8, 9]]).present is None
    assert [len(texts) for texts in batch.texts] == [3, 2]


def test_texts_of_tokens_spell_the_sentence(facts_run):
    tokenizer = facts_run.task.tokenizer
    sentence = "Kobe Bryant plays the sport of basketball"
    assert "".join(token_texts(tokenizer, encode(tokenizer, sentence))) == sentence


def test_answers_of_several_tokens_keep_all_of_them(facts_run):
    tokenizer = facts_run.task.tokenizer
    before, after = encode_fact(tokenizer, "The capital of Zanzibar is", "Stone Town")
    assert tokenizer.decode(before) == "The capital of Zanzibar is"
    assert tokenizer.decode(after) == " Stone Town"
    assert len(after) > 2


def test_what_has_nothing_to_predict_or_to_spell_is_refused(facts_run):
    tokenizer = facts_run.task.tokenizer
    with pytest.raises(BatchError, match=r"sentence 'Kobe': 1 token; give one of two or more"):
        encode_sentence(tokenizer, "Kobe")
    with pytest.raises(BatchError, match=r"answer ' ' to 'Who': give at least one word"):
        encode_fact(tokenizer, "Who", " ")


def test_an_answer_outside_the_vocabulary_is_refused():
    words = Tokenizer(models.WordLevel({"A": 0, "little": 1, "girl": 2, "<unk>": 3}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")
    assert encode_fact(tokenizer, "A little", "girl") == ([0, 1], [2])
    with pytest.raises(BatchError, match=r"answer 'zebra' to 'A little': not in the model's vocabulary, which reads it as \['<unk>'\]"):
        encode_fact(tokenizer, "A little", "zebra")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "nobody/nothing",
            r"model nobody/nothing: no such folder, and http.* cannot be reached.*`hf download .*give ./nothing as the model",
        ),
        ("not a//name", r"model not a//name: no such folder, and no id of a repository, which is user/name"),
    ],
)
def test_an_unknown_model_is_told_plainly(name: str, message: str, monkeypatch: pytest.MonkeyPatch):
    import huggingface_hub.errors

    def unreachable(name: str, **_):
        huggingface_hub.utils.validate_repo_id(name)
        raise huggingface_hub.errors.LocalEntryNotFoundError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    with pytest.raises(ConfigError, match=message):
        load_language(name)


def test_a_folder_without_a_model_is_told_plainly(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"no config.json in it; give a folder that save_pretrained wrote"):
        load_language(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"no weights in safetensors, the one format that is read; in Python, from_pretrained"):
        load_language(str(tmp_path))


def test_the_shape_of_gpt2_needs_no_file():
    model = language_skeleton("gpt2")
    assert sum(parameter.numel() for parameter in model.parameters()) == 124_439_808
    assert next(model.parameters()).device.type == "meta"


def test_a_run_on_the_callers_own_language_model_opens_with_it(tmp_path: Path):
    model, _, _ = random_model("llama")
    batches = [ids()]
    run = decompose(model, batches, sites="*.down_proj", C=4, steps=2, out=tmp_path / "run", gamma={"kind": "shared"}, init={"kind": "svd"})
    again = open_run(run.path, model=model, batches=batches)
    assert all(torch.equal(again.decomposition.U[name], run.decomposition.U[name]) for name in run.decomposition.names)


@pytest.mark.skipif(not STORIES.is_dir(), reason=f"no {STORIES.name} beside the project")
def test_a_really_trained_model_still_tells_stories():
    language = load_language(str(STORIES))
    ids = torch.tensor([encode(language.tokenizer, "Once upon a time, there was a little")])
    with torch.no_grad():
        said = language.model.generate(ids, max_new_tokens=6, do_sample=False)
    assert (
        AutoTokenizer.from_pretrained(STORIES)
        .decode(said[0], skip_special_tokens=True)
        .startswith("Once upon a time, there was a little girl")
    )
