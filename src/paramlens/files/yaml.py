"""YAML as people write it: 1e-3 is a number, a key stands once, and a file has a size."""

import re
from typing import Any

import yaml

MOST_BYTES = 2**20
"""Maximum size of a configuration file, in bytes."""


_READ_AS_TEXT = {f"tag:yaml.org,2002:{kind}" for kind in ("bool", "int", "float", "timestamp")}


class _Loader(yaml.SafeLoader):
    """YAML 1.2's floats: 1e-3 is a number, which YAML 1.1 reads as a string; a key given twice is an error.

    Anchors are one too: by them a file of a few lines can unfold to gigabytes, or hold itself.
    """

    texts: tuple[str, ...] = ()
    """Keys whose values are text as they stand, even where they look like a number or a boolean."""

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
    """A whole number; one that YAML 1.1 reads in base 8 or 60, and YAML 1.2 otherwise, is refused."""
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
    """What a YAML text says. texts: keys whose values are text as they stand.

    Raises `yaml.YAMLError`, `ValueError` or `RecursionError` for one that is none, or has aliases.
    """
    loader = _Loader(text)
    loader.texts = texts
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()
