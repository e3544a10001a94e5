"""Turn text into tokens and batches for a language model."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from paramlens.errors import BatchError
from paramlens.method.batch import Batch
from paramlens.tasks.language_models.tokens import open_ended, token_texts


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text, with the token at its start that some models expect."""
    return list(tokenizer(text, verbose=False)["input_ids"])


def encode_sentence(tokenizer: Any, sentence: str) -> list[int]:
    """Token ids of a sentence to decompose. Raises `BatchError` if it has fewer than two tokens, as nothing can then be predicted."""
    ids = encode(tokenizer, sentence)
    own = len(ids) - len(encode(tokenizer, ""))
    if own < 2 or not sentence.strip():
        raise BatchError(
            f"sentence {sentence!r}: {own} token{'s' if own != 1 else ''}; give one of two or more, or there is nothing to predict"
        )
    return ids


def sentence_of(prompt: str, answer: str) -> str:
    """Prompt and answer with one space between them, or with none if the prompt ends in a line break or a tab."""
    before = prompt.rstrip(" ")
    return f"{before}{'' if before[-1:].isspace() else ' '}{answer.strip()}"


def encode_fact(tokenizer: Any, prompt: str, answer: str) -> tuple[list[int], list[int]]:
    """Token ids of prompt and answer, as they are in the sentence that `sentence_of` returns.

    Raises `BatchError` if the answer is empty or is not in the vocabulary, or if no token belongs to the prompt alone.
    """
    before, whole = open_ended(tokenizer, prompt.rstrip(" ")), open_ended(tokenizer, sentence_of(prompt, answer))
    shared = next((i for i, (a, b) in enumerate(zip(before, whole, strict=False)) if a != b), min(len(before), len(whole)))
    if not shared:
        raise BatchError(f"prompt {prompt!r}: no token of it stands before the answer; give a prompt that ends at a word")
    answered = whole[shared:]
    if not answer.strip() or not answered:
        raise BatchError(f"answer {answer!r} to {prompt!r}: give at least one word")
    unknown = tokenizer.unk_token_id
    if unknown is not None and unknown in answered:
        raise BatchError(
            f"answer {answer!r} to {prompt!r}: not in the model's vocabulary, which reads it as {token_texts(tokenizer, answered)}"
        )
    return whole[:shared], answered


def padded(tokenizer: Any, sequences: Sequence[Sequence[int]]) -> Batch:
    """One batch of sequences of any lengths, padded on the right, where padding does not change a causal model's other positions.

    Each is padded with its own last token, as the tokenizer may have no padding token, or one that the embedding lacks.
    """
    longest = max(map(len, sequences))
    ids = torch.tensor([[*sequence, *[sequence[-1]] * (longest - len(sequence))] for sequence in sequences])
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    present = torch.arange(longest) < lengths[:, None]
    return Batch(
        model_inputs(ids),
        present=None if present.all() else present,
        texts=tuple(tuple(token_texts(tokenizer, sequence)) for sequence in sequences),
    )


def model_inputs(ids: Tensor) -> dict[str, Any]:
    """The model's inputs, without a cache of keys and values, which is not needed here."""
    return {"input_ids": ids, "use_cache": False}
