"""The facts task of a target: batches of its sentences, if asked for with other shipped facts (§5.2, Figure 10)."""

from dataclasses import replace
from typing import Any

import torch

from paramlens.errors import ConfigError
from paramlens.method.batch import Batch
from paramlens.method.generators import generator
from paramlens.method.task import Task
from paramlens.tasks.base import Target
from paramlens.tasks.facts.facts import shipped_facts
from paramlens.tasks.facts.task import FactsTask
from paramlens.tasks.language_models.encoding import encode_sentence, padded
from paramlens.tasks.language_models.limits import require_tokens, that_fit


def facts_task(task: FactsTask, target: Target, *, seed: int) -> Task:
    """Batches of the task's sentences and of `others` other shipped facts, newly drawn for each step.

    The role of a position is its token. Nothing is held out: these sentences are what is decomposed.
    Raises `BatchError` for a sentence of one token or of more than the model can take. Other facts that are too long are not drawn.
    """
    tokenizer = target.tokenizer
    own = [encode_sentence(tokenizer, sentence) for sentence in task.sentences]
    require_tokens(target.model, own, [f"sentence {sentence!r}" for sentence in task.sentences])
    others = [encode_sentence(tokenizer, fact.sentence) for fact in shipped_facts() if fact.sentence not in task.sentences]
    others = that_fit(target.model, others)
    for name, count in (("others", task.others), ("elsewhere", task.elsewhere)):
        if count > len(others):
            raise ConfigError(f"task.{name} {count}: there are {len(others)} other facts; give at most as many")
    fixed = padded(tokenizer, own)
    assert fixed.texts is not None
    names = list(dict.fromkeys(text.strip() or text for texts in fixed.texts for text in texts))
    longest = max(map(len, fixed.texts))
    rows = [[*(names.index(text.strip() or text) for text in texts), *[-1] * (longest - len(texts))] for texts in fixed.texts]
    fixed = replace(fixed, roles=torch.tensor(rows))

    def drawn(name: str, step: int, count: int) -> list[list[int]]:
        order = torch.randperm(len(others), generator=generator(seed, name, step))[:count]
        return [others[i] for i in order.tolist()]

    def batch(step: int, stream: str) -> Batch:
        if stream != "train" or not task.others:
            return fixed
        return padded(tokenizer, [*own, *drawn("others", step, task.others)])

    def elsewhere(step: int) -> Batch:
        return padded(tokenizer, drawn("elsewhere", step, task.elsewhere))

    def other_inputs(count: int) -> tuple[str, Batch] | None:
        found = others[:count]
        return (f"{len(found)} other facts", padded(tokenizer, found)) if found else None

    return Task(
        target.model,
        batch,
        roles=tuple(names),
        other_inputs=other_inputs,
        elsewhere=elsewhere if task.elsewhere else None,
        longest=max(map(len, [*own, *others])),
        held_out=1,
        evaluated_on="training",
        tokenizer=tokenizer,
    )


def require_different(task: FactsTask, tokenizer: Any) -> None:
    """Raise `ConfigError` if two sentences have the same tokens, as nothing would then be specific to either."""
    seen: dict[tuple[int, ...], str] = {}
    for sentence in task.sentences:
        ids = tuple(encode_sentence(tokenizer, sentence))
        if ids in seen:
            first = "given twice" if seen[ids] == sentence else f"the same tokens as {seen[ids]!r} to the tokenizer"
            raise ConfigError(f"task.sentences {sentence!r}: {first}; give different ones")
        seen[ids] = sentence
