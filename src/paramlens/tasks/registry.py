"""The list of all tasks that a configuration can name. Importing this does not import torch."""

from functools import reduce
from operator import or_
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from paramlens.tasks.base import BaseTask

TASKS: tuple[type[BaseTask], ...] = tuple(
    resolve_name(f"paramlens.tasks.{home}")
    for home in (
        "induction.task:InductionTask",
        "facts.task:FactsTask",
        "text.task:TextTask",
        "custom:CustomTask",
    )
)

if TYPE_CHECKING:
    AnyTask = BaseTask
else:
    AnyTask = Annotated[reduce(or_, TASKS), Field(discriminator="kind")]
    """The field `task` of a configuration."""
