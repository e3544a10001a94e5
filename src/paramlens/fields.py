"""What sections of a configuration are made of, frozen models with checked numbers, and how their values are listed."""

import numbers
import os
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field


def plain_number(value: Any) -> Any:
    """A number as Python's own, NumPy's among them; anything else unchanged, true and false refused."""
    if isinstance(value, bool):
        raise ValueError("a number is needed, not true or false")
    if isinstance(value, numbers.Integral):
        return int(value)
    return float(value) if isinstance(value, numbers.Real) else value


def expand_home(path: str) -> str:
    """A path with the home directory in place of a leading ~. One of a user who does not exist stays as it is."""
    return os.path.expanduser(path)  # noqa: PTH111  # pathlib raises for such a user


Integer = Annotated[int, BeforeValidator(plain_number), Field(strict=True)]


Number = Annotated[float, BeforeValidator(plain_number), Field(strict=True)]


Count = Annotated[Integer, Field(ge=1, le=2**63 - 1)]


Natural = Annotated[Integer, Field(ge=0, le=2**63 - 1)]


Positive = Annotated[Number, Field(gt=0)]


NonNegative = Annotated[Number, Field(ge=0)]


Share = Annotated[Number, Field(ge=0, lt=1)]


PathText = Annotated[str, Field(min_length=1), AfterValidator(expand_home)]
"""A path, or an id on the Hugging Face Hub."""


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


def leaves(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of nested mappings under dotted names."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= leaves(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """`name old → new` for each value of `after` that `before` lacks or has otherwise."""
    old, new = leaves(before), leaves(after)
    return [f"{name} {old.get(name)!r} → {value!r}" for name, value in new.items() if value != old.get(name)]
