"""Functions become commands: the type of the first word, `--json`, and an option for every field of a configuration."""

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from cyclopts import Parameter

import paramlens
from paramlens.analysis.analysis import Analysis
from paramlens.config.file import fields, list_fields, load_config, parse_value, section_paths, shipped_configs, switches
from paramlens.config.model import Config
from paramlens.display.outcome import Outcome
from paramlens.errors import ConfigError
from paramlens.fields import expand_home
from paramlens.runs.layout import is_hub_id, is_run, require_run

DEMO_CONFIG = "induction-quick"
"""The configuration of the demo. `--help` without a configuration shows its values."""

FIELDS = {"--" + path.replace("_", "-"): path for path in (*section_paths(), *fields())}
"""Option → the section or field of a configuration that it sets."""

CONFIGS = f"{', '.join(shipped_configs())}, or a YAML file."

_AS_TYPED = Parameter(converter=lambda _, tokens: tokens[0].value)
_CONFIG = Annotated[Literal[tuple(shipped_configs())] | Path, _AS_TYPED, Parameter(show_choices=False, help=CONFIGS)]
_MODEL = Annotated[Path, _AS_TYPED]
_JSON = Annotated[bool, Parameter(help="Print one JSON document on stdout.")]


def command(function: Callable[..., Outcome], *, config: Config | None = None) -> Callable[..., int]:
    """The function as a command with `--json`: it prints the function's outcome and returns the exit code.

    A parameter `config` becomes the word CONFIG and an option for each field. config: the configuration whose values `--help` shows.
    """
    signature = inspect.signature(function)
    parameters = list(signature.parameters.values())
    parameters.append(inspect.Parameter("json", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=_JSON))
    if configured := "config" in signature.parameters:
        parameters = [parameters[0].replace(annotation=_CONFIG), *parameters[1:], *_field_parameters(config)]

    def run(*words: Any, json: bool = False, **options: Any) -> int:
        words, options = tuple(map(_at_home, words)), {name: _at_home(value) for name, value in options.items()}
        if configured:
            own = {name: value for name, value in options.items() if name in signature.parameters}
            outcome = function(load_config(words[0], overrides=overrides(options)), **own)
        else:
            outcome = function(*words, **options)
        outcome.print(as_json=json)
        return outcome.exit_code

    return _signed(run, function, parameters)


def analysis_command(analysis: Analysis) -> Callable[..., Outcome]:
    """The analysis as a function of paths: it opens the runs and writes the document to their directories."""
    signature = inspect.signature(analysis.compute)
    hints = get_type_hints(analysis.compute, localns={"Run": Path})
    first, *options = signature.parameters.values()
    kind = first.kind if first.kind is inspect.Parameter.VAR_POSITIONAL else inspect.Parameter.POSITIONAL_ONLY
    leading = first.replace(kind=kind, annotation=_MODEL if first.name == "model" else Path)

    def run(*words: Any, **given: Any) -> Outcome:
        paths = [word if first.name == "model" and not is_run(Path(word)) else run_directory(Path(word)) for word in words]
        return analysis.compute_and_keep(*(paramlens.open_run(path) if isinstance(path, Path) else path for path in paths), **given)

    typed = [option.replace(annotation=hints[option.name]) for option in options]
    return _signed(run, analysis.compute, [leading, *typed])


def _at_home(value: Any) -> Any:
    """A path with `~` replaced by the home directory (a shell leaves it in `--out=~/runs`); any other value unchanged."""
    return Path(expand_home(str(value))) if isinstance(value, Path) else value


def _signed(run: Callable[..., Any], like: Callable[..., Any], parameters: list[inspect.Parameter]) -> Callable[..., Any]:
    """`run` with the docstring of `like` and these parameters, in the form that cyclopts reads."""
    run.__doc__, run.__annotations__ = like.__doc__, {parameter.name: parameter.annotation for parameter in parameters}
    run.__signature__ = inspect.Signature(parameters)  # pyright: ignore[reportFunctionMemberAccess]
    return run


def run_directory(run: Path) -> Path:
    """The run's directory; user/name[@revision] is fetched from the Hub if no such path exists. Raises `RunDirError` if it is not a run."""
    name, _, revision = str(run).partition("@")
    if not run.exists() and is_hub_id(name):
        from paramlens.runs.hub import fetch

        return fetch(name, revision=revision or None)
    require_run(run)
    return run


def overrides(given: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration fields among a command's options, as `load_config` takes them. Raises `ConfigError` for an empty value."""
    found: dict[str, Any] = {}
    for flag, path in FIELDS.items():
        if (value := given.get(_name(path))) is None:
            continue
        words = [value] if isinstance(value, str) else value
        if "" in words:
            raise ConfigError(f"{flag}: give a value")
        parsed = [parse_value(word) for word in words]
        listed = path in list_fields() and not (len(parsed) == 1 and isinstance(parsed[0], list))
        found[path] = parsed if listed else parsed[0] if parsed else True
    return found


def _field_parameters(config: Config | None) -> list[inspect.Parameter]:
    """A keyword for every field and, hidden, for every section; values are parsed as YAML. config: its values are shown as defaults."""
    found: list[inspect.Parameter] = []
    for flag, path in FIELDS.items():
        infos, listed = fields().get(path, []), path in list_fields()
        parameter = Parameter(
            name=flag,
            help=next((info.description for info in infos if info.description), None),
            choices=_choices([info.annotation for info in infos]),
            consume_multiple=(1, None) if listed else (0, 1),
            show=bool(infos),
            show_default=_shown(config, path),
            metavar="VALUES" if listed else "VALUE",
            group="Fields of the configuration",
        )
        hint = Annotated[(list[str] if listed or path in switches() else str) | None, parameter]
        found.append(inspect.Parameter(_name(path), inspect.Parameter.KEYWORD_ONLY, default=None, annotation=hint))
    return found


def _choices(hints: list[Any]) -> tuple[str, ...] | None:
    """The words that a field allows. None: it allows other values too."""
    literals = [hint for hint in hints if get_origin(hint) is Literal]
    return tuple(str(word) for hint in literals for word in get_args(hint)) if literals and len(literals) == len(hints) else None


def _shown(config: Config | None, path: str) -> str | bool:
    """A field's value as `--help` shows it. False: the configuration's kind of task does not have this field."""
    value: Any = config
    for name in path.split("."):
        value = getattr(value, name, None)
    return False if value is None else " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _name(path: str) -> str:
    return path.replace(".", "__")
