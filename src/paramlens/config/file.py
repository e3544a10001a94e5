"""Read and write configurations. Every error message names the field, the value and what to write instead.

This module does not import torch, so that a wrong configuration is reported at once.
"""

import difflib
import functools
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from paramlens.config.model import Config
from paramlens.errors import ConfigError
from paramlens.files.yaml import MOST_BYTES, parse_yaml
from paramlens.kernels.settings import MachineSettings


def parse_value(text: str) -> Any:
    """The value of a field, read as YAML: 3e-3 is a number, true a boolean, none and null are None, and the rest is text."""
    if text.lower() == "none":
        return None
    try:
        return parse_yaml(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        return text


def shipped_configs() -> list[str]:
    """Names of the shipped configurations."""
    folder = resources.files("paramlens.config") / "shipped"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def load_config(name_or_path: str | Path, *, overrides: Mapping[str, Any] | None = None) -> Config:
    """Load a shipped configuration by its name, or one from a YAML file, and apply dotted `overrides` ({"optim.lr": 3e-3}).

    Raises `ConfigError` if the name is neither, the file is not a YAML mapping, or a field is invalid.
    """
    source, tree = read_tree(name_or_path)
    for path, value in (overrides or {}).items():
        _set(tree, path.split("."), value)
    return make_config(tree, source=source)


def read_tree(name_or_path: str | Path) -> tuple[str, dict[str, Any]]:
    """The configuration's name in messages, and its fields as written, not validated. Raises `ConfigError` as `load_config` does."""
    source, text = _read(str(name_or_path))
    try:
        tree = parse_yaml(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        place = getattr(error, "problem_mark", None)
        line = f" line {place.line + 1}" if place else ""
        problem = str(getattr(error, "problem", None) or error)
        remedy = "; indent with spaces" if "'\\t'" in problem else ""
        raise ConfigError(f"{source}{line}: not YAML ({problem}){remedy}") from None
    if not isinstance(tree, dict):
        given = "an empty file" if tree is None else type(tree).__name__
        raise ConfigError(f"{source}: a mapping of fields is needed, not {given}; see the shipped {', '.join(shipped_configs())}")
    return source, tree


def make_config(tree: Mapping[str, Any], *, source: str = "config", partial: bool = False) -> Config:
    """Make a `Config` from a nested mapping. Raises `ConfigError`, whose message names `source`, the field, the value and the remedy.

    partial: whether the tree has only the fields from which a task is rebuilt, so that it need not fit losses that are not there.
    """
    try:
        return Config.model_validate(tree, context={"partial": partial})
    except ValidationError as error:
        raise ConfigError(explain(error, source=source)) from None


def with_known_fields(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The nested mapping of a configuration without the fields that this version does not know."""
    known = set(field_paths())

    def kept(node: Mapping[str, Any], prefix: str) -> dict[str, Any]:
        inner = {name: kept(value, f"{prefix}{name}.") if isinstance(value, Mapping) else value for name, value in node.items()}
        return {name: value for name, value in inner.items() if value or f"{prefix}{name}" in known}

    return kept(tree, "")


def dump_config(config: Config) -> str:
    """The configuration as YAML, from which `load_config` reads an equal one."""
    values = config.model_dump(mode="json")
    return yaml.safe_dump({name: values[name] for name in _in_order(Config)}, sort_keys=False, allow_unicode=True)


def _in_order(model: type[BaseModel]) -> list[str]:
    """The names of a section's fields, those of the machine last."""
    return sorted(model.model_fields, key=MachineSettings.model_fields.__contains__)


def explain(error: ValidationError, *, source: str) -> str:
    """The first problem of a validation error in one line, and the number of other problems."""
    problems = error.errors()
    first, place = problems[0], _place(problems[0])
    others = {tuple(_place(problem)) for problem in problems} - {tuple(place)}
    word = next((problem for problem in problems if problem["type"] == "literal_error" and _place(problem) == place), None)
    kind = place.pop(1) if place[:1] == ["task"] and len(place) > 1 else None  # pydantic puts the kind of task there
    field = ".".join(place)
    if first["type"] == "extra_forbidden":
        text = _unknown(place, first["input"], kind=kind)
    else:
        shown = repr(first["input"])
        unseen = first["type"] in ("missing", "invalid_key") or isinstance(first["input"], dict | BaseModel)
        given = "" if unseen else f" {shown if len(shown) <= 60 else shown[:57] + '...'}:"
        text = f"{field}{':' if field else ''}{given} {_remedy(first)}".strip()
        if word is not None and word is not first:
            text += f", or {word.get('ctx', {})['expected']}"
    more = f" (and {len(others)} more)" if others else ""
    return f"{source}: {text}{more}"


def _place(problem: Mapping[str, Any]) -> list[str]:
    """The path to the problem's field. Pydantic adds a name with brackets for each type of a field that takes a number or a word."""
    place = [str(part) for part in problem["loc"]]
    return place if problem["type"] in ("extra_forbidden", "invalid_key") else [part for part in place if "[" not in part]


_REMEDIES = {
    "greater_than": "give a number above {gt:g}",
    "greater_than_equal": "give {ge:g} or more",
    "less_than": "give a number below {lt:g}",
    "less_than_equal": "give {le:g} or less",
    "union_tag_not_found": "give its kind: {{kind: induction}}; a mapping replaces all of it, a single field is named with dots",
    "finite_number": "give a finite number",
    "float_type": "give a number",
    "int_type": "give a whole number",
    "bool_type": "give true or false",
    "bool_parsing": "give true or false",
    "missing": "missing; give it",
    "string_type": "give text",
    "tuple_type": "give a list",
    "too_short": "give at least {min_length}",
    "too_long": "give at most {max_length}",
    "invalid_key": "keys are names of fields",
    "literal_error": "give {expected}",
    "string_pattern_mismatch": "does not match {pattern}",
    "union_tag_invalid": "give {expected_tags}",
    "model_type": "give a mapping of fields",
    "model_attributes_type": "give a mapping of fields",
}


def _remedy(problem: Mapping[str, Any]) -> str:
    known = _REMEDIES.get(problem["type"])
    if known is not None:
        quoted = problem["type"] in ("int_type", "float_type") and isinstance(parse_value(str(problem["input"])), int | float)
        return known.format(**problem.get("ctx", {})) + (", without quotes" if quoted and isinstance(problem["input"], str) else "")
    reason = problem["msg"].removeprefix("Value error, ")
    return reason[:1].lower() + reason[1:]


def _unknown(place: list[str], value: Any, *, kind: str | None) -> str:
    """Message for an unknown field that suggests what was meant: nested keys, another kind of task, or the most similar field name."""
    path, above = ".".join(place), [part for name in place[:-1] for part in name.split(".")]
    known = field_paths()
    if path in known and "." in place[-1]:
        outer, *inner = place[-1].split(".")
        nested = f"{outer}: " + "".join(f"{{{part}: " for part in inner) + str(value) + "}" * len(inner)
        return f"{path}: keys with dots are for flags; in a mapping write {nested}"
    if path in known:
        return f"{path}: a task of kind {kind} has no such field"
    siblings = sorted({name.split(".")[len(above)] for name in known if name.split(".")[: len(above)] == above})
    close = [".".join([*above, name]) for name in difflib.get_close_matches(place[-1], siblings, n=1, cutoff=0.6)]
    close = close or difflib.get_close_matches(path, known, n=1, cutoff=0.6)
    if not close:
        shallow_last = sorted(known, key=lambda name: -name.count("."))
        by_leaf = {name.rsplit(".", 1)[-1]: name for name in shallow_last}
        close = [by_leaf[leaf] for leaf in difflib.get_close_matches(place[-1], list(by_leaf), n=1, cutoff=0.6)]
    if close:
        return f"{path}: unknown field; did you mean {close[0]}?"
    return f"{path}: unknown field; known here: {', '.join(siblings)}"


def field_paths() -> list[str]:
    """The dotted paths of all fields of a configuration."""
    return list(fields())


@functools.cache
def fields() -> dict[str, list[FieldInfo]]:
    """All fields of a configuration: dotted path → the field, once for each kind of task that has it."""
    found: dict[str, list[FieldInfo]] = {}

    def walk(model: type[BaseModel], prefix: str) -> None:
        for name in _in_order(model):
            field = model.model_fields[name]
            inner = _models(field.annotation)
            for kind in inner:
                walk(kind, f"{prefix}{name}.")
            if not inner:
                found.setdefault(f"{prefix}{name}", []).append(field)

    walk(Config, "")
    return found


@functools.cache
def section_paths() -> list[str]:
    """The dotted paths of all sections of a configuration: the paths of fields up to their last dot."""
    return list(dict.fromkeys(path.rpartition(".")[0] for path in fields() if "." in path))


@functools.cache
def switches() -> list[str]:
    """Fields that are true or false. On the command line, the flag without a value means true."""
    return [path for path, kinds in fields().items() if [field.annotation for field in kinds] == [bool]]


@functools.cache
def list_fields() -> list[str]:
    """Fields that hold several values. On the command line, each value is a separate argument."""
    return [path for path, kinds in fields().items() if any(get_origin(field.annotation) is tuple for field in kinds)]


def _models(annotation: Any) -> list[type[BaseModel]]:
    options = getattr(annotation, "__args__", (annotation,))
    return [kind for kind in options if isinstance(kind, type) and issubclass(kind, BaseModel)]


def _read(name_or_path: str) -> tuple[str, str]:
    if name_or_path in shipped_configs():
        return f"config {name_or_path}", (resources.files("paramlens.config") / "shipped" / f"{name_or_path}.yaml").read_text(
            encoding="utf-8"
        )
    path = Path(name_or_path)
    try:
        if path.is_file():
            if (size := path.stat().st_size) > MOST_BYTES:
                raise ConfigError(f"{path}: {size} bytes, at most {MOST_BYTES} are read; give a YAML file of fields")
            return str(path), path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not a text file in UTF-8; give a YAML file") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    close = difflib.get_close_matches(name_or_path, shipped_configs(), n=1, cutoff=0.5)
    hint = f", did you mean {close[0]}?" if close else "."
    raise ConfigError(f"no configuration {name_or_path!r}{hint} Give a YAML file or one of {', '.join(shipped_configs())}")


def _set(tree: dict[str, Any], path: list[str], value: Any) -> None:
    for part in path[:-1]:
        node = tree.setdefault(part, {})
        if not isinstance(node, dict):
            tree[part] = node = {}
        tree = node
    tree[path[-1]] = value
