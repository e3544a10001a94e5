"""Facts: sentences of a prompt and an answer, the shipped facts, and which of them a model knows (§5.2, Figure 10)."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from paramlens.errors import ConfigError, first_line
from paramlens.fields import expand_home
from paramlens.files.yaml import MOST_BYTES, parse_yaml
from paramlens.tasks.language_models.encoding import encode_fact, padded, sentence_of
from paramlens.tasks.language_models.limits import require_tokens
from paramlens.tasks.reading import read_text


@dataclass(frozen=True)
class Fact:
    """A prompt and its answer. The sentence of the fact is both, with a space between them.

    relation: what the prompt asks for; facts with the same relation and answer are alike (two golfers). subject: the words of the prompt
    that the fact is about. reverse: whether the prompt asks in the other direction ("The most famous athlete in golf is").
    """

    prompt: str
    answer: str
    relation: str = ""
    subject: str = ""
    reverse: bool = False

    @property
    def sentence(self) -> str:
        return sentence_of(self.prompt, self.answer)


@cache
def shipped_facts() -> tuple[Fact, ...]:
    """The facts that come with the package: every athlete in every template, general facts, and reverse prompts."""
    tree = yaml.safe_load((resources.files("paramlens.tasks.facts") / "facts.yaml").read_text(encoding="utf-8"))
    athletes = [(name, sport) for sport, names in tree["athletes"].items() for name in names]
    facts = [Fact(each.format(name=name), sport, "sport", name) for each in tree["templates"] for name, sport in athletes]
    facts += [Fact(prompt, answer, relation) for relation, pairs in tree["general"].items() for prompt, answer in pairs]
    facts += [Fact(prompt, answer, "athlete", reverse=True) for prompt, answer in tree["reverse"]]
    return tuple(facts)


def read_facts(path: Path) -> tuple[Fact, ...]:
    """Read facts from a YAML or JSON file: a list of mappings with `prompt`, `answer` and optionally `relation`, `subject`, `reverse`.

    In YAML, all values except `reverse` are read as text: `answer: no` is the word, `answer: 1969` the digits.
    Raises `ConfigError`, whose message names the entry that is not a fact.
    """
    path = Path(expand_home(str(path)))
    try:
        if (size := path.stat().st_size) > MOST_BYTES:
            raise ConfigError(f"facts {path}: {size} bytes, at most {MOST_BYTES} are read; give a YAML or JSON list")
    except OSError as error:
        raise ConfigError(f"facts {path}: cannot be read ({error.strerror}); give a YAML or JSON list") from None
    entries = _parsed(read_text(path, f"facts {path}"), path)
    if not isinstance(entries, list) or not entries:
        raise ConfigError(f"facts {path}: give a list of {{prompt: ..., answer: ...}}")
    known = {"prompt": str, "answer": str, "relation": str, "subject": str, "reverse": bool}
    for number, entry in enumerate(entries, 1):
        if not isinstance(entry, dict) or not {"prompt", "answer"} <= entry.keys():
            raise ConfigError(f"facts {path}, entry {number}: a mapping with prompt and answer is needed, not {entry!r}")
        for key, value in entry.items():
            if key not in known or not isinstance(value, known[key]):
                raise ConfigError(f"facts {path}, entry {number}: {key}: {value!r}; known are {', '.join(known)}, all text but reverse")
    return tuple(Fact(**entry) for entry in entries)


def _parsed(text: str, path: Path) -> Any:
    """Parse JSON, or YAML if that fails. YAML alone would read characters such as U+2028 in JSON strings as line ends."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    try:
        return parse_yaml(text, texts=("prompt", "answer", "relation", "subject"))
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(f"facts {path}: cannot be read ({first_line(error)}); give a YAML or JSON list") from None


def fact_of(sentence: str, facts: Sequence[Fact]) -> Fact:
    """The fact with this sentence: one of `facts`, or else a new one whose answer is the last word and whose prompt is the rest."""
    found = next((fact for fact in facts if fact.sentence == sentence), None)
    if found is not None:
        return found
    prompt, _, answer = sentence.strip().rpartition(" ")
    return Fact(prompt, answer)


def kinds(facts: Sequence[Fact], target: Fact, decomposed: Sequence[str]) -> Iterator[tuple[Fact, str]]:
    """Every fact with its relation to the edited one: target, paraphrase, other-target, same-sport, other-sport, general or reverse.

    same-sport: the target's relation and answer, another subject. paraphrase: the target's relation and subject, another prompt.
    """
    for fact in facts:
        yield fact, _kind(fact, target, decomposed)


def _kind(fact: Fact, target: Fact, decomposed: Sequence[str]) -> str:
    if fact.reverse:
        return "reverse"
    if fact.prompt == target.prompt:
        return "target"
    if target.subject and (fact.subject, fact.relation) == (target.subject, target.relation):
        return "paraphrase"
    if fact.sentence in decomposed:
        return "other-target"
    if target.relation and fact.relation == target.relation:
        return "same-sport" if fact.answer == target.answer else "other-sport"
    return "general"


def answers_alike(facts: Sequence[Fact]) -> dict[str, list[str]]:
    """For each relation, its different answers, sorted."""
    groups: dict[str, set[str]] = {}
    for fact in facts:
        groups.setdefault(fact.relation, set()).add(fact.answer)
    return {relation: sorted(answers) for relation, answers in groups.items()}


@torch.no_grad()
def recall(model: nn.Module, tokenizer: Any, facts: Sequence[Fact], *, batch: int = 64) -> tuple[Tensor, Tensor]:
    """For every fact (fact,): whether its answer is the likeliest continuation, token by token, and the answer's probability in [0, 1].

    The probability of an answer is the product over its tokens, each given the tokens before it. Raises `BatchError` as `encode_fact`
    does, and for a fact with more tokens than the model can take.
    """
    pairs = [encode_fact(tokenizer, fact.prompt, fact.answer) for fact in facts]
    require_tokens(model, [before + after for before, after in pairs], [f"fact {fact.sentence!r}" for fact in facts])
    device = next(model.parameters()).device
    right, probability = list[bool](), list[float]()
    for start in range(0, len(pairs), batch):
        part = pairs[start : start + batch]
        inputs = padded(tokenizer, [before + after for before, after in part]).to(device).inputs
        assert isinstance(inputs, dict)
        log_probs = model(**inputs).logits.double().log_softmax(-1)
        for row, (before, after) in zip(log_probs, part, strict=True):
            said = row[len(before) - 1 : len(before) + len(after) - 1]
            expected = torch.tensor(after, device=device)
            right.append(bool((said.argmax(-1) == expected).all()))
            probability.append(said.gather(1, expected[:, None]).sum().exp().item())
    return torch.tensor(right), torch.tensor(probability, dtype=torch.float64)
