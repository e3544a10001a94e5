"""The configuration of the induction-head task (§5.1, Figure 1, Table 3). Its target is trained here."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from paramlens.fields import Count, Natural, NonNegative, Number, Positive, Section, Share
from paramlens.tasks.base import BaseTask, OnCheck, OnGivenUp, Skeleton, Target, TargetCheck, TrainingPlan, on_meta

if TYPE_CHECKING:
    from paramlens.method.task import Task
    from paramlens.tasks.induction.model import InductionTransformer


class TargetTraining(Section):
    """How a toy target is trained (Table 3)."""

    optimizer: Literal["adam", "adamw"] = "adamw"
    """Optimizer. Table 3: AdamW."""
    lr: Positive = 1e-3
    """Learning rate. Table 3: 0.001."""
    weight_decay: NonNegative = 0.01
    """Decoupled weight decay. Table 3: 0.01."""
    undecayed: tuple[str, ...] = ()
    """Patterns of parameter names without weight decay, written as in `sites`. Table 3: none."""
    batch: Count = 1024
    """Sequences per step. Table 3: 1024."""
    steps: Count = 100_000
    """Steps of one attempt. Table 3: 100000."""
    warmup: NonNegative = 1000
    """Linear learning-rate warm-up: number of steps if 1 or more, share of all steps if below 1. Table 3: 1000."""
    settle: Natural = 0
    """Steps of cosine decay to 0 that end an attempt. The decay starts at the first check after the phase change. 0: the rate is
    constant for all `steps`, as in Table 3."""
    settle_from: Natural = 0
    """Earliest step at which the decay can start. Attention gets sharper while the rate is high."""
    settle_accuracy: Share = 0.995
    """Accuracy on held-out sequences at which the phase change counts as passed."""
    attempts: Count = 1
    """Maximum number of attempts, each from other random weights, until a target has converged."""
    converged_loss: Positive = 1e-3
    """Cross-entropy (nats, last token, held-out sequences) at or below which the target counts as converged."""
    converged_accuracy: Share = 0.999
    """Accuracy (held-out sequences) at or above which the target counts as converged."""
    window: Count | None = None
    """Curriculum: train first on sequences of this many tokens, at a random offset in the position table and with the first s near the
    start, where it is easily mistaken for m. None: no curriculum; all sequences have full length and a uniform first s."""
    window_steps: Natural = 0
    """Number of steps of the curriculum."""
    check_every: Count = 100
    """Steps between measurements on held-out sequences."""

    @model_validator(mode="after")
    def _attempt_can_settle(self) -> "TargetTraining":
        if self.settle and self.settle_from + self.settle > self.steps:
            raise ValueError(f"settle_from {self.settle_from} and settle {self.settle} do not fit into steps {self.steps}; raise steps")
        return self

    @model_validator(mode="after")
    def _window_has_steps(self) -> "TargetTraining":
        if (self.window is None) != (self.window_steps == 0):
            raise ValueError(f"window ({self.window}) and window_steps ({self.window_steps}) go together: give both or neither")
        if self.window is not None and self.window < 4:
            raise ValueError(f"window must hold s1, m, a random token and s2: 4 tokens or more, not {self.window}")
        return self


@dataclass(frozen=True)
class InductionCheck(TargetCheck):
    """Measurements of the target on held-out sequences: a point of Figure 5, and the attention of the induction circuit."""

    attention_m_s1: float
    """Mean attention from m to s1 in the first block, of the head with the most."""
    attention_s2_m: float
    """Mean attention from s2 to m in the last block, of the head with the most."""

    def __str__(self) -> str:
        return f"{super().__str__()}  attention m→s1 {self.attention_m_s1:.3f}  s2→m {self.attention_s2_m:.3f}"


class InductionTask(BaseTask):
    """The induction-head task and its attention-only target (§5.1, Table 3)."""

    check: ClassVar = InductionCheck
    how_trained: ClassVar = frozenset({"training", "embedding_scale", "position_scale", "position_offset", "shuffled", "elsewhere"})

    kind: Literal["induction"] = "induction"
    vocabulary: Annotated[Count, Field(ge=2)] = 128
    """Number of ordinary tokens |V|, without the special token s. Table 3: 128."""
    length: Annotated[Count, Field(ge=4)] = 64
    """Tokens per sequence, n. Table 3: 64."""
    width: Count = 16
    """Width of the residual stream, d_model. Table 3: 16."""
    blocks: Annotated[Count, Field(le=1000)] = 2
    """Number of Transformer blocks (attention only), at most 1000. §5.1: 2."""
    heads: Count = 1
    """Attention heads per block. §5.1: 1."""
    positions: Literal["learned", "sinusoidal"] = "learned"
    """Kind of position encodings. The paper does not say which it uses."""
    added: Literal["before", "after"] = "before"
    """Position encodings are added to the inputs of Q and K (`before`, Shortformer) or to the queries and keys (`after`)."""
    embedding_scale: Positive = 1.0
    """Standard deviation of the token embedding at initialisation."""
    position_scale: Positive = 1.0
    """Standard deviation of learned position encodings at initialisation; factor on sinusoidal ones."""
    position_offset: NonNegative = 0.0
    """Standard deviation of one vector that is added to all learned encodings at initialisation. A query can match this shared
    direction whatever the position, as it can the low frequencies of sinusoidal encodings."""
    shuffled: Annotated[Number, Field(ge=0, le=1)] = 0.0
    """Share of the sequences of each step whose tokens are in random order, so that the decomposition also holds where there is
    nothing to copy. Held-out sequences never are. The paper: 0."""
    elsewhere: Natural = 0
    """Sequences with their tokens in random order in each step for `losses.elsewhere`, which are not decomposed. The paper: 0."""
    training: TargetTraining = TargetTraining()

    @model_validator(mode="after")
    def _sizes_fit(self) -> "InductionTask":
        if self.width % self.heads:
            raise ValueError(f"width {self.width} must be a multiple of heads {self.heads}")
        if self.training.window is not None and self.training.window > self.length:
            raise ValueError(f"training.window {self.training.window} must not exceed length {self.length}")
        return self

    @property
    def trained_here(self) -> bool:
        return True

    @property
    def longest(self) -> int:
        return self.length

    @property
    def adds_positions_after_projection(self) -> bool:
        return self.added == "after"

    def skeleton(self, *, batch: int) -> Skeleton:
        import torch

        ids = torch.empty(1, self.length, dtype=torch.long, device="meta")
        return Skeleton(on_meta(self.network), ids, batch, self.length, self.vocabulary + 1, last_token=True)

    def network(self) -> "InductionTransformer":
        from paramlens.tasks.induction.model import InductionTransformer

        return InductionTransformer(self)

    def training_plan(self) -> TrainingPlan:
        numbers = 3 * (self.vocabulary + 1) + self.blocks * (6 * self.width + 2 * self.heads * self.length)
        return TrainingPlan(
            what=f"{self.blocks} attention blocks, up to {self.training.steps} steps an attempt",
            steps=self.training.steps,
            steps_field="task.training.steps",
            batch=self.training.batch,
            batch_field="task.training.batch",
            bytes=4 * self.training.batch * self.length * numbers,
        )

    def train(self, *, seed: int, device: str, on_check: OnCheck, on_given_up: OnGivenUp) -> Target:
        from paramlens.tasks.induction.training import train_target

        model, history = train_target(self, seed=seed, device=device, on_check=on_check, on_given_up=on_given_up)
        return Target(model, history=history)

    def make(self, target: Target, *, seed: int, batch: int) -> "Task":
        from paramlens.tasks.induction.model import InductionTransformer
        from paramlens.tasks.induction.sequences import induction_task

        assert isinstance(target.model, InductionTransformer)
        return induction_task(self, target.model, seed=seed, batch=batch)
