"""Read YAML that people write: 1e-3 is a number, and repeated keys and aliases are errors."""

import re
from typing import Any

import yaml

MOST_BYTES = 2**20
"""Maximum size of a configuration file, in bytes."""


_READ_AS_TEXT = {f"tag:yaml.org,2002:{kind}" for kind in ("bool", "int", "float", "timestamp")}


class _Loader(yaml.SafeLoader):
    """Reads floats as YAML 1.2 does: 1e-3 is a number, while YAML 1.1 reads a string. A key that is given twice is an error.

    Aliases are errors too: with them, a file of a few lines can expand to gigabytes or contain itself.
    """

    texts: tuple[str, ...] = ()
    """Keys whose values are read as text, even if they look like a number or a boolean."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.get_event()
            raise yaml.MarkedYAMLError(problem=f"*{event.anchor} is an alias; write the value out", problem_mark=event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        for key in {key for key in keys if keys.count(key) > 1}:
            raise yaml.constructor.ConstructorError(problem=f"{key} is given twice", problem_mark=node.start_mark)
        for key, value in node.value:
            if key.value in self.texts and value.tag in _READ_AS_TEXT:
                value.tag = "tag:yaml.org,2002:str"
        return super().construct_mapping(node, deep=deep)


def _plain_integer(loader: _Loader, node: yaml.ScalarNode) -> int:
    """A whole number. Raises an error for a number that YAML 1.1 reads in base 8 or 60 and YAML 1.2 does not."""
    value, text = loader.construct_yaml_int(node), node.value.lstrip("+-")
    if ":" in text or re.fullmatch("0[0-9_]+", text):
        other = "text" if ":" in text else str(int(text.replace("_", "")))
        raise yaml.constructor.ConstructorError(
            problem=f"{node.value} is {value} in YAML 1.1 and {other} in 1.2; write the number plainly, or text in quotes",
            problem_mark=node.start_mark,
        )
    return value


_Loader.add_constructor("tag:yaml.org,2002:int", _plain_integer)
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789"))


def parse_yaml(text: str, *, texts: tuple[str, ...] = ()) -> Any:
    """Parse a YAML text. texts: keys whose values are read as text.

    Raises `yaml.YAMLError`, `ValueError` or `RecursionError` if it is not valid YAML or has aliases.
    """
    loader = _Loader(text)
    loader.texts = texts
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()
