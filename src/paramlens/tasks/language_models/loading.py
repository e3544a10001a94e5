"""Load causal language models of transformers, refusing incomplete ones, and save them so that they load again unchanged."""

import copy
import json
import re
import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from paramlens.errors import ConfigError, first_line
from paramlens.files.hub_errors import hub_errors
from paramlens.tasks.base import Target
from paramlens.tasks.language_models.limits import require_causal

_KNOWN = {
    "gpt2": {},
    "gpt2-medium": {"n_embd": 1024, "n_layer": 24, "n_head": 16},
    "gpt2-large": {"n_embd": 1280, "n_layer": 36, "n_head": 20},
    "gpt2-xl": {"n_embd": 1600, "n_layer": 48, "n_head": 25},
}
"""Known shapes, for which no file is needed, as differences from `GPT2Config`'s defaults."""

_SEALED: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}


def load_language(name: str, *, revision: str | None = None, dtype: torch.dtype = torch.float32) -> Target:
    """Load a model in evaluation mode and its tokenizer, from a local folder or the Hub. Weights are read from safetensors files only.

    Raises `ConfigError` if `name` is neither, if files are missing or damaged or lack a weight of the model, if the model's logits depend
    on later tokens, and if the tokenizer has no vocabulary.
    """
    folder = _folder(name, revision, ("*.json", "*.safetensors", "*.txt", "*.model"))
    _require_known(name, folder)
    _require_whole_files(name, folder)
    from transformers import AutoModelForCausalLM

    how = {"dtype": dtype, "use_safetensors": True, "output_loading_info": True, "ignore_mismatched_sizes": True, **_SEALED}
    with _quiet():
        with _plainly(name, "cannot load a causal language model from it"):
            loaded: Any = AutoModelForCausalLM.from_pretrained(folder, **how)
        model, found = loaded
        _require_all_weights(name, model, found)
        tokenizer = _tokenizer(name, folder)
    require_causal(model.eval(), name)
    return Target(model, tokenizer, name, None if _is_here(name) else folder.name)


def language_skeleton(name: str, *, revision: str | None = None) -> nn.Module:
    """The model without its weights, on the meta device. For the sizes of GPT-2 no file is needed."""
    from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config

    short = name.removeprefix("openai-community/")
    if short in _KNOWN and not _is_here(name):
        config: Any = GPT2Config(**_KNOWN[short])
    else:
        folder = _folder(name, revision, ("*.json",))
        _require_known(name, folder)
        with _quiet(), _plainly(name, "knows no such model"):
            config = AutoConfig.from_pretrained(folder, **_SEALED)
    with _quiet(), torch.device("meta"), _plainly(name, "has no causal language model of its kind"):
        return AutoModelForCausalLM.from_config(config)


@contextmanager
def _plainly(name: str, reason: str) -> Iterator[None]:
    """While active, any error of transformers becomes a `ConfigError` of one line."""
    try:
        yield
    except Exception as error:
        raise ConfigError(f"model {name}: transformers {reason} ({first_line(error)})") from None


def save_language(model: nn.Module, tokenizer: Any, path: Path) -> None:
    """Save a Hugging Face folder that `from_pretrained` opens, without pickle. `path` must be new or empty.

    The saved model is read back. If it differs, raises `ConfigError` and removes the folder.
    """
    saved: Any = model
    with _quiet(), _valid_generation(saved):
        try:
            saved.save_pretrained(path)
            again = type(saved).from_pretrained(path, use_safetensors=True, **_SEALED)
            changed = _first_difference(model, again)
        except OSError:
            shutil.rmtree(path, ignore_errors=True)
            raise
        except Exception as error:
            changed = first_line(error)
        if changed is not None:
            shutil.rmtree(path, ignore_errors=True)
            raise ConfigError(f"save {path}: transformers does not read this model back as it is ({changed}); use Edit.copy() in Python")
        if tokenizer is not None:
            tokenizer.save_pretrained(path)


def _first_difference(model: nn.Module, other: nn.Module) -> str | None:
    """The first parameter or buffer in which two models differ, or None. Buffers that are not saved may differ in type."""
    saved = model.state_dict().keys()
    ours, theirs = ({**dict(each.named_buffers()), **each.state_dict()} for each in (model, other))
    for name in sorted(ours.keys() | theirs.keys()):
        if name not in ours or name not in theirs:
            return f"{name} is in one of them alone"
        a, b = ours[name].detach().cpu(), theirs[name].detach().cpu()
        typed = a.dtype == b.dtype or name not in saved
        if not typed or a.shape != b.shape or not torch.equal(a.double().nan_to_num(), b.double().nan_to_num()):
            return f"{name} differs, {a.dtype} {tuple(a.shape)} before, {b.dtype} {tuple(b.shape)} after"
    return None


@contextmanager
def _valid_generation(model: Any) -> Iterator[None]:
    """While active, invalid sampling settings, with which transformers refuses to save, are replaced by valid ones."""
    before = getattr(model, "generation_config", None)
    try:
        if before is not None:
            try:
                before.validate(strict=True)
            except ValueError:  # for example a temperature although do_sample is false
                model.generation_config = copy.deepcopy(before)
                model.generation_config.do_sample = True
        yield
    finally:
        if before is not None:
            model.generation_config = before


@contextmanager
def _quiet() -> Iterator[None]:
    """While active, transformers shows no progress and no warnings. What it warns of is checked here and raised as an error."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _is_here(name: str) -> bool:
    """Whether a path exists. False for a name that is too long for a path."""
    try:
        return Path(name).exists()
    except OSError:
        return False


def _folder(name: str, revision: str | None, patterns: Sequence[str]) -> Path:
    path = Path(name)
    if _is_here(name):
        if (path / "adapter_config.json").is_file():
            raise ConfigError(
                f"model {name}: an adapter (adapter_config.json), whose weights belong to another model; in Python, "
                "merge_and_unload() joins both, and save_pretrained writes a folder to give here"
            )
        if not (path / "config.json").is_file():
            raise ConfigError(f"model {name}: no config.json in it; give a folder that save_pretrained wrote")
        return path
    if path.is_absolute():
        raise ConfigError(
            f"model {name}: no such folder; if it has moved, put it or a link to it there (or from Python: open_run(run, model=...))"
        )
    from huggingface_hub import snapshot_download

    offline = f"where there is a network, `hf download {name} --local-dir {path.name}` fetches it; then give ./{path.name} as the model"
    with hub_errors(name, revision, place=f"model {name}: no such folder, and ", raises=ConfigError, offline=offline):
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(patterns)))


def _require_known(name: str, folder: Path) -> None:
    """Raise `ConfigError` unless transformers has the architecture that config.json names."""
    from transformers import CONFIG_MAPPING, __version__

    described = _json_object(name, folder / "config.json")
    kind = described.get("model_type")
    if kind in CONFIG_MAPPING:
        return
    if "auto_map" in described:
        raise ConfigError(f"model {name}: it needs code of its own (auto_map in config.json), which is never run; give a model without")
    raise ConfigError(f"model {name}: model_type {kind!r} in its config.json is none that transformers {__version__} has")


def _json_object(name: str, file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"model {name}: its {file.name} cannot be read ({first_line(error)}); fetch or save it again") from None
    if not isinstance(found, dict):
        raise ConfigError(f"model {name}: its {file.name} is no JSON object; fetch or save it again")
    return found


def _require_whole_files(name: str, folder: Path) -> None:
    """Raise `ConfigError` unless the folder has all its safetensors files and each is complete."""
    from safetensors import SafetensorError, safe_open

    index, whole = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if whole.is_file():
        files = [whole]
    elif not index.is_file():
        files = sorted(folder.glob("*.safetensors"))
    else:
        shards = _json_object(name, index).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(each, str) for each in shards.values()):
            raise ConfigError(f"model {name}: its {index.name} has no weight_map of file names; fetch it again")
        files = [folder / each for each in sorted(set(shards.values()))]
    if not files:
        others = sorted(file.name for pattern in ("*.bin", "*.gguf", "*.pt", "*.pth", "*.h5", "*.msgpack") for file in folder.glob(pattern))
        there = f"; {others[0]} is not opened" if others else ""
        raise ConfigError(
            f"model {name}: no weights in safetensors, the one format that is read{there}; in Python, "
            "from_pretrained and save_pretrained convert what transformers reads"
        )
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise ConfigError(f"model {name}: {len(missing)} of {len(files)} weight files are missing, {missing[0]} first; fetch them")
    for file in files:
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise ConfigError(f"model {name}: its {file.name} is cut off or damaged ({first_line(error)}); fetch it again") from None


def _require_all_weights(name: str, model: nn.Module, found: Any) -> None:
    """Raise `ConfigError` if the files lack a weight of the model, or have layers that the model of config.json lacks.

    found: the loading info of transformers, which does not list weights that are tied to others or made from the configuration.
    """
    resized = sorted(found["mismatched_keys"], key=lambda each: each[0])
    if resized:
        weight, there, wanted = resized[0]
        raise ConfigError(
            f"model {name}: {weight} is {tuple(there)} in its files and {tuple(wanted)} by its config.json"
            f"{f' (and {len(resized) - 1} more)' if resized[1:] else ''}; give the config.json that belongs to the weights"
        )
    missing = sorted(found["missing_keys"])
    if missing:
        raise ConfigError(
            f"model {name}: its files lack {len(missing)} of {len(model.state_dict())} weights of {type(model).__name__} "
            f"({', '.join(missing[:3])}{', …' if missing[3:] else ''}), which would be random numbers; "
            "give a folder to which the whole model was saved"
        )
    places = {_numberless(key) for key in model.state_dict()}
    over = sorted(key for key in found["unexpected_keys"] if _numberless(key) in places)
    if over:
        raise ConfigError(
            f"model {name}: its files hold layers that its config.json leaves out ({over[0]}); give the config.json that belongs to them"
        )


def _numberless(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.)", "0", name)


def _tokenizer(name: str, folder: Path) -> Any:
    """The tokenizer of a folder. Raises `ConfigError` if there is none, if its files are damaged, or if it has no tokens."""
    from transformers import AutoTokenizer

    vocabularies = ("tokenizer.json", "tekken.json", "*.model", "*.tiktoken", "vocab*", "merges.txt")
    none = f"model {name}: no tokenizer in the folder; put the tokenizer files of the model there (tokenizer.save_pretrained writes them)"
    has_files = any(next(folder.glob(pattern), None) for pattern in vocabularies)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **_SEALED)
    except Exception as error:
        if not has_files:
            raise ConfigError(none) from None
        raise ConfigError(f"model {name}: its tokenizer cannot be loaded ({first_line(error)}); put whole tokenizer files there") from None
    if not has_files and type(tokenizer).vocab_files_names:  # transformers makes an empty tokenizer; a byte tokenizer needs no files
        raise ConfigError(none)
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):
        raise ConfigError(f"model {name}: its tokenizer has no tokens but special ones; put whole tokenizer files there")
    return tokenizer
