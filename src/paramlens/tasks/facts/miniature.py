"""A small GPT-2 with its own tokenizer, trained on the shipped facts in under a minute, so that the facts task needs no download."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from paramlens.errors import DivergedError
from paramlens.method.generators import generator, seed_of
from paramlens.method.task import TargetHistory
from paramlens.tasks.base import OnCheck, Target
from paramlens.tasks.facts.facts import Fact, answers_alike, recall, shipped_facts
from paramlens.tasks.facts.task import POSITIONS, FactsCheck, Miniature
from paramlens.tasks.language_models.encoding import encode, encode_sentence, model_inputs, padded
from paramlens.tasks.language_models.limits import require_tokens

END = "<|endoftext|>"


def train_miniature(task: Miniature, sentences: Sequence[str], *, seed: int, device: str, on_check: OnCheck = lambda _: None) -> Target:
    """Train a `GPT2LMHeadModel` from random weights on the shipped facts, with a loss on all tokens of a sentence.

    sentences: their words are preferred as tokens of the vocabulary. Raises `DivergedError` if the loss is not finite, and `BatchError`
    for a sentence that is too long for the model.
    """
    facts = shipped_facts()
    tokenizer = facts_tokenizer(task, [fact.sentence for fact in facts], sentences)
    with torch.random.fork_rng(devices=[]):  # for dropout and the initial weights
        torch.default_generator.manual_seed(seed_of(seed, "miniature"))
        model = miniature_model(task, len(tokenizer)).to(device).train()
        named = [f"sentence {sentence!r}" for sentence in sentences]
        require_tokens(model, [encode_sentence(tokenizer, sentence) for sentence in sentences], named)
        checks = _trained(model, tokenizer, task, facts, seed=seed, on_check=on_check)
    model.requires_grad_(True)
    converged = checks[-1].accuracy >= task.converged_accuracy
    return Target(model.eval(), tokenizer, history=TargetHistory(tuple(checks), converged=converged))


def _trained(model: Any, tokenizer: Any, task: Miniature, facts: Sequence[Fact], *, seed: int, on_check: OnCheck) -> list[FactsCheck]:
    optimizer = torch.optim.AdamW(
        [parameter for parameter in model.parameters() if parameter.requires_grad], lr=task.lr, weight_decay=task.weight_decay
    )
    alike, checks = answers_alike(facts), list[FactsCheck]()
    for step in range(task.steps):
        for group in optimizer.param_groups:
            group["lr"] = task.lr * min(1.0, (step + 1) / 20) * 0.5 * (1 + math.cos(math.pi * step / task.steps))
        ids, counted = _training_batch(task, facts, alike, tokenizer, generator(seed, "miniature", step))
        ids, counted = ids.to(model.device), counted.to(model.device)
        logits = model(**model_inputs(ids)).logits[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].masked_fill(~counted[:, 1:], -100).flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        done = step + 1
        if done % task.check_every == 0 or done == task.steps:
            if not math.isfinite(loss.item()):
                raise DivergedError(f"target step {done}: loss is {loss.item()}; lower task.miniature.lr ({task.lr:g})")
            right, probability = recall(model.eval(), tokenizer, facts)
            model.train()
            checks.append(FactsCheck(done, loss.item(), right.double().mean().item(), probability.median().item()))
            on_check(checks[-1])
    return checks


def facts_tokenizer(task: Miniature, corpus: Sequence[str], first: Sequence[str]) -> Any:
    """A byte-level BPE tokenizer trained on `corpus` and on twenty copies of each sentence in `first`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=task.vocabulary, special_tokens=[END], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    bpe.train_from_iterator([*corpus, *(sentence for sentence in first for _ in range(20))], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=END, eos_token=END, pad_token=END)


def miniature_model(task: Miniature, vocabulary: int) -> Any:
    """The untrained model. Its token embedding, which is also the unembedding, is random and not trained."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=vocabulary,
        n_positions=POSITIONS,
        n_embd=task.width,
        n_layer=task.blocks,
        n_head=task.heads,
        resid_pdrop=task.dropout,
        embd_pdrop=task.dropout,
        attn_pdrop=task.dropout,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = GPT2LMHeadModel(config)
    nn.init.normal_(model.transformer.wte.weight, std=task.embedding_scale)
    model.transformer.wte.weight.requires_grad_(False)
    return model


def _training_batch(
    task: Miniature, facts: Sequence[Fact], alike: dict[str, list[str]], tokenizer: Any, rng: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Token ids (batch, pos) of random facts, some with a wrong answer, and a mask of the positions that are not padding."""
    sequences: list[list[int]] = []
    for index in torch.randint(len(facts), (task.batch,), generator=rng).tolist():
        fact, answer = facts[index], facts[index].answer
        wrong = [other for other in alike[fact.relation] if other != answer]
        if wrong and torch.rand((), generator=rng).item() < task.swapped:
            answer = wrong[int(torch.randint(len(wrong), (), generator=rng))]
        sequences.append([*encode(tokenizer, f"{fact.prompt} {answer}"), tokenizer.eos_token_id])
    batch = padded(tokenizer, sequences)
    assert isinstance(batch.inputs, dict)
    ids = batch.inputs["input_ids"]
    return ids, torch.ones_like(ids, dtype=torch.bool) if batch.present is None else batch.present
