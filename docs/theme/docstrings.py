"""What docstrings and signatures need to come out of Markdown as they were written."""

import dataclasses
import re
from typing import Any

import griffe

MEANT = {"<": "&lt;", "[": "&#91;"}


class Plain(griffe.Extension):
    """In a docstring <name> is no HTML tag, [query][key] no link, and a line that tells of a parameter or field starts a paragraph."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if isinstance(obj, griffe.Function):
            for each in obj.parameters:
                quote_shapes(each.annotation)
            quote_shapes(obj.returns)
        if isinstance(obj, griffe.Attribute):
            quote_shapes(obj.annotation)
        if obj.docstring:
            own = [each.name for each in obj.parameters] if isinstance(obj, griffe.Function) else list(obj.members)
            obj.docstring.value = plain(obj.docstring.value, own)


def plain(text: str, names: list[str]) -> str:
    text = re.sub(r"(`[^`]*`)|<|(?<=\])\[", lambda found: found[1] or MEANT[found[0]], text)
    for name in names:
        text = re.sub(rf"\n{re.escape(name)}(?=(?:, \w+)*: )", f"\n\n`{name}`", text)
    return text


def quote_shapes(expression: Any) -> None:
    """Float[Tensor, "plan *rest"] was read as if its shape were Python; it gets its quotes back."""
    if isinstance(expression, griffe.ExprSubscript) and str(expression.left) in ("Float", "Bool", "Int"):
        inside = expression.slice
        if isinstance(inside, griffe.ExprTuple) and isinstance(inside.elements[-1], griffe.Expr):
            shape = str(inside.elements[-1]).replace("* ", "*")
            inside.elements = [*inside.elements[:-1], f'"{shape}"']
    elif isinstance(expression, griffe.Expr):
        for field in dataclasses.fields(expression):
            value = getattr(expression, field.name)
            for each in value if isinstance(value, list | tuple) else [value]:
                if field.name != "parent":
                    quote_shapes(each)
