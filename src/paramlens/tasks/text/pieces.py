"""Batches for the text task: the documents are joined and cut into pieces of equal length."""

from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from paramlens.errors import BatchError, ConfigError
from paramlens.method.batch import Batch
from paramlens.method.generators import generator
from paramlens.method.task import Task
from paramlens.tasks.base import Target
from paramlens.tasks.language_models.encoding import encode, model_inputs
from paramlens.tasks.language_models.limits import require_tokens
from paramlens.tasks.language_models.tokens import token_texts
from paramlens.tasks.reading import json_lines, read_text
from paramlens.tasks.text.task import TextTask


def read_documents(path: Path, *, field: str = "task.source") -> list[str]:
    """The documents of a file: one for a text file, or the field `text` of every line of a .jsonl file.

    field: of the configuration, for messages. Raises `ConfigError` if the file is missing, cannot be read as either, or has no text.
    """
    what = f"{field} {path}"
    if path.suffix.lower() == ".jsonl":
        documents = [_text(value, f"{what} line {number}") for number, value in json_lines(path, what)]
    else:
        documents = [read_text(path, what)]
    if not any(document.strip() for document in documents):
        raise ConfigError(f"{what}: there is no text in it; give a text file in UTF-8 or JSON lines")
    return documents


def _text(value: Any, place: str) -> str:
    """The field `text` of a line. Raises `ConfigError` if it is missing, is not a string, or has half a surrogate pair."""
    if not isinstance(value, dict) or "text" not in value:
        raise ConfigError(f"{place}: a JSON object with a field text is needed")
    text = value["text"]
    if not isinstance(text, str):
        raise ConfigError(f"{place}: its field text must be a string, not {text!r}; leave lines without text out")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ConfigError(f"{place}: its field text has half a surrogate pair, which is no character; mend it or leave it out") from None
    return text


def packed(tokenizer: Any, documents: Iterable[str], length: int) -> Tensor:
    """Token ids (piece, length) of the joined documents, with an end-of-text token after each. The incomplete last piece is dropped.

    Raises `BatchError` if the text is shorter than one piece, or if the tokenizer reads it as special tokens alone.
    """
    ids = array("q")
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for document in documents:
        ids.extend([*encode(tokenizer, document), *end])
    if len(ids) < length:
        raise BatchError(f"the text has {len(ids)} tokens, fewer than one piece of {length}; give more text or a smaller task.length")
    pieces = torch.frombuffer(ids, dtype=torch.long)[: len(ids) // length * length].view(-1, length)
    own = pieces[~torch.isin(pieces, torch.tensor(tokenizer.all_special_ids, dtype=torch.long))]
    if not len(own):
        raise BatchError("the tokenizer knows nothing of the text, and reads it as special tokens alone; give the model's own tokenizer")
    return pieces


def text_task(task: TextTask, target: Target, *, seed: int, batch: int) -> Task:
    """The task on pieces of the text, in a new order every epoch. The last share `held_out` is for all streams other than "train"."""
    pieces = _pieces(task, target, task.source, "task.source")
    kept = max(1, round(len(pieces) * task.held_out))
    if len(pieces) - kept < 1:
        raise BatchError(f"task.source {task.source}: {len(pieces)} piece of {task.length} tokens; give more text, some is held out")
    train, rest = pieces[:-kept], pieces[-kept:]
    others = None if task.elsewhere_source is None else _pieces(task, target, task.elsewhere_source, "task.elsewhere_source")

    def drawn(own: Tensor, step: int, stream: str, rows: int) -> Batch:
        ids = own[_drawn(len(own), rows, step, (seed, "text", stream))]
        texts = token_texts(target.tokenizer, ids.flatten().tolist())
        return Batch(model_inputs(ids), texts=tuple(zip(*[iter(texts)] * ids.shape[1], strict=True)))

    def piece(step: int, stream: str) -> Batch:
        return drawn(train if stream == "train" else rest, step, stream, batch)

    def elsewhere(step: int) -> Batch:
        assert others is not None
        return drawn(others, step, "elsewhere", task.elsewhere)

    return Task(
        target.model,
        piece,
        elsewhere=None if others is None else elsewhere,
        held_out=-(-len(rest) // batch),
        longest=task.length,
        tokenizer=target.tokenizer,
    )


def _pieces(task: TextTask, target: Target, source: str, field: str) -> Tensor:
    """Token ids (piece, length) of a file. Raises `ConfigError` or `BatchError` if the target cannot take them."""
    pieces = packed(target.tokenizer, read_documents(Path(source), field=field), task.length)
    largest = pieces[pieces.amax(1).argmax()].tolist()
    require_tokens(target.model, [largest], [f"{field} {source} in pieces of task.length {task.length}"])
    return pieces


def _drawn(count: int, batch: int, step: int, key: Sequence[int | str]) -> Tensor:
    """Indices of the pieces of a step: every epoch has each piece once, in its own order."""
    places = range(step * batch, (step + 1) * batch)
    orders = {epoch: torch.randperm(count, generator=generator(*key, epoch)) for epoch in {place // count for place in places}}
    return torch.stack([orders[place // count][place % count] for place in places])
