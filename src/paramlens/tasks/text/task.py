"""The configuration of the text task: a language model on running text."""

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from paramlens.fields import Count, Natural, Number, PathText
from paramlens.tasks.base import Skeleton, Target
from paramlens.tasks.language_models.pretrained import PretrainedTask

if TYPE_CHECKING:
    from paramlens.method.task import Task


class TextTask(PretrainedTask):
    """A language model on running text, which is cut into pieces of equal length."""

    paths: ClassVar = ("model", "source", "elsewhere_source")

    kind: Literal["text"] = "text"
    source: PathText
    """Path of a text file (UTF-8), or of a .jsonl file with a field `text` and one document per line."""
    length: Annotated[Count, Field(ge=2)] = 64
    """Tokens per piece."""
    held_out: Annotated[Number, Field(gt=0, lt=1)] = 0.1
    """Share of the pieces, taken from the end, that is held out for evaluation."""
    elsewhere: Natural = 0
    """Pieces of `elsewhere_source` in each step for `losses.elsewhere`, which are not decomposed."""
    elsewhere_source: PathText | None = None
    """Path of that other text, as `source`."""

    @model_validator(mode="after")
    def _other_text_is_used(self) -> "TextTask":
        if self.elsewhere and self.elsewhere_source is None:
            raise ValueError(f"elsewhere {self.elsewhere}: pieces of another text; give its path as elsewhere_source")
        if self.elsewhere_source is not None and not self.elsewhere:
            raise ValueError(f"elsewhere_source {self.elsewhere_source}: no step reads it; give elsewhere, the pieces in each step")
        return self

    @property
    def longest(self) -> int:
        return self.length

    def skeleton(self, *, batch: int) -> Skeleton:
        return self.skeleton_of(self.empty_model(), rows=batch, length=self.length, length_field="task.length")

    def make(self, target: Target, *, seed: int, batch: int) -> "Task":
        from paramlens.tasks.text.pieces import text_task

        return text_task(self, target, seed=seed, batch=batch)
