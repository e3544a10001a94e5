"""Causal tracing beside the same tracing written by hand, one cell at a time."""

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteMoeSharedConfig,
    MambaConfig,
    PreTrainedTokenizerFast,
)

from language_models import CONFIGS, ENDS, SHARED, SIZE, random_model
from paramlens.analysis.trace import NOISE, trace
from paramlens.errors import BatchError, ConfigError
from paramlens.method.generators import generator
from paramlens.method.sites import at_rest
from paramlens.tasks.language_models.encoding import encode, encode_fact
from rounding import GPT, near

PROMPT, SUBJECT, ANSWER = "Tiger Woods plays the sport of", "Tiger Woods", "golf indeed"
SAMPLES = 3


@pytest.fixture(scope="module")
def traced(facts_run):
    model, tokenizer = facts_run.task.model, facts_run.task.tokenizer
    return trace(model, tokenizer, PROMPT, SUBJECT, answer=ANSWER, samples=SAMPLES, window=2, seed=5)


def by_hand(facts_run, *, noisy: bool, restored: list[str] = (), position: int = 0, zero: str | None = None) -> float:
    """Mean probability of the answer over the draws of noise, the named modules' clean outputs put back at one position."""
    model, tokenizer = facts_run.task.model, facts_run.task.tokenizer
    before, after = encode_fact(tokenizer, PROMPT, ANSWER)
    ids = torch.tensor([before + after])
    weight = model.transformer.wte.weight
    noise = torch.randn(SAMPLES, 2, weight.shape[1], generator=generator(5, "trace"), dtype=torch.float64)
    clean: dict[str, torch.Tensor] = {}
    with at_rest(model), torch.no_grad():
        hooks = [
            model.get_submodule(name).register_forward_hook(
                lambda _m, _a, out, name=name: clean.__setitem__(name, (out[0] if isinstance(out, tuple) else out).clone())
            )
            for name in restored
        ]
        model(ids, use_cache=False)
        for hook in hooks:
            hook.remove()
        values = []
        for draw in noise:
            hooks = []
            if noisy:

                def corrupt(_m, _a, out, draw=draw):
                    out = out.clone()
                    out[0, :2] += (NOISE * weight.double().std() * draw).to(out)
                    return out

                hooks.append(model.transformer.wte.register_forward_hook(corrupt))
            for name in restored:

                def put_back(_m, _a, out, name=name):
                    hidden = (out[0] if isinstance(out, tuple) else out).clone()
                    hidden[0, position] = clean[name][0, position]
                    return (hidden, *out[1:]) if isinstance(out, tuple) else hidden

                hooks.append(model.get_submodule(name).register_forward_hook(put_back))
            if zero:
                hooks.append(model.get_submodule(zero).register_forward_hook(lambda _m, _a, out: out * 0))
            logits = model(ids, use_cache=False).logits[0].double().log_softmax(-1)
            for hook in hooks:
                hook.remove()
            values.append(sum(logits[len(before) - 1 + i, token] for i, token in enumerate(after)).exp().item())
    return sum(values) / len(values)


def test_every_map_is_the_one_by_hand(facts_run, traced):
    assert traced.positions == [text for text in traced.positions if text]
    assert traced.subject_positions == [0, 1]
    assert traced.clean == near(by_hand(facts_run, noisy=False), 2 * GPT)
    assert traced.corrupted == near(by_hand(facts_run, noisy=True), 2 * GPT)
    for block in range(2):
        window = [block, block + 1] if block == 0 else [1]
        for position in (0, 1, 4):
            parts = {
                "hidden": [f"transformer.h.{block}"],
                "mlp": [f"transformer.h.{i}.mlp" for i in window],
                "attention": [f"transformer.h.{i}.attn" for i in window],
            }
            for kind, names in parts.items():
                expected = by_hand(facts_run, noisy=True, restored=names, position=position)
                assert getattr(traced, kind)[block][position] == near(expected, 2 * GPT), (kind, block, position)
        assert traced.zero_mlp[block] == near(by_hand(facts_run, noisy=False, zero=f"transformer.h.{block}.mlp"), 2 * GPT)


def test_the_last_state_at_the_last_position_brings_everything_back(facts_run):
    """Of an answer of one token the last block's state at the prompt's end is all that it depends on."""
    model, tokenizer = facts_run.task.model, facts_run.task.tokenizer
    found = trace(model, tokenizer, PROMPT, SUBJECT, samples=2)
    assert found.hidden[-1][-1] == near(found.clean, GPT)
    assert found.hidden[-1][0] == near(found.corrupted, GPT)
    assert len(encode(tokenizer, f"{PROMPT} {found.answer}")) == len(encode(tokenizer, PROMPT)) + 1


def test_noise_is_a_pure_function_of_its_seed(facts_run):
    model, tokenizer = facts_run.task.model, facts_run.task.tokenizer
    one, same, other = (trace(model, tokenizer, PROMPT, SUBJECT, answer="golf", samples=2, seed=seed) for seed in (1, 1, 2))
    assert one == same
    assert one.corrupted != other.corrupted


NAMES = [*(f"w{i}" for i in range(298)), ",", "."]
TEXT = "w5 w17 w200 w41 w9"


def words():
    """A tokenizer of 300 whole words, two of them marks that stand without a space."""
    vocabulary = Tokenizer(models.WordLevel({name: i for i, name in enumerate(NAMES)}, unk_token="w0"))
    vocabulary.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=vocabulary)


LAST = {
    "bloom": ("dense", "dense_4h_to_h"),
    "mpt": ("out_proj", "down_proj"),
    "falcon": ("dense", "dense_4h_to_h"),
    "llama": ("o_proj", "down_proj"),
}
LAST |= {"gptj": ("out_proj", "fc_out"), "opt": ("out_proj", "fc2"), "gemma2": ("o_proj", "down_proj"), "gpt1": ("c_proj", "c_proj")}


@pytest.mark.parametrize("name", CONFIGS)
def test_every_architecture_traces(name: str):
    """The last block's state at the prompt's end brings everything back, and nothing is left on the model."""
    model, tokenizer = random_model(name), words()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    found = trace(model, tokenizer, TEXT, "w17", samples=2, window=1)
    assert (len(found.hidden), len(found.mlp), len(found.attention), len(found.zero_mlp)) == (2, 2, 2, 2)
    assert found.hidden[-1][-1] == near(found.clean, 2 * GPT)
    assert found.corrupted != found.clean
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    ids = torch.tensor([encode(tokenizer, TEXT)])
    with torch.no_grad():
        assert found.clean == pytest.approx(model(ids, use_cache=False).logits[0, -1].double().softmax(-1).max().item(), rel=1e-4)


@pytest.mark.parametrize("name", LAST)
@torch.no_grad()
def test_a_contribution_is_what_the_last_projection_adds(name: str):
    """Although BLOOM and MPT add the residual stream in the module itself, and Falcon adds to the MLP's output in place."""
    model, tokenizer = random_model(name), words()
    found = trace(model, tokenizer, TEXT, "w17", samples=1, window=1, answer="w3")
    inputs = {"input_ids": torch.tensor([encode(tokenizer, f"{TEXT} w3")]), "use_cache": False}
    block = "1"
    mlp, attention = (
        [module for path, module in model.named_modules() if f".{block}." in path and path.endswith("." + leaf)][place]
        for leaf, place in zip(LAST[name][::-1], (-1, 0), strict=True)
    )

    def probability() -> float:
        return model(**inputs).logits[0, -2].double().softmax(-1)[3].item()

    hook = mlp.register_forward_hook(lambda _m, _a, output: torch.zeros_like(output))
    assert found.zero_mlp[1] == pytest.approx(probability(), rel=1e-4)
    hook.remove()
    embedding = model.get_input_embeddings()
    for kind, module in (("mlp", mlp), ("attention", attention)):
        clean = []
        hook = module.register_forward_hook(lambda _m, _a, output, clean=clean: clean.append(output.clone()))
        model(**inputs)
        hook.remove()
        spread = embedding(torch.arange(300)).double().std()
        noise = NOISE * spread * torch.randn(1, 1, embedding.weight.shape[1], generator=generator(0, "trace"), dtype=torch.float64)

        def corrupt(_m, _a, output, noise=noise):
            output = output.clone()
            output[:, 1] += noise[0].to(output)
            return output

        def put_back(_m, _a, output, clean=clean):
            output = output.clone()
            output.view(-1, output.shape[-1])[4] = clean[0].view(-1, output.shape[-1])[4]
            return output

        hooks = [embedding.register_forward_hook(corrupt), module.register_forward_hook(put_back)]
        assert getattr(found, kind)[1][4] == pytest.approx(probability(), rel=1e-3), kind
        for each in hooks:
            each.remove()


def test_noise_is_of_the_size_of_what_the_model_makes_of_embeddings():
    """Gemma multiplies its embeddings by sqrt(hidden): with the same noise, the same share of the first state is lost."""
    moved = {}
    for name in ("llama", "gemma"):
        model, tokenizer = random_model(name), words()
        seen = []
        hook = model.model.layers[0].register_forward_pre_hook(lambda _m, args, seen=seen: seen.append(args[0].clone()))
        trace(model, tokenizer, TEXT, "w17", samples=4, answer="w3")
        hook.remove()
        noisy = next(each for each in seen if len(each) == 4)
        moved[name] = ((noisy[:, 1] - seen[0][:, 1]).std() / seen[0].std()).item()
    assert moved["llama"] == pytest.approx(moved["gemma"], rel=0.3)
    assert moved["llama"] > 2


def test_the_likeliest_token_is_not_spelled_anew():
    """A comma stands without a space; " ," is another token, or none."""
    model, tokenizer = random_model("llama"), words()
    with torch.no_grad():
        state = model.model(torch.tensor([encode(tokenizer, TEXT)])).last_hidden_state[0, -1]
        model.lm_head.weight[298] = 30 * state / state.norm()
    found = trace(model, tokenizer, TEXT, "w17", samples=1)
    assert found.answer == ","
    assert found.clean > 0.9


def test_blocks_whose_parts_cannot_be_told_apart_are_refused():
    cases = {
        "block 0 .*does not return its input": GraniteMoeSharedConfig(**SHARED, num_local_experts=4, shared_intermediate_size=8, **ENDS),
        "MambaBlock has no mlp": MambaConfig(vocab_size=300, hidden_size=16, num_hidden_layers=2, state_size=4, **ENDS),
        "BertLayer has no mlp": BertConfig(**SIZE, is_decoder=True),
    }
    for message, config in cases.items():
        torch.manual_seed(0)
        with pytest.raises(ConfigError, match=message):
            trace(AutoModelForCausalLM.from_config(config).eval(), words(), TEXT, "w17", samples=1)


class Inside(nn.Module):
    """A part that norms and adds the residual stream itself."""

    def __init__(self, part: nn.Module):
        super().__init__()
        self.part, self.norm = part, nn.LayerNorm(16)

    def forward(self, x, **_):
        made = self.part(self.norm(x))
        return x + (made[0] if isinstance(made, tuple) else made)


def test_a_residual_inside_a_part_is_found_by_numbers():
    """GPT-2 with its second MLP rewritten as x + f(norm(x)): the same model, the same trace."""
    plain, tokenizer = random_model("gpt2"), words()
    expected = trace(plain, tokenizer, TEXT, "w17", samples=1, window=1)
    rewritten = random_model("gpt2")
    block = rewritten.transformer.h[1]
    inside = Inside(block.mlp)
    inside.norm.load_state_dict(block.ln_2.state_dict())
    inside.norm.eps = block.ln_2.eps

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.ln_1, self.attn, self.mlp = block.ln_1, block.attn, inside

        def forward(self, hidden, *_args, **kwargs):
            kwargs = {name: value for name, value in kwargs.items() if name in ("attention_mask", "position_ids", "use_cache")}
            return self.mlp(hidden + self.attn(self.ln_1(hidden), **kwargs)[0])

    rewritten.transformer.h[1] = Block()
    found = trace(rewritten, tokenizer, TEXT, "w17", samples=1, window=1)
    for name in ("mlp", "attention", "hidden"):
        assert torch.tensor(getattr(found, name)).allclose(torch.tensor(getattr(expected, name)), rtol=1e-3)
    assert found.zero_mlp == pytest.approx(expected.zero_mlp, rel=1e-3)


def test_wrong_questions(facts_run):
    model, tokenizer = facts_run.task.model, facts_run.task.tokenizer
    with pytest.raises(ConfigError, match="'Kobe': not in 'Tiger Woods plays the sport of'"):
        trace(model, tokenizer, PROMPT, "Kobe")
    with pytest.raises(ConfigError, match="samples 0"):
        trace(model, tokenizer, PROMPT, SUBJECT, samples=0)
    for noise in (float("nan"), float("inf"), 0.0, -1.0):
        with pytest.raises(ConfigError, match="noise"):
            trace(model, tokenizer, PROMPT, SUBJECT, noise=noise)
    with pytest.raises(ConfigError, match=r"noise 1e\+38 makes the model overflow"):
        trace(model, tokenizer, PROMPT, SUBJECT, noise=1e38, samples=2)
    for empty in ("", "  "):
        with pytest.raises(ConfigError, match="prompt: empty"):
            trace(model, tokenizer, empty, SUBJECT)
    small = GPT2LMHeadModel(GPT2Config(vocab_size=300, n_positions=5, n_embd=16, n_layer=2, n_head=4, **ENDS))
    with pytest.raises(BatchError, match="with its answer: 6 tokens, and the model takes at most 5"):
        trace(small, words(), TEXT, "w17")
    with pytest.raises(BatchError, match="with its answer: 6 tokens"):
        trace(small, words(), TEXT, "w17", answer="w3")
    broken = random_model("llama")
    torch.nn.init.constant_(broken.lm_head.weight, float("nan"))
    with pytest.raises(ConfigError, match="the model's own logits are not finite"):
        trace(broken, words(), TEXT, "w17", answer="w3")


def test_a_subject_that_stands_twice_is_taken_where_it_stands_first():
    found = trace(random_model("llama"), words(), "w5 w17 w17", "w17", samples=1)
    assert found.subject_positions == [1]
