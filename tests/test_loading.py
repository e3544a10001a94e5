"""Folders of models as people have them: loaded whole or refused in one line; what a model can be given; saved so that it loads again."""

import copy
import json
from pathlib import Path

import pytest
import torch
import transformers as T
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from paramlens.analysis.edit import Edit
from paramlens.analysis.trace import trace
from paramlens.cli.main import main
from paramlens.config.file import make_config
from paramlens.errors import BatchError, ConfigError
from paramlens.runs.decompose import decompose_config
from paramlens.runs.rundir import open_run
from paramlens.tasks.base import Target
from paramlens.tasks.facts.facts import read_facts, recall, shipped_facts
from paramlens.tasks.facts.sentences import facts_task, require_different
from paramlens.tasks.facts.task import FactsTask
from paramlens.tasks.language_models.encoding import encode, encode_sentence, padded
from paramlens.tasks.language_models.limits import that_fit, token_limit
from paramlens.tasks.language_models.loading import load_language, save_language
from paramlens.tasks.text.pieces import packed, read_documents, text_task
from paramlens.tasks.text.task import TextTask

KOBE, TIGER = "Kobe Bryant plays the sport of basketball", "Tiger Woods plays the sport of golf"
SIZES = {"vocab_size": 300, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
ENDS = {"bos_token_id": 0, "eos_token_id": 0}
SHARED = SIZES | ENDS | {"num_key_value_heads": 2, "max_position_embeddings": 64}
GPT2 = {"vocab_size": 300, "n_positions": 64, "n_embd": 16, "n_layer": 2, "n_head": 4} | ENDS


def llama(**changes: object) -> T.LlamaConfig:
    return T.LlamaConfig(**{**SHARED, **changes})


def gpt2(**changes: object) -> T.GPT2Config:
    return T.GPT2Config(**{**GPT2, **changes})


CAUSAL = {
    "gpt2": gpt2(),
    "gpt2 untied": gpt2(tie_word_embeddings=False),
    "llama": llama(),
    "llama tied": llama(tie_word_embeddings=True),
    "gemma": T.GemmaConfig(**SHARED, head_dim=4),
    "gemma untied": T.GemmaConfig(**SHARED, head_dim=4, tie_word_embeddings=False),
    "mistral": T.MistralConfig(**SHARED, sliding_window=4),
    "mixtral": T.MixtralConfig(**SHARED, num_local_experts=4),
    "neox": T.GPTNeoXConfig(**SIZES, **ENDS, max_position_embeddings=64),
    "gptj": T.GPTJConfig(**GPT2 | {"n_head": 2}, rotary_dim=4),
    "opt": T.OPTConfig(
        **ENDS, vocab_size=300, hidden_size=16, ffn_dim=24, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=16
    ),
    "bloom": T.BloomConfig(vocab_size=300, hidden_size=16, n_layer=2, n_head=4, **ENDS),
    "mpt": T.MptConfig(vocab_size=300, d_model=16, n_layers=2, n_heads=4, max_seq_len=16),
    "mamba": T.MambaConfig(vocab_size=300, hidden_size=16, num_hidden_layers=2, state_size=4, **ENDS),
    "phi": T.PhiConfig(**SHARED),
    "qwen2": T.Qwen2Config(**SHARED),
    "bert as a decoder": T.BertConfig(**SIZES, is_decoder=True),
}


@pytest.fixture(scope="module")
def words() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


def byte_tokenizer(**special: str) -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator([KOBE, TIGER], trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=bpe, **special)


def random_model(config: T.PreTrainedConfig):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2) if parameter.dim() > 1 else parameter.uniform_(0.5, 1)
    return model.eval()


def folder(path: Path, config: T.PreTrainedConfig, tokenizer: PreTrainedTokenizerFast | None = None) -> Path:
    random_model(config).save_pretrained(path)
    (tokenizer or byte_tokenizer()).save_pretrained(path)
    return path


def logits(model, ids: list[int] = [5, 80, 17, 200, 9, 42]):  # noqa: B006
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids]), use_cache=False).logits


def assert_same_model(model, other) -> None:
    """The same weights, bit for bit, and the same logits but for rounding, in which products depend on where memory lies."""
    ours, theirs = model.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    torch.testing.assert_close(logits(model), logits(other), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CAUSAL)
def test_a_whole_folder_loads_and_what_is_saved_comes_back(name: str, tmp_path: Path):
    """Tied and untied heads, buffers that no file has, experts, windows and states: nothing of them counts as missing or not causal."""
    model = random_model(CAUSAL[name])
    save_language(model, byte_tokenizer(), tmp_path / "model")
    loaded = load_language(str(tmp_path / "model"))
    assert_same_model(loaded.model, model)
    assert not loaded.model.training


def change_weights(path: Path, change) -> None:
    file = path / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def change_config(path: Path, **fields: object) -> None:
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields), encoding="utf-8")


def break_prefix(path: Path) -> None:
    change_weights(path, lambda weights: {f"wrapped.{key}": value for key, value in weights.items()})


def break_layers(path: Path) -> None:
    change_config(path, num_hidden_layers=3)


def break_fewer_layers(path: Path) -> None:
    change_config(path, num_hidden_layers=1)


def break_shapes(path: Path) -> None:
    change_config(path, intermediate_size=40)


def break_header(path: Path) -> None:
    (path / "model.safetensors").write_bytes(b"\xff" * 64)


def break_half(path: Path) -> None:
    content = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(content[: len(content) // 2])


def break_empty(path: Path) -> None:
    (path / "model.safetensors").write_bytes(b"")


def break_shard(path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(path)
    (path / "model.safetensors").unlink()
    model.save_pretrained(path, max_shard_size="5KB")
    next(path.glob("model-00002-of-*")).unlink()


def break_index(path: Path) -> None:
    (path / "model.safetensors").rename(path / "model-00001-of-00001.safetensors")
    (path / "model.safetensors.index.json").write_text("{", encoding="utf-8")


def break_pickle(path: Path) -> None:
    (path / "model.safetensors").rename(path / "pytorch_model.bin")


def break_gguf(path: Path) -> None:
    (path / "model.safetensors").rename(path / "model.gguf")


def break_json(path: Path) -> None:
    (path / "config.json").write_text("{", encoding="utf-8")


def break_json_list(path: Path) -> None:
    (path / "config.json").write_text("[]", encoding="utf-8")


def break_type(path: Path) -> None:
    change_config(path, model_type="foo")


def break_code(path: Path) -> None:
    change_config(path, model_type="foo", auto_map={"AutoModelForCausalLM": "modeling_foo.Foo"})


def break_value(path: Path) -> None:
    change_config(path, hidden_size="wide")


def break_kind(path: Path) -> None:
    change_config(path, model_type="t5")


def break_adapter(path: Path) -> None:
    (path / "adapter_config.json").write_text("{}", encoding="utf-8")


def break_nan(path: Path) -> None:
    change_weights(path, lambda weights: weights | {"model.norm.weight": weights["model.norm.weight"] * torch.nan})


def break_tokenizer(path: Path) -> None:
    (path / "tokenizer.json").write_text("{", encoding="utf-8")


def break_tokenizer_list(path: Path) -> None:
    (path / "tokenizer_config.json").write_text("[]", encoding="utf-8")


def break_no_tokenizer(path: Path) -> None:
    (path / "tokenizer.json").unlink()
    (path / "tokenizer_config.json").unlink()


BROKEN = {
    break_prefix: r"its files lack 21 of 21 weights of LlamaForCausalLM \(lm_head.weight, model.embed_tokens.weight, .*would be random",
    break_layers: r"its files lack 9 of 30 weights of LlamaForCausalLM \(model.layers.2.input_layernorm.weight, ",
    break_fewer_layers: r"its files hold layers that its config.json leaves out \(model.layers.1.input_layernorm.weight\)",
    break_shapes: r"model.layers.0.mlp.down_proj.weight is \(16, 24\) in its files and \(16, 40\) by its config.json \(and 5 more\)",
    break_header: r"its model.safetensors is cut off or damaged \(.*header too large\); fetch it again",
    break_half: r"its model.safetensors is cut off or damaged \(",
    break_empty: r"its model.safetensors is cut off or damaged \(",
    break_shard: r"1 of \d+ weight files are missing, model-00002-of-\d+.safetensors first",
    break_index: r"its model.safetensors.index.json cannot be read",
    break_pickle: r"no weights in safetensors, the one format that is read; pytorch_model.bin is not opened",
    break_gguf: r"no weights in safetensors, the one format that is read; model.gguf is not opened",
    break_json: r"its config.json cannot be read",
    break_json_list: r"its config.json is no JSON object",
    break_type: r"model_type 'foo' in its config.json is none that transformers [\d.]+ has",
    break_code: r"it needs code of its own \(auto_map in config.json\), which is never run",
    break_value: r"transformers cannot load a causal language model from it \(Validation error for field 'hidden_size': TypeError",
    break_kind: r"transformers cannot load a causal language model from it \(Unrecognized configuration class .*T5Config",
    break_adapter: r"an adapter \(adapter_config.json\), whose weights belong to another model",
    break_nan: r"its logits are not finite",
    break_tokenizer: r"its tokenizer cannot be loaded",
    break_tokenizer_list: r"its tokenizer cannot be loaded",
    break_no_tokenizer: r"no tokenizer in the folder; put the tokenizer files of the model there",
}


@pytest.mark.parametrize("break_it", BROKEN, ids=lambda each: each.__name__)
def test_a_broken_folder_is_refused_in_one_line(break_it, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    path = folder(tmp_path / "model", llama())
    break_it(path)
    capfd.readouterr()
    with pytest.raises(ConfigError, match=BROKEN[break_it]) as refused:
        load_language(str(path))
    assert "\n" not in str(refused.value)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("break_it", [break_prefix, break_half, break_json, break_no_tokenizer], ids=lambda each: each.__name__)
def test_the_command_line_refuses_a_broken_folder_with_2(break_it, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = folder(tmp_path / "model", llama())
    break_it(path)
    capsys.readouterr()
    assert main(["trace", str(path), "--prompt", KOBE, "--subject", "Kobe"]) == 2
    assert capsys.readouterr().err.startswith(f"paramlens: model {path}: ")


def test_a_damaged_file_beside_the_weights_does_not_matter(tmp_path: Path):
    path = folder(tmp_path / "model", llama())
    (path / "consolidated.safetensors").write_bytes(b"cut")
    load_language(str(path))


def test_a_model_without_the_head_in_its_folder_is_refused_unless_the_head_is_tied(tmp_path: Path, words):
    for name, model in (("gpt2", T.GPT2Model(gpt2())), ("llama", T.LlamaModel(llama()))):
        model.save_pretrained(tmp_path / name)
        words.save_pretrained(tmp_path / name)
    load_language(str(tmp_path / "gpt2"))
    with pytest.raises(ConfigError, match=r"its files lack 1 of 21 weights of LlamaForCausalLM \(lm_head.weight\)"):
        load_language(str(tmp_path / "llama"))


@pytest.mark.parametrize("name", ["empty GPT-2", "empty BERT", "none"])
def test_a_folder_without_a_tokenizer_says_so(name: str, tmp_path: Path):
    """Of GPT-2 transformers would make an empty tokenizer, of BERT one that knows nothing, of Llama none."""
    config = {"empty GPT-2": gpt2(), "empty BERT": T.BertConfig(**SIZES, is_decoder=True), "none": llama()}[name]
    random_model(config).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="no tokenizer in the folder"):
        load_language(str(tmp_path))


@pytest.mark.parametrize("kind", [T.BertConfig, T.RobertaConfig, T.ElectraConfig, T.RoFormerConfig])
@pytest.mark.parametrize("std", [0.2, 0.02])
def test_a_model_that_sees_later_tokens_is_refused(kind, std: float, tmp_path: Path, words):
    """Also where its weights are as small as at the start of training."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(kind(**SIZES, max_position_embeddings=64, initializer_range=std))
    model.save_pretrained(tmp_path)
    words.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"is not causal: its logits at a token change by .* when later tokens change"):
        load_language(str(tmp_path))


@pytest.mark.parametrize(
    ("config", "limit"),
    [
        (gpt2(n_positions=16), 16),
        (
            T.OPTConfig(vocab_size=300, hidden_size=16, ffn_dim=24, num_hidden_layers=1, num_attention_heads=4, max_position_embeddings=16),
            16,
        ),
        (T.GPTJConfig(**GPT2 | {"n_head": 2, "n_positions": 16}, rotary_dim=4), 16),
        (CAUSAL["mpt"], 16),
        (llama(max_position_embeddings=16), None),
        (CAUSAL["bloom"], None),
        (CAUSAL["mamba"], None),
        (T.XGLMConfig(vocab_size=300, d_model=16, ffn_dim=24, num_layers=1, attention_heads=4, max_position_embeddings=16), None),
    ],
    ids=["gpt2", "opt", "gptj", "mpt", "llama", "bloom", "mamba", "xglm"],
)
def test_how_many_tokens_a_model_takes_is_found_by_trying(config, limit: int | None):
    model = random_model(config)
    assert token_limit(model, 16) is None
    assert token_limit(model, 17) == limit
    assert that_fit(model, [[1] * 17, [1] * 16]) == ([[1] * 16] if limit else [[1] * 17, [1] * 16])


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 of 16 positions."""
    return folder(tmp_path_factory.mktemp("models") / "short", gpt2(n_positions=16))


def facts_config(model: Path | str, sentences: list[str] | None = None, **task: object):
    sites, gamma = ["*.mlp.*"], {"kind": "vector", "d_gate": 4}
    tree = {"kind": "facts", "model": str(model), "sentences": sentences or [KOBE, TIGER], **task}
    return make_config({"steps": 2, "C": 4, "sites": sites, "threads": 1, "batch": 2, "gamma": gamma, "log_every": 1, "task": tree})


def test_text_that_is_longer_than_the_model_is_refused_everywhere(short: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    language = load_language(str(short))
    long = f"{KOBE}, {TIGER}, {KOBE} and golf"
    source = tmp_path / "text.txt"
    source.write_text(f"{long}\n" * 20, encoding="utf-8")
    takes = r"\d+ tokens, and the model takes at most 16; give at most that many"
    with pytest.raises(BatchError, match=rf"task.source .*text.txt in pieces of task.length 32: {takes}"):
        text_task(TextTask(source=str(source), length=32), language, seed=0, batch=2)
    with pytest.raises(BatchError, match=f"sentence '{long}': {takes}"):
        facts_task(FactsTask(sentences=(long, TIGER)), language, seed=0)
    with pytest.raises(BatchError, match=f"prompt '{long}' with its answer: {takes}"):
        trace(language.model, language.tokenizer, long, "Kobe")
    with pytest.raises(BatchError, match=f"fact .*: {takes}"):
        recall(language.model, language.tokenizer, shipped_facts())
    with pytest.raises(ConfigError, match=r"task.sentences: 20 tokens, and the model takes at most 16"):
        facts_config(short, [" ".join(["golf"] * 19), TIGER]).task.skeleton(batch=1)
    assert main(["trace", str(short), "--prompt", long, "--subject", "Kobe"]) == 2
    assert "takes at most 16" in capsys.readouterr().err


def test_other_facts_that_are_too_long_are_not_drawn(short: Path):
    language = load_language(str(short))
    others = that_fit(language.model, [encode(language.tokenizer, fact.sentence) for fact in shipped_facts()])
    assert 0 < len(others) < len(shipped_facts())
    task = facts_task(FactsTask(sentences=(KOBE, TIGER), others=4, elsewhere=4), language, seed=0)
    assert task.elsewhere is not None
    for step in range(8):
        assert max(task.batch(step, "train").inputs["input_ids"].shape[1], task.elsewhere(step).inputs["input_ids"].shape[1]) <= 16


def test_a_padding_token_outside_the_table_is_not_used(tmp_path: Path):
    """A tokenizer with a padding token of its own, the model's table as it was; an added word that is used is refused."""
    path = folder(tmp_path / "model", llama(vocab_size=len(byte_tokenizer())), byte_tokenizer(pad_token="[PAD]"))
    language = load_language(str(path))
    assert language.tokenizer.pad_token_id == language.model.config.vocab_size
    batch = facts_task(FactsTask(sentences=(KOBE, TIGER)), language, seed=0).batch(0, "train")
    assert batch.present is not None
    assert batch.inputs["input_ids"].max() < language.model.config.vocab_size
    with pytest.raises(
        BatchError, match=r"sentence 'Kobe \[PAD\] golf': the tokenizer gives token \d+, and the model's embedding has \d+ rows"
    ):
        facts_task(FactsTask(sentences=("Kobe [PAD] golf", TIGER)), language, seed=0)


def test_what_a_sequence_is_filled_up_with_does_not_matter(words):
    model = random_model(gpt2())
    batch = padded(words, [encode(words, KOBE), encode(words, TIGER)])
    length = len(encode(words, TIGER))
    with torch.no_grad():
        filled = model(**batch.inputs).logits[1, :length]
    torch.testing.assert_close(filled, logits(model, encode(words, TIGER))[0])


@pytest.mark.parametrize("moved", [False, True])
def test_a_run_on_a_relative_path_opens_and_goes_on_from_any_folder(moved: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path, elsewhere = folder(tmp_path / "here" / "model", llama()), tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(path.parent)
    config = facts_config("model")
    run = decompose_config(config, out=tmp_path / "run")
    assert run.config.task.model == str(path)
    for place in (path.parent, elsewhere):
        monkeypatch.chdir(place)
        assert open_run(run.path).task.tokenizer is not None
        assert decompose_config(config, out=run.path, resume=True).config.task.model == str(path)
    if moved:
        path.rename(tmp_path / "away")
        with pytest.raises(ConfigError, match=r"here/model: no such folder; if it has moved, put it or a link to it there"):
            open_run(run.path)
    else:
        with pytest.raises(ConfigError, match=r"started with another configuration \(task.model "):
            decompose_config(facts_config("other/model"), out=run.path, resume=True)


def test_json_lines_end_at_line_feeds_alone(tmp_path: Path):
    file = tmp_path / "text.jsonl"
    texts = ["one\u2028line", "still\u2029one\x85line", "two\r\nlines", "Łódź"]
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    for content in ("\n".join(lines), "\ufeff" + "\r\n".join([*lines, "", " ", ""])):
        file.write_bytes(content.encode())
        assert read_documents(file) == texts
    plain = tmp_path / "text.txt"
    plain.write_bytes("\ufeffone".encode())
    assert read_documents(plain) == ["one"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "a"}\n\n{"text": null}', r"line 3: its field text must be a string, not None"),
        (b'{"text": 3}', r"line 1: its field text must be a string, not 3"),
        (b'{"texts": "a"}', r"line 1: a JSON object with a field text is needed"),
        (b"[1]", r"line 1: a JSON object with a field text is needed"),
        (b'{"text": "a"', r"line 1: not JSON \("),
        (rb'{"text": "\ud800"}', r"line 1: its field text has half a surrogate pair"),
        ('{"text": "a"}'.encode("utf-16"), r"not in UTF-8 but in UTF-16; save it in UTF-8"),
        (b"\xe9\xe8", r"not in UTF-8 but in another encoding or no text"),
        (b"", r"there is no text in it"),
        (b'\n{"text": " "}\n', r"there is no text in it"),
    ],
)
def test_what_is_no_json_line_of_text_is_refused(content: bytes, message: str, tmp_path: Path):
    file = tmp_path / "text.jsonl"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        read_documents(file)


def test_facts_are_read_as_json_where_they_are_json(tmp_path: Path):
    file = tmp_path / "facts.json"
    entry = {"prompt": "Kobe\u2028Bryant plays", "answer": "basket\x85ball"}
    file.write_bytes(b"\xef\xbb\xbf" + json.dumps([entry], ensure_ascii=False).encode())
    assert [(fact.prompt, fact.answer) for fact in read_facts(file)] == [tuple(entry.values())]
    file.write_bytes(json.dumps([entry]).encode("utf-16"))
    with pytest.raises(ConfigError, match=r"facts .*facts.json: not in UTF-8 but in UTF-16"):
        read_facts(file)


def word_tokenizer() -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.WordLevel({"A": 0, "little": 1, "girl": 2, "<unk>": 3}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")


def test_text_of_which_the_tokenizer_knows_nothing_is_refused():
    assert packed(word_tokenizer(), ["A little zebra"], 3).tolist() == [[0, 1, 3]]
    with pytest.raises(BatchError, match=r"the tokenizer knows nothing of the text"):
        packed(word_tokenizer(), ["zebras run"], 2)


def test_sentences_that_are_the_same_or_nothing_are_refused(words):
    with pytest.raises(ConfigError, match=rf"task.sentences '{KOBE}': given twice; give different ones"):
        require_different(FactsTask(sentences=(KOBE, TIGER, KOBE)), words)
    with pytest.raises(ConfigError, match=r"task.sentences 'A little lynx': the same tokens as 'A little zebra' to the tokenizer"):
        require_different(FactsTask(sentences=("A little zebra", "A little lynx")), word_tokenizer())
    for nothing in ("", "   \n  \t  \n"):
        with pytest.raises(BatchError, match=r"give one of two or more, or there is nothing to predict"):
            encode_sentence(words, nothing)


def whole_edit(model) -> Edit:
    return Edit(model, None, (), "projection", {})


def test_settings_for_sampling_do_not_keep_a_model_from_being_saved(tmp_path: Path):
    model = random_model(llama())
    model.generation_config.temperature, model.generation_config.do_sample = 0.5, False
    before = copy.deepcopy(model.generation_config)
    whole_edit(model).save(tmp_path / "saved")
    assert model.generation_config.to_dict() == before.to_dict()
    assert_same_model(AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval(), model)


def test_a_model_that_does_not_load_as_it_is_is_not_saved(tmp_path: Path):
    """Weights of two types, and rotary frequencies that were rounded with the rest."""
    mixed, half = random_model(llama()), random_model(llama()).half()
    mixed.model.norm.to(torch.float64)
    for model in (mixed, half):
        with pytest.raises(ConfigError, match=r"saved: transformers does not read this model back as it is \(.* differs"):
            whole_edit(model).save(tmp_path / "saved")
        assert not (tmp_path / "saved").exists()


def test_models_of_double_precision_and_with_a_head_untied_by_hand_load_as_they_are(tmp_path: Path):
    double, untied = random_model(llama()).double(), random_model(llama(tie_word_embeddings=True))
    untied.lm_head.weight = torch.nn.Parameter(torch.randn(300, 16))
    for name, model in (("double", double), ("untied", untied)):
        saved = whole_edit(model).save(tmp_path / name)
        assert_same_model(AutoModelForCausalLM.from_pretrained(saved).eval(), model)


def test_only_models_of_transformers_are_saved(tmp_path: Path):
    class Wrapped(torch.nn.Linear):
        def save_pretrained(self, path: Path) -> None:
            raise AssertionError

    with pytest.raises(ConfigError, match=r"Wrapped is no transformers model; use Edit.copy\(\)"):
        whole_edit(Wrapped(2, 2)).save(tmp_path / "saved")


def test_a_model_in_memory_is_used_as_it_is(words):
    """What loading checks is not asked of a `Target` that is made in Python."""
    assert facts_task(FactsTask(sentences=(KOBE, TIGER)), Target(random_model(gpt2()), words, "mine"), seed=0).tokenizer is words
