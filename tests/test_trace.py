"""Causal tracing beside the same tracing written by hand, one cell at a time."""

import pytest
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM

from paramlens.analysis.trace import NOISE, trace
from paramlens.errors import ConfigError
from paramlens.sites import at_rest
from paramlens.tasks import generator
from paramlens.tasks.language import encode, encode_fact

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
    near = {"rel": 1e-4}
    assert traced.positions == [text for text in traced.positions if text]
    assert traced.subject_positions == [0, 1]
    assert traced.clean == pytest.approx(by_hand(facts_run, noisy=False), **near)
    assert traced.corrupted == pytest.approx(by_hand(facts_run, noisy=True), **near)
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
                assert getattr(traced, kind)[block][position] == pytest.approx(expected, **near), (kind, block, position)
        assert traced.zero_mlp[block] == pytest.approx(by_hand(facts_run, noisy=False, zero=f"transformer.h.{block}.mlp"), **near)


def test_the_last_state_at_the_last_position_brings_everything_back(facts_run):
    """Of an answer of one token the last block's state at the prompt's end is all that it depends on."""
    model, tokenizer = facts_run.task.model, facts_run.task.tokenizer
    found = trace(model, tokenizer, PROMPT, SUBJECT, samples=2)
    assert found.hidden[-1][-1] == pytest.approx(found.clean, rel=1e-4)
    assert found.hidden[-1][0] == pytest.approx(found.corrupted, rel=1e-4)
    assert len(encode(tokenizer, f"{PROMPT} {found.answer}")) == len(encode(tokenizer, PROMPT)) + 1


def test_noise_is_a_pure_function_of_its_seed(facts_run):
    model, tokenizer = facts_run.task.model, facts_run.task.tokenizer
    one, same, other = (trace(model, tokenizer, PROMPT, SUBJECT, answer="golf", samples=2, seed=seed) for seed in (1, 1, 2))
    assert one == same
    assert one.corrupted != other.corrupted


@pytest.mark.parametrize("kind", ["llama", "neox"])
def test_other_architectures_trace(facts_run, kind: str):
    size = {"vocab_size": 1600, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**size)) if kind == "llama" else GPTNeoXForCausalLM(GPTNeoXConfig(**size))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    found = trace(model, facts_run.task.tokenizer, PROMPT, "Woods", answer="golf", samples=2)
    assert (len(found.hidden), len(found.mlp), len(found.attention), len(found.zero_mlp)) == (3, 3, 3, 3)
    assert found.hidden[-1][-1] == pytest.approx(found.clean, rel=1e-3)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_wrong_questions(facts_run):
    model, tokenizer = facts_run.task.model, facts_run.task.tokenizer
    with pytest.raises(ConfigError, match="'Kobe': not in 'Tiger Woods plays the sport of'"):
        trace(model, tokenizer, PROMPT, "Kobe")
    with pytest.raises(ConfigError, match="samples 0"):
        trace(model, tokenizer, PROMPT, SUBJECT, samples=0)
