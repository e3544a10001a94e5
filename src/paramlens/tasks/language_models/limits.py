"""Measure how many tokens a language model can take, which tokens it knows, and whether it is causal."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from paramlens.errors import BatchError, ConfigError, first_line

_PROBE = 8
"""Tokens per sequence when a model is tried."""

_CAUSAL = 1e-4
"""Largest change at earlier tokens, relative to the largest logit, that counts as rounding. Causal: 0 to 1e-6. Others: 1e-2."""


def embedding_rows(model: Any) -> int | None:
    """Number of tokens in a model's embedding table. None: it has no such table."""
    try:
        return int(model.get_input_embeddings().weight.shape[0])
    except (AttributeError, NotImplementedError):
        return None


def require_tokens(model: nn.Module, sequences: Sequence[Sequence[int]], what: Sequence[str]) -> None:
    """Raise `BatchError` for a sequence that is too long for the model, or has a token that its embedding table lacks.

    what: the name of each sequence in messages.
    """
    rows = embedding_rows(model)
    for ids, named in zip(sequences, what, strict=True):
        if rows is not None and (outside := [each for each in ids if not 0 <= each < rows]):
            raise BatchError(
                f"{named}: the tokenizer gives token {outside[0]}, and the model's embedding has {rows} rows; "
                "save the model with the tokenizer that it was trained with, or after resize_token_embeddings"
            )
    longest = max(range(len(sequences)), key=lambda i: len(sequences[i]), default=None)
    if longest is not None and (limit := token_limit(model, len(sequences[longest]))) is not None:
        raise BatchError(f"{what[longest]}: {len(sequences[longest])} tokens, and the model takes at most {limit}; give at most that many")


def that_fit(model: nn.Module, sequences: Sequence[list[int]]) -> list[list[int]]:
    """The sequences that are not too long for the model."""
    limit = token_limit(model, max(map(len, sequences), default=0))
    return [ids for ids in sequences if limit is None or len(ids) <= limit]


@torch.no_grad()
def token_limit(model: nn.Module, length: int) -> int | None:
    """The maximum number of tokens that a model takes, if it is below `length`. None: the model takes `length` tokens.

    A model may take more tokens than its configuration says: a position table has an end, rotary positions have none. So the model is run
    with `length` tokens, except on the meta device, and with a table on a GPU, where an index outside the table would end the process.
    """
    named = _positions(model)
    if named is None or length <= named:
        return None
    device = next(model.parameters()).device
    if device.type != "cpu" and _has_position_table(model, named):
        return named
    if device.type == "meta":
        return None
    try:
        model(input_ids=torch.zeros(1, length, dtype=torch.long, device=device), use_cache=False)
    except (IndexError, RuntimeError, ValueError):
        return named
    return None


def _positions(model: nn.Module) -> int | None:
    """Number of positions in the model's configuration, which may or may not be a limit. None: it has no such field."""
    config: Any = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config(decoder=True)
    found = (getattr(config, name, None) for name in ("max_position_embeddings", "max_seq_len", "max_target_positions"))
    return next((each for each in found if isinstance(each, int) and each > 0), None)


def _has_position_table(model: Any, positions: int) -> bool:
    """Whether an embedding (not that of the tokens) or a buffer of two or more axes has a row per position, and up to 4 more."""
    tokens = model.get_input_embeddings()
    tables = [module.weight for module in model.modules() if isinstance(module, nn.Embedding) and module is not tokens]
    tables += [buffer for buffer in model.buffers() if buffer.dim() > 1]
    return any(0 <= size - positions <= 4 for table in tables for size in table.shape)


@torch.no_grad()
def require_causal(model: nn.Module, name: str) -> None:
    """Raise `ConfigError` if the logits of a token change with later tokens, or are not finite."""
    logits = _tried(model, name)
    half = logits.shape[1] // 2
    if not logits.isfinite().all():
        raise ConfigError(f"model {name}: its logits are not finite (8 tokens were tried); check the weights, or give another dtype")
    changed, largest = (logits[0, :half] - logits[1, :half]).abs().max().item(), logits.abs().max().item()
    if changed > _CAUSAL * largest:
        raise ConfigError(
            f"model {name}: {type(model).__name__} is not causal: its logits at a token change by {changed:.2g} (the largest is "
            f"{largest:.2g}) when later tokens change; give a model that predicts each token from those before it"
        )


def _tried(model: Any, name: str) -> Tensor:
    """Logits (2, pos, token) of two sequences that differ in their second half."""
    rows, device = embedding_rows(model) or model.config.get_text_config().vocab_size, next(model.parameters()).device
    ids = _probe(rows, min(_PROBE, _positions(model) or _PROBE)).to(device)
    try:
        return model(input_ids=ids, use_cache=False).logits
    except Exception as error:
        raise ConfigError(f"model {name}: {type(model).__name__} cannot be run on tokens alone ({first_line(error)})") from None


def _probe(rows: int, length: int) -> Int[Tensor, "2 pos"]:
    """Two sequences that are equal in their first half only. Their tokens are from the middle of the table, far from special tokens."""
    first = (rows // 2 + torch.arange(length)) % rows
    second = first.clone()
    second[length // 2 :] = (second[length // 2 :] + max(1, rows // 4)) % rows
    return torch.stack([first, second])
