"""The task of a model and batches that the caller gives in Python."""

from typing import ClassVar, Literal

from paramlens.errors import ConfigError
from paramlens.tasks.base import BaseTask, Skeleton


class CustomTask(BaseTask):
    """The caller's own model and batches, given to `paramlens.decompose` in Python."""

    given_in_python: ClassVar = True
    evaluated_on: ClassVar = "training"
    batch_field: ClassVar = "sequences in a batch"

    kind: Literal["custom"] = "custom"

    def skeleton(self, *, batch: int) -> Skeleton:
        """Always raises `ConfigError`: only a call from Python has the model."""
        from paramlens.tasks.registry import TASKS

        kinds = ", ".join(task.model_fields["kind"].default for task in TASKS if not task.given_in_python)
        raise ConfigError(
            f"task: set task.kind to one of {kinds}; a model of your own is decomposed in Python, paramlens.decompose(model, batches, ...)"
        )
