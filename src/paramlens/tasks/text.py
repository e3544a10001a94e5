"""Any language model on any text: documents one after the other, cut into pieces of one length."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from paramlens.config import TextTask
from paramlens.errors import BatchError, ConfigError
from paramlens.tasks import Batch, Task, generator
from paramlens.tasks.language import Language, encode, model_inputs
from paramlens.tasks.tokens import token_texts


def read_documents(path: Path) -> list[str]:
    """The documents of a file: the whole of a text file, or the field `text` of every JSON line of a .jsonl file.

    Raises `ConfigError` for a file that is missing or neither.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"task.source {path}: cannot be read ({error}); give a text file in UTF-8 or JSON lines") from None
    if path.suffix != ".jsonl":
        return [text]
    documents: list[str] = []
    for number, line in enumerate(text.splitlines(), 1):
        try:
            documents.append(json.loads(line)["text"])
        except (json.JSONDecodeError, KeyError, TypeError):
            raise ConfigError(f"task.source {path} line {number}: a JSON object with a field text is needed") from None
    return documents


def packed(tokenizer: Any, documents: Iterable[str], length: int) -> Tensor:
    """Token ids (piece, length): the documents one after the other, an end-of-text token after each; what is left over is dropped.

    Raises `BatchError` if there is not even one piece.
    """
    ids: list[int] = []
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for document in documents:
        ids += [*encode(tokenizer, document), *end]
    if len(ids) < length:
        raise BatchError(f"the text has {len(ids)} tokens, fewer than one piece of {length}; give more text or a smaller task.length")
    return torch.tensor(ids[: len(ids) // length * length]).view(-1, length)


def text_task(task: TextTask, language: Language, *, seed: int, batch: int) -> Task:
    """Pieces of the text in a new order every epoch; the last share of them, `held_out`, for every other stream than "train"."""
    pieces = packed(language.tokenizer, read_documents(Path(task.source)), task.length)
    kept = max(1, round(len(pieces) * task.held_out))
    if len(pieces) - kept < 1:
        raise BatchError(f"task.source {task.source}: {len(pieces)} piece of {task.length} tokens; give more text, some is held out")
    train, rest = pieces[:-kept], pieces[-kept:]

    def piece(step: int, stream: str) -> Batch:
        own = train if stream == "train" else rest
        ids = own[_drawn(len(own), batch, step, (seed, "text", stream))]
        texts = token_texts(language.tokenizer, ids.flatten().tolist())
        return Batch(model_inputs(ids), texts=tuple(zip(*[iter(texts)] * ids.shape[1], strict=True)))

    return Task(language.model, piece, held_out=-(-len(rest) // batch), longest=task.length, tokenizer=language.tokenizer)


def _drawn(count: int, batch: int, step: int, key: Sequence[int | str]) -> Tensor:
    """Indices of the step's pieces: every epoch holds each once, in an order of its own."""
    places = range(step * batch, (step + 1) * batch)
    orders = {epoch: torch.randperm(count, generator=generator(*key, epoch)) for epoch in {place // count for place in places}}
    return torch.stack([orders[place // count][place % count] for place in places])
