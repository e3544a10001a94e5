"""The configuration of the facts task (§5.2). If no model is given, a small GPT-2 is trained here."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from paramlens.errors import RunDirError
from paramlens.fields import Count, Natural, NonNegative, Positive, Section, Share
from paramlens.files.plain import sync
from paramlens.tasks.base import FOLDER, OnCheck, OnGivenUp, Skeleton, Target, TargetCheck, TrainingPlan, on_meta
from paramlens.tasks.language_models.pretrained import PretrainedTask

if TYPE_CHECKING:
    from paramlens.method.task import Task

POSITIONS = 64
"""Maximum number of tokens that the small GPT-2 takes."""


class Miniature(Section):
    """How a small GPT-2 with its own tokenizer is built and trained on the shipped facts. It is not in the paper."""

    blocks: Annotated[Count, Field(le=1000)] = 4
    """Number of Transformer blocks."""
    width: Count = 128
    """Width of the residual stream."""
    heads: Count = 4
    """Attention heads per block."""
    vocabulary: Annotated[Count, Field(ge=300)] = 1600
    """Maximum number of tokens of the byte-level BPE."""
    embedding_scale: Positive = 0.1
    """Standard deviation of the token embedding. It stays random, so that the facts are learned in the sites."""
    dropout: Share = 0.1
    """Dropout in training, as in GPT-2. Without it, almost any change of the weights also changes other facts."""
    swapped: Share = 0.15
    """Share of the training sentences with a wrong answer of the same relation. The right answer then has a probability near 1 minus this
    share and not 0.9999, which hardly any edit would change."""
    steps: Count = 600
    """Training steps."""
    batch: Count = 64
    """Sentences per step."""
    lr: Positive = 2e-3
    """Learning rate of AdamW, with cosine decay to 0."""
    weight_decay: NonNegative = 0.1
    """Decoupled weight decay."""
    converged_accuracy: Share = 0.98
    """The target counts as converged if the answer is the likeliest continuation for at least this share of the facts."""
    check_every: Count = 50
    """Steps between measurements on all facts."""

    @model_validator(mode="after")
    def _heads_fit(self) -> "Miniature":
        if self.width % self.heads:
            raise ValueError(f"width {self.width} must be a multiple of heads {self.heads}")
        return self


@dataclass(frozen=True)
class FactsCheck(TargetCheck):
    """Measurements of the small GPT-2 on all shipped facts.

    loss: of the training step, in nats per token, with swapped answers. accuracy: share of the facts whose answer is the likeliest
    continuation, in every token.
    """

    probability: float
    """Median probability of the answer."""

    def __str__(self) -> str:
        return f"{super().__str__()}  probability {self.probability:.3f}"


class FactsTask(PretrainedTask):
    """A few sentences through a language model (§5.2). Without `model`, a small GPT-2 is first trained on the shipped facts."""

    evaluated_on: ClassVar = "training"
    batch_field: ClassVar = "sentences in task.sentences"
    check: ClassVar = FactsCheck
    how_trained: ClassVar = None

    kind: Literal["facts"] = "facts"
    sentences: Annotated[tuple[str, ...], Field(min_length=1)] = (
        "Kobe Bryant plays the sport of basketball",
        "Tiger Woods plays the sport of golf",
    )
    """Sentences that are decomposed. All of them are in every batch. §5.2: these two."""
    others: Natural = 0
    """Number of further sentences in every batch, drawn from the shipped facts for each step and also decomposed. §5.2: 0."""
    elsewhere: Natural = 0
    """Number of other shipped facts in every step for `losses.elsewhere`, drawn for each step and not decomposed. §5.2: 0."""
    miniature: Miniature = Miniature()

    @property
    def trained_here(self) -> bool:
        return self.model is None

    @property
    def own_sentences(self) -> tuple[str, ...]:
        return self.sentences

    def skeleton(self, *, batch: int) -> Skeleton:
        """A sentence counts as one token per word plus one, as the tokenizer may not be available. `batch` is ignored."""
        words, rows = max(len(sentence.split()) + 1 for sentence in self.sentences), len(self.sentences) + self.others
        model = on_meta(self.network) if self.trained_here else self.empty_model()
        return self.skeleton_of(model, rows=rows, length=words, length_field="task.sentences")

    def network(self) -> Any:
        from paramlens.tasks.facts.miniature import miniature_model

        return miniature_model(self.miniature, self.miniature.vocabulary)

    def training_plan(self) -> TrainingPlan:
        small = self.miniature
        numbers = 3 * small.vocabulary + small.blocks * (20 * small.width + 2 * small.heads * POSITIONS)
        return TrainingPlan(
            what=f"a GPT-2 of {small.blocks} blocks, {small.steps} steps",
            steps=small.steps,
            steps_field="task.miniature.steps",
            batch=small.batch,
            batch_field="task.miniature.batch",
            bytes=4 * small.batch * POSITIONS * numbers,
        )

    def train(self, *, seed: int, device: str, on_check: OnCheck, on_given_up: OnGivenUp) -> Target:
        """Train the small GPT-2, in one attempt."""
        from paramlens.tasks.facts.miniature import train_miniature

        return train_miniature(self.miniature, self.sentences, seed=seed, device=device, on_check=on_check)

    def save(self, target: Target, path: Path) -> None:
        """Write the model and its tokenizer as a Hugging Face folder."""
        from paramlens.tasks.language_models.loading import save_language

        save_language(target.model, target.tokenizer, path / FOLDER)
        for file in (path / FOLDER).iterdir():
            sync(file)

    def load(self, path: Path) -> Target:
        from paramlens.tasks.language_models.loading import load_language

        if not (path / FOLDER).is_dir():
            raise RunDirError(f"{path}: no folder {FOLDER}; give a directory made by train-target or decompose")
        return load_language(str(path / FOLDER))

    def require_sound(self, target: Target) -> None:
        from paramlens.tasks.facts.sentences import require_different

        require_different(self, target.tokenizer)

    def make(self, target: Target, *, seed: int, batch: int) -> "Task":
        """`batch` is ignored: all sentences are in every batch."""
        from paramlens.tasks.facts.sentences import facts_task

        return facts_task(self, target, seed=seed)
