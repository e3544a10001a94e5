"""The command line parses, calls and prints. Results go to stdout, everything else to stderr."""

import inspect
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from cyclopts import App, CycloptsError, MissingArgumentError, Parameter, UnknownCommandError, UnknownOptionError, UnusedCliTokensError
from cyclopts.help import DefaultFormatter, PanelSpec
from rich.box import MINIMAL

from paramlens.cli.commands import COMMANDS
from paramlens.cli.parameters import CONFIGS, DEMO_CONFIG, FIELDS, analysis_command, command
from paramlens.config.file import load_config
from paramlens.display.streams import ErrorConsole, abandon, prepare_streams
from paramlens.errors import ConfigError, ParamLensError, RunInterrupted, Terminated
from paramlens.registry import ANALYSES
from paramlens.runs.layout import holds_toy
from paramlens.tracking.signals import termination
from paramlens.version import __version__

OVERVIEW = f"""paramlens {__version__} shows which parts of a Transformer's weights matter where

  paramlens demo               start here: the induction circuit from nothing
  paramlens decompose CONFIG   decompose; CONFIG: a shipped name or a YAML file
  paramlens circuit RUN        what is active where, and how faithful it is
  paramlens inspect RUN        what is active on which token of a sentence
  paramlens report RUN         one offline HTML page

paramlens --help lists all commands, paramlens COMMAND --help their options."""

_PARAMETER = Parameter(
    name_transform=lambda name: name.strip("_").replace("_", "-"),  # not lower(): C keeps its capital
    negative=(),  # no --no-json
    consume_multiple=(1, None),
    show_default=lambda value: value or None,
)


def entry() -> None:
    """The installed command `paramlens`."""
    prepare_streams()
    try:
        code = main(sys.argv[1:])
        sys.stdout.flush()
    except OSError as error:  # the reader of stdout, such as head, has ended, or the disk is full
        if not isinstance(error, BrokenPipeError):
            _report(f"stdout: {error.strerror or error}", 1, "red")
        abandon(sys.stdout)
        code = 1
    sys.exit(code)


def main(argv: Sequence[str]) -> int:
    """Run one command; returns the exit code: 0 done, 2 wrong input, 1 anything else, 130 or 143 after a signal."""
    with termination():
        try:
            if not argv:
                print(OVERVIEW)
                return 0
            function, bound = parsed(argv)
            try:
                return function(*bound.args, **bound.kwargs) or 0
            except RunInterrupted as stopped:
                return _report(f"interrupted; resume with: {shlex.join(_again(argv, bound.arguments))}", stopped.exit_code, "yellow")
        except ParamLensError as error:
            return _report(str(error), error.exit_code, "red")
        except OSError as error:
            if isinstance(error, BrokenPipeError):
                raise
            place = f"{error.filename}: " if error.filename else ""
            return _report(f"{place}{error.strerror or error}", 1, "red")
        except KeyboardInterrupt as stopped:
            return _report("interrupted", stopped.exit_code if isinstance(stopped, Terminated) else 130, "yellow")


def _report(text: str, code: int, style: str) -> int:
    ErrorConsole().print(f"paramlens: {text}", style=style, markup=False, highlight=False, soft_wrap=True)
    return code


def _again(argv: Sequence[str], given: Mapping[str, Any]) -> list[str]:
    """The command that continues an interrupted run. `demo` resumes by itself; a run holds its toy target and refuses --target."""
    toy = given.get("seeds") is None and given.get("target") is not None and holds_toy(given["target"])
    left_out = {"--resume", "--overwrite", "--json", *(["--target"] if toy else [])}
    kept = [word for before, word in pairwise(["", *argv]) if word.partition("=")[0] not in left_out and not (toy and before == "--target")]
    return ["paramlens", *kept, *(["--resume"] if argv[0] == "decompose" else [])]


def parsed(argv: Sequence[str]) -> tuple[Callable[..., Any], inspect.BoundArguments]:
    """The function of the command in `argv`, and its arguments. Raises `ConfigError` for words that the command does not take."""
    _require_text(argv)
    words = ["--help"] if argv[0] == "help" else list(argv)
    try:
        function, bound, _ = command_line(words).parse_args(words, print_error=False, exit_on_error=False, verbose=False)
    except CycloptsError as error:
        place = f"{error.command_chain[0]}: " if error.command_chain else ""
        raise ConfigError(f"{place}{_complaint(error)}") from None
    return function, bound


def command_line(words: Sequence[str] = ()) -> App:
    """The app with all commands. words: the words to parse; `CONFIG --help` shows the values of that configuration."""
    named = words[1] if len(words) > 1 and not words[1].startswith("-") else DEMO_CONFIG
    app = App(
        name="paramlens",
        help="Take a Transformer's weights apart, and see which parts matter where.",
        help_epilogue=f"CONFIG: {CONFIGS} Any field of it is an option (--optim.lr 3e-3).",
        help_format="plaintext",
        help_formatter=DefaultFormatter(panel_spec=PanelSpec(box=MINIMAL)),
        version=__version__,
        default_parameter=_PARAMETER,
    )
    for place, (name, function) in enumerate(COMMANDS.items()):
        shows = words[:1] == [name] and not {"--help", "-h"}.isdisjoint(words) and "config" in inspect.signature(function).parameters
        app.command(command(function, config=load_config(named) if shows else None), name=name, sort_key=place, help_epilogue="")
    for place, analysis in enumerate(ANALYSES):
        app.command(command(analysis_command(analysis)), name=analysis.name, group="Analyses", sort_key=place, help_epilogue="")
    app.command(completion, sort_key=len(COMMANDS), help_epilogue="")
    return app


def completion(shell: Literal["bash", "zsh", "fish"], /) -> None:
    """Print a script that lets a shell complete commands, options and fields.

    Args:
        shell: The shell that will read the script.
    """
    print(command_line().generate_completion(shell=shell))
    if shell == "zsh":  # so that the script can be sourced too
        print("compdef _cyclopts_paramlens paramlens")


def _complaint(error: CycloptsError) -> str:
    """The message of cyclopts, with a remedy where it has none."""
    error.command_chain, argument = (), error.argument
    if isinstance(error, MissingArgumentError) and argument is not None and not argument.name.startswith("-"):
        explained = error.app.assemble_argument_collection(parse_docstring=True) if error.app else ()
        meaning = next((each.parameter.help for each in explained if each.name == argument.name), "")
        return f"give {argument.name} first, then options; {argument.name}: {meaning}"
    if isinstance(error, UnusedCliTokensError) and error.unused_tokens:
        return f"unexpected argument {error.unused_tokens[0]!r}; options are written --name value"
    text = f"{error} `paramlens --help` lists all." if isinstance(error, UnknownCommandError) else str(error)
    if isinstance(error, UnknownOptionError):
        names = [each.name for each in error.argument_collection if each.show and each.name.startswith("-")]
        configured = any("." in name for name in names)
        own = [name for name in names if not configured or name not in FIELDS]
        text += f" There are {', '.join(own)}{'' if own == names else ', and the fields of CONFIG'}."
    return text


def _require_text(argv: Sequence[str]) -> None:
    """Raise `ConfigError` for a word that cannot be decoded as text, unless a file has that name."""
    for word in argv:
        if any("\ud800" <= letter <= "\udfff" for letter in word) and not Path(word.partition("=")[2] or word).exists():
            raise ConfigError(f"{word!r}: not valid {sys.getfilesystemencoding().upper()}, which the words of a command must be")
