"""The words of a command: its own options, and the fields of a configuration as flags on top."""

import contextlib
import dataclasses
import difflib
import io
import itertools
import re
from collections.abc import Sequence
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, get_origin

import tyro

from paramlens.config.file import field_paths, list_fields, load_config, parse_value, shipped_configs, switches
from paramlens.config.model import Config
from paramlens.errors import ConfigError
from paramlens.fields import expand_home

DEMO_CONFIG = "induction-quick"


def parse(name: str, kind: type, argv: Sequence[str]) -> tuple[Any, list[str]]:
    """The command's own options, and the words that are not: overrides of configuration fields. Raises `ConfigError` for any other."""
    prog = f"paramlens {name}"
    leading = next(iter(dataclasses.fields(kind)))
    first, needed = leading.name, leading.default is dataclasses.MISSING
    configured = first == "config"
    asks_help = bool({"-h", "--help"} & set(argv))
    if asks_help and configured:
        tyro.cli(_with_fields(kind, argv), prog=prog, args=["--help"], config=(tyro.conf.AvoidSubcommands,))
    if first in _FIRST and needed and not asks_help and (not argv or argv[0].startswith("-")):
        what = f"a configuration, {', '.join(shipped_configs())} or a YAML file" if configured else _FIRST[first]
        raise ConfigError(f"{name}: give {what} first, then options")
    if asks_help:
        tyro.cli(kind, prog=prog, args=["--help"], config=(tyro.conf.FlagCreatePairsOff,))
    for word in argv:
        _require_option(name, kind, word, configured=configured)
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint), contextlib.redirect_stdout(complaint):
            options, rest = tyro.cli(kind, prog=prog, args=argv, return_unknown_args=True, config=(tyro.conf.FlagCreatePairsOff,))
    except SystemExit:
        told = re.sub(_OPTIONAL_NUMBER, _said_plainly, _first_paragraph(complaint.getvalue()))
        raise ConfigError(f"{name}: {told}") from None
    for option, value in vars(options).items():
        if isinstance(value, Path):  # --out=~/runs, which a shell leaves as it is
            setattr(options, option, Path(expand_home(str(value))))
    if rest and not configured:
        raise ConfigError(f"{name}: unexpected argument {rest[0]!r}")
    return options, rest


def _require_option(name: str, kind: type, word: str, *, configured: bool) -> None:
    """Raise `ConfigError` for a word that looks like an option and is none; left to tyro, it and its value become arguments."""
    flag = word.partition("=")[0].removeprefix("--").replace("-", "_")
    own = [option.name for option in dataclasses.fields(kind) if get_origin(option.type) is not Annotated]  # those are positional
    if not word.startswith("--") or flag in own or (configured and flag in field_paths()):
        return
    close = difflib.get_close_matches(flag, own, n=1, cutoff=0.75)
    if close or not configured:
        there = ", ".join(f"--{option.replace('_', '-')}" for option in own)
        remedy = f"did you mean --{close[0].replace('_', '-')}?" if close else f"there are {there}"
        raise ConfigError(f"{name}: unknown option {word.partition('=')[0]}; {remedy}")


_FIRST = {
    "config": "",
    "run": "a run directory",
    "runs": "a run directory",
    "model": "a run directory or a model",
    "shell": "a shell, bash, zsh or fish,",
}
"""What a command's first word is, by the name of the option."""


_OPTIONAL_NUMBER = r"no type matching \{None\}\|(INT|FLOAT) could be instantiated from \['(.*)'\]\."
"""What tyro says of a number that may be left out."""


def _said_plainly(match: re.Match[str]) -> str:
    return f"{match[2]!r}: give a {'whole number' if match[1] == 'INT' else 'number'}"


def _first_paragraph(boxed: str) -> str:
    """What a complaint of tyro's says first, without the box drawn around it: a title, a rule or not, then the text up to a rule."""
    frame = " │╭╮╰╯─-"
    body = itertools.dropwhile(lambda line: not line.strip(frame), boxed.splitlines()[1:])
    return " ".join(line.strip(" │") for line in itertools.takewhile(lambda line: line.strip(frame), body))


def _with_fields(kind: type, argv: Sequence[str]) -> type:
    """The command's options and every configuration field as a flag: what --help shows."""
    names = [word for word in argv if not word.startswith("-")]
    loaded = load_config(names[0] if names else DEMO_CONFIG)
    overrides = tyro.conf.FlagConversionOff[Annotated[Config, tyro.conf.arg(name="")]]
    shown = dataclasses.make_dataclass(kind.__name__, [("overrides", overrides, field(default=loaded))], bases=(kind,), kw_only=True)
    shown.__doc__ = kind.__doc__
    return shown


def configuration(name: str, words: list[str]) -> Config:
    """The configuration `name` with flags on top: `--field value`, `--field=value`, several values for a list, none for true.

    Raises `ConfigError` for a word that is no flag, a flag without its value, and as `load_config` does.
    """
    overrides: dict[str, Any] = {}
    while words:
        flag, has_inline, inline = words[0].partition("=")
        if not flag.startswith("--") or flag == "--":
            raise ConfigError(f"unexpected argument {words[0]!r}; fields are flags, such as --optim.lr 3e-3")
        end = next((i for i, word in enumerate(words[1:], 1) if word.startswith("--")), len(words))
        values = [inline, *words[1:end]] if has_inline else words[1:end]
        path = flag.removeprefix("--").replace("-", "_")
        parsed = [parse_value(value) for value in values]
        if (has_inline and not inline) or (not parsed and path not in switches()):
            raise ConfigError(f"{flag}: give a value")
        if len(parsed) > 1 and path not in list_fields():
            raise ConfigError(f"{flag}: one value is needed, not {' '.join(values)}")
        listed = path in list_fields() and not (len(parsed) == 1 and isinstance(parsed[0], list))
        overrides[path] = parsed if listed else parsed[0] if parsed else True
        words = words[end:]
    return load_config(name, overrides=overrides)
