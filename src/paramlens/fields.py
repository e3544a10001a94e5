"""The building blocks of a configuration: `Section`, a frozen model, the types of its fields, and functions that list its values."""

import numbers
import os
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field


def plain_number(value: Any) -> Any:
    """Convert a number, also one of NumPy's, to `int` or `float`. Leaves other values as they are; raises `ValueError` for a bool."""
    if isinstance(value, bool):
        raise ValueError("a number is needed, not true or false")
    if isinstance(value, numbers.Integral):
        return int(value)
    return float(value) if isinstance(value, numbers.Real) else value


def expand_home(path: str) -> str:
    """Replace a leading ~ by the home directory. Leaves the path as it is if the user does not exist."""
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
    """Flatten nested mappings: dotted name → value."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= leaves(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """`name old → new` for each value of `after` that is missing from `before` or differs there."""
    old, new = leaves(before), leaves(after)
    return [f"{name} {old.get(name)!r} → {value!r}" for name, value in new.items() if value != old.get(name)]
