"""Causal language models of transformers: loading them, and text as tokens and back."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from paramlens.errors import BatchError, ConfigError
from paramlens.tasks import Batch
from paramlens.tasks.tokens import open_ended, token_texts

_KNOWN = {
    "gpt2": {},
    "gpt2-medium": {"n_embd": 1024, "n_layer": 24, "n_head": 16},
    "gpt2-large": {"n_embd": 1280, "n_layer": 36, "n_head": 20},
    "gpt2-xl": {"n_embd": 1600, "n_layer": 48, "n_head": 25},
}
"""Shapes that need no file, as they differ from GPT-2's."""


@dataclass(frozen=True)
class Language:
    """A causal language model, its tokenizer, where both came from, and the commit on the Hub that they are of."""

    model: nn.Module
    tokenizer: Any
    name: str
    revision: str | None = None


def load_language(name: str, *, revision: str | None = None, dtype: torch.dtype = torch.float32) -> Language:
    """A model in evaluation mode and its tokenizer, from a local folder or the Hub, safetensors alone.

    Raises `ConfigError` for a name that is neither, and for a folder that lacks a file.
    """
    folder = _folder(name, revision, ("*.json", "*.safetensors", "*.txt", "*.model"))
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    sealed: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, use_safetensors=True, **sealed)
        tokenizer = AutoTokenizer.from_pretrained(folder, **sealed)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ConfigError(f"model {name}: transformers cannot load a causal language model from it ({_first_line(error)})") from None
    return Language(model.eval(), tokenizer, name, None if Path(name).exists() else folder.name)


def language_skeleton(name: str, *, revision: str | None = None) -> nn.Module:
    """The model without its weights (on the meta device). Of GPT-2's sizes the shape is known without any file."""
    from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config

    short = name.removeprefix("openai-community/")
    if short in _KNOWN and not Path(name).exists():
        config: Any = GPT2Config(**_KNOWN[short])
    else:
        try:
            config = AutoConfig.from_pretrained(_folder(name, revision, ("*.json",)), local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError, KeyError) as error:
            raise ConfigError(f"model {name}: transformers knows no such model ({_first_line(error)})") from None
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def save_language(model: nn.Module, tokenizer: Any, path: Path) -> None:
    """A plain Hugging Face folder, which `from_pretrained` opens; nothing is pickled."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    assert hasattr(model, "save_pretrained")
    model.save_pretrained(path)  # pyright: ignore[reportCallIssue]
    if tokenizer is not None:
        tokenizer.save_pretrained(path)


def _folder(name: str, revision: str | None, patterns: Sequence[str]) -> Path:
    path = Path(name)
    if path.exists():
        if not (path / "config.json").is_file():
            raise ConfigError(f"model {name}: no config.json in it; give a folder that save_pretrained wrote")
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(patterns)))
    except HFValidationError:
        raise ConfigError(f"model {name}: no such folder, and no id on the Hugging Face Hub either (namespace/name)") from None
    except GatedRepoError:
        raise ConfigError(f"model {name}: the Hub asks for its terms to be accepted; do so there, then `hf auth login`") from None
    except RevisionNotFoundError:
        raise ConfigError(f"model {name}: the Hub has no revision {revision}") from None
    except RepositoryNotFoundError:
        raise ConfigError(f"model {name}: no such folder, and the Hugging Face Hub has no such model; check the name") from None
    except (LocalEntryNotFoundError, OSError):
        raise ConfigError(
            f"model {name}: no such folder, and the Hugging Face Hub cannot be reached (offline?). Where there is a network, "
            f"`hf download {name} --local-dir {path.name}` fetches it; then give that folder: --task.model ./{path.name}"
        ) from None


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text as the model expects it to start (some begin every text with a token of their own)."""
    return list(tokenizer(text)["input_ids"])


def encode_sentence(tokenizer: Any, sentence: str) -> list[int]:
    """Token ids of a sentence to decompose. Raises `BatchError` if there is nothing in it to predict."""
    ids = encode(tokenizer, sentence)
    own = len(ids) - len(encode(tokenizer, ""))
    if own < 2:
        raise BatchError(
            f"sentence {sentence!r}: {own} token{'s' if own != 1 else ''}; give one of two or more, or there is nothing to predict"
        )
    return ids


def encode_fact(tokenizer: Any, prompt: str, answer: str) -> tuple[list[int], list[int]]:
    """Token ids of prompt and answer, as they stand in the sentence `prompt answer`.

    Raises `BatchError` for an answer that is empty, or that the vocabulary cannot spell.
    """
    before, whole = open_ended(tokenizer, prompt), open_ended(tokenizer, f"{prompt} {answer.strip()}")
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
    """Sequences of any lengths as one batch, each filled up on the right, where a causal model looks from no position of its own."""
    longest = max(map(len, sequences))
    fill = next(each for each in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if each is not None)
    ids = torch.tensor([[*sequence, *[fill] * (longest - len(sequence))] for sequence in sequences])
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    present = torch.arange(longest) < lengths[:, None]
    return Batch(
        model_inputs(ids),
        present=None if present.all() else present,
        texts=tuple(tuple(token_texts(tokenizer, sequence)) for sequence in sequences),
    )


def model_inputs(ids: Tensor) -> dict[str, Any]:
    """What the model is called with; a cache of keys and values would only be in the way."""
    return {"input_ids": ids, "use_cache": False}
