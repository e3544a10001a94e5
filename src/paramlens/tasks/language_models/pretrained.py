"""The base class of tasks on a pretrained language model."""

from typing import TYPE_CHECKING, ClassVar

from paramlens.errors import ConfigError
from paramlens.fields import PathText
from paramlens.tasks.base import BaseTask, Skeleton, Target

if TYPE_CHECKING:
    from torch import nn


class PretrainedTask(BaseTask):
    """A task on a causal language model that `transformers` loads."""

    paths: ClassVar[tuple[str, ...]] = ("model",)

    model: PathText | None = None
    """A causal language model: an id on the Hugging Face Hub, or a local folder that `save_pretrained` wrote."""
    revision: str | None = None
    """Branch, tag or commit on the Hub. Defaults to the main branch. The commit is recorded in run.json."""

    def with_model(self, name: str) -> "PretrainedTask":
        return self.model_copy(update={"model": name, "revision": None})

    def pretrained(self, dtype: str) -> Target:
        import torch

        from paramlens.tasks.language_models.loading import load_language

        return load_language(self._named_model(), revision=self.revision, dtype=getattr(torch, dtype))

    def empty_model(self) -> "nn.Module":
        """The model without its weights, on the meta device."""
        from paramlens.tasks.language_models.loading import language_skeleton

        return language_skeleton(self._named_model(), revision=self.revision)

    def skeleton_of(self, model: "nn.Module", *, rows: int, length: int, length_field: str) -> Skeleton:
        """The skeleton of a model. length: tokens of the longest sequence, set by the field `length_field`.

        Raises `ConfigError` if the model takes fewer tokens or has no token embedding.
        """
        import torch

        from paramlens.tasks.language_models.limits import embedding_rows, token_limit

        if (limit := token_limit(model, length)) is not None:
            raise ConfigError(f"{length_field}: {length} tokens, and the model takes at most {limit}; give at most that many")
        if (vocabulary := embedding_rows(model)) is None:
            raise ConfigError(f"model {self.model}: {type(model).__name__} has no table of tokens; give a language model on tokens")
        ids = torch.empty(1, length, dtype=torch.long, device="meta")
        mask = torch.empty(1, 1, length, length, dtype=torch.bool, device="meta")  # a full mask, whose values are not read
        return Skeleton(model, {"input_ids": ids, "attention_mask": mask, "use_cache": False}, rows, length, vocabulary)

    def _named_model(self) -> str:
        if self.model is None:
            raise ConfigError("task.model: give an id on the Hugging Face Hub or a local folder")
        return self.model
