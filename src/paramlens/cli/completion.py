"""Completion scripts for shells, made from the very tables that parse the commands. A script is static: completing starts no Python."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from paramlens.config.file import field_types, shipped_configs, switches

Kind = Literal["switch", "words", "path", "value", "config", "directory"]


@dataclasses.dataclass(frozen=True)
class _Word:
    """An option or a first argument: what may stand there."""

    name: str
    kind: Kind
    words: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class _Completed:
    """One command: its first argument, its options, and whether fields of a configuration are options too."""

    name: str
    about: str
    first: _Word | None
    options: tuple[_Word, ...]
    configured: bool


def script(shell: Literal["bash", "zsh", "fish"], commands: Mapping[str, type]) -> str:
    """The completion script of a shell. commands: name → the dataclass of its options."""
    known = [_completed(name, kind) for name, kind in commands.items()]
    return {"bash": _bash, "zsh": _zsh, "fish": _fish}[shell](known)


def _completed(name: str, kind: type) -> _Completed:
    hints = get_type_hints(kind, include_extras=True)
    given = [(field.name, hints[field.name]) for field in dataclasses.fields(kind)]
    positional = [_argument(field, get_args(hint)[0]) for field, hint in given if get_origin(hint) is Annotated]
    options = tuple(_option(field, hint) for field, hint in given if get_origin(hint) is not Annotated)
    first = positional[0] if positional else None
    about = (kind.__doc__ or "").split(".")[0].split(":")[0]
    return _Completed(name, about, first, (*options, _Word("--help", "switch")), configured=first is not None and first.kind == "config")


def _argument(name: str, hint: Any) -> _Word:
    if name == "config":
        return _Word(name, "config", tuple(shipped_configs()))
    if words := _choices(hint):
        return _Word(name, "words", words)
    return _Word(name, "directory" if name in ("run", "runs", "model") else "value")


def _option(name: str, hint: Any) -> _Word:
    flag = "--" + name.replace("_", "-")
    if words := _choices(hint):
        return _Word(flag, "words", words)
    kinds = {hint, *get_args(hint)}
    return _Word(flag, "switch" if bool in kinds else "path" if Path in kinds else "value")


def _fields() -> list[_Word]:
    """Every field of a configuration as an option."""
    found, bare = [], switches()
    for path, hints in field_types().items():
        words = tuple(dict.fromkeys(word for hint in hints for word in _choices(hint)))
        found.append(_Word("--" + path.replace("_", "-"), "switch" if path in bare else "words" if words else "value", words))
    return found


def _choices(hint: Any) -> tuple[str, ...]:
    """The words that a type allows, where it allows no others."""
    if get_origin(hint) is Literal:
        return tuple(str(word) for word in get_args(hint))
    inner = [each for each in get_args(hint) if each is not type(None)]
    if get_origin(hint) is Annotated:
        return _choices(inner[0])
    named = [_choices(each) for each in inner] if get_origin(hint) in (Union, type(int | None)) else []
    return tuple(word for words in named for word in words)


def _groups(command: str, options: list[_Word] | tuple[_Word, ...]) -> list[tuple[list[str], _Word]]:
    """Options that are completed alike, as `command option`, and one of them."""
    groups: dict[tuple[Kind, tuple[str, ...]], tuple[list[str], _Word]] = {}
    for option in options:
        if option.kind != "switch":
            groups.setdefault((option.kind, option.words), ([], option))[0].append(f"{command} {option.name}")
    return list(groups.values())


def _bash(known: list[_Completed]) -> str:
    fields = _fields()
    actions = {"path": "return", "value": "compopt +o default 2>/dev/null; return"}

    def after(groups: list[tuple[list[str], _Word]]) -> str:
        return "".join(
            f"    {'|'.join(_quoted(name) for name in names)}) {actions.get(word.kind) or _bash_words(word.words)} ;;\n"
            for names, word in groups
        )

    configured = [each.name for each in known if each.configured]
    values = "".join(after(_groups(each.name, each.options)) for each in known)
    options = "".join(f"    {each.name}) options={_quoted(_names(each.options))}{_bash_fields(each)} ;;\n" for each in known)
    firsts = "".join(_bash_first(each) for each in known)
    repeated = "|".join(each.name for each in known if each.first is not None and each.first.name == "runs")
    return f"""# bash completion for paramlens: source <(paramlens completion bash)
_paramlens() {{
  local word=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD-1]}} command=${{COMP_WORDS[1]}} options=
  local fields={_quoted(_names(fields))}
  COMPREPLY=()
  if [ "$COMP_CWORD" -eq 1 ]; then
    COMPREPLY=($(compgen -W {_quoted(" ".join([*(each.name for each in known), "--help", "--version"]))} -- "$word")); return
  fi
  case "$command $before" in
{values}  esac
  case "$command" in {"|".join(configured)})
    case "fields $before" in
{after(_groups("fields", fields))}    esac ;;
  esac
  if [ "$COMP_CWORD" -eq 2 ] && [[ "$word" != -* ]]; then
    case "$command" in
{firsts}    esac
    return
  fi
  if [[ "$word" != -* ]]; then
    case "$command" in {repeated}) _paramlens_directories; return ;; esac
  fi
  case "$command" in
{options}  esac
  COMPREPLY=($(compgen -W "$options" -- "$word"))
}}
_paramlens_files() {{
  local IFS=$'\\n'
  COMPREPLY+=($(compgen -f -X '!*.y*ml' -- "$word") $(compgen -d -- "$word")); compopt -o filenames 2>/dev/null
}}
_paramlens_directories() {{
  local IFS=$'\\n'
  COMPREPLY=($(compgen -d -- "$word")); compopt -o filenames 2>/dev/null
}}
complete -o bashdefault -o default -F _paramlens paramlens
"""


def _bash_fields(command: _Completed) -> str:
    return '" $fields"' if command.configured else ""


def _bash_words(words: tuple[str, ...]) -> str:
    return f'COMPREPLY=($(compgen -W {_quoted(" ".join(words))} -- "$word")); return'


def _bash_first(command: _Completed) -> str:
    if command.first is None:
        return f'      {command.name}) COMPREPLY=($(compgen -W {_quoted(_names(command.options))} -- "$word")) ;;\n'
    if command.first.kind == "directory":
        return f"      {command.name}) _paramlens_directories ;;\n"
    files = "; _paramlens_files" if command.first.kind == "config" else ""
    return f'      {command.name}) COMPREPLY=($(compgen -W {_quoted(" ".join(command.first.words))} -- "$word")){files} ;;\n'


def _zsh(known: list[_Completed]) -> str:
    described = "\n".join(f"    {_quoted(f'{each.name}:{each.about}')}" for each in known)
    cases = ""
    for each in known:
        lines = [*(_zsh_option(option) for option in each.options), *(["$fields[@]"] if each.configured else [])]
        if each.first is not None:
            place = "*" if each.first.name == "runs" else "1"
            lines.append(_quoted(f"{place}:{each.first.name}:{_zsh_action(each.first)}"))
        cases += f"    {each.name}) _arguments {' '.join(lines)} ;;\n"
    fields = "\n".join(f"    {_zsh_option(option)}" for option in _fields())
    return f"""#compdef paramlens
# zsh completion for paramlens: source <(paramlens completion zsh), after compinit
_paramlens_config() {{
  compadd -- {" ".join(shipped_configs())}
  _files -g '*.y(a|)ml'
}}
_paramlens() {{
  local -a commands fields
  commands=(
{described}
  )
  fields=(
{fields}
  )
  if (( CURRENT == 2 )); then _describe command commands; return; fi
  local command=$words[2]
  shift words; (( CURRENT-- ))
  case $command in
{cases}  esac
}}
compdef _paramlens paramlens
"""


def _zsh_option(option: _Word) -> str:
    return _quoted(option.name if option.kind == "switch" else f"{option.name}:value:{_zsh_action(option)}")


def _zsh_action(word: _Word) -> str:
    if word.kind == "config":
        return "_paramlens_config"
    return {"words": f"({' '.join(word.words)})", "path": "_files", "directory": "_files -/"}.get(word.kind, " ")


def _fish(known: list[_Completed]) -> str:
    lines = ["# fish completion for paramlens: paramlens completion fish | source", "complete -c paramlens -f"]
    for each in known:
        lines.append(f"complete -c paramlens -n __fish_use_subcommand -a {each.name} -d {_quoted(each.about)}")
        here = f"complete -c paramlens -n '__fish_seen_subcommand_from {each.name}'"
        if each.first is not None:
            action = "(__fish_complete_directories)" if each.first.kind == "directory" else " ".join(each.first.words)
            lines.append(f"{here} -a {_quoted(action)}{' -F' if each.first.kind == 'config' else ''}")
        lines += [_fish_option(here, option) for option in each.options]
    configured = " ".join(each.name for each in known if each.configured)
    lines += [_fish_option(f"complete -c paramlens -n '__fish_seen_subcommand_from {configured}'", field) for field in _fields()]
    return "\n".join(lines) + "\n"


def _fish_option(here: str, option: _Word) -> str:
    takes = {"switch": "", "words": f" -x -a {_quoted(' '.join(option.words))}", "path": " -r -F"}.get(option.kind, " -x")
    return f"{here} -l {option.name.removeprefix('--')}{takes}"


def _names(options: list[_Word] | tuple[_Word, ...]) -> str:
    return " ".join(option.name for option in options)


def _quoted(text: str) -> str:
    """In single quotes, as all three shells read them."""
    return "'" + text.replace("'", "'\\''") + "'"
