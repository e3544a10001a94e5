"""What a configuration says of its task."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from paramlens.fields import Count, Natural, NonNegative, Number, Positive, Section, Share


class TargetTraining(Section):
    """How a toy target is trained (Table 3)."""

    optimizer: Literal["adam", "adamw"] = "adamw"
    """Table 3: AdamW."""
    lr: Positive = 1e-3
    """Learning rate. Table 3: 0.001."""
    weight_decay: NonNegative = 0.01
    """Decoupled weight decay. Table 3: 0.01."""
    undecayed: tuple[str, ...] = ()
    """Patterns of parameters that weight decay leaves alone, as `sites` are written. Table 3: none."""
    batch: Count = 1024
    """Sequences per step. Table 3: 1024."""
    steps: Count = 100_000
    """Steps of one attempt. Table 3: 100000."""
    warmup: NonNegative = 1000
    """Linear learning-rate warm-up: steps if 1 or more, a share of all steps if below 1. Table 3: 1000."""
    settle: Natural = 0
    """Steps of cosine decay to 0 that end an attempt, started once the phase change has passed; 0 trains all `steps` at a constant
    rate, as Table 3 does."""
    settle_from: Natural = 0
    """Earliest step at which the decay starts; attention sharpens while the rate is high."""
    settle_accuracy: Share = 0.995
    """Accuracy (held-out sequences) that marks the phase change as passed."""
    attempts: Count = 1
    """Starts tried, each from other random weights, until a target has converged."""
    converged_loss: Positive = 1e-3
    """Cross-entropy (nats, last token, held-out sequences) below which the target counts as converged."""
    converged_accuracy: Share = 0.999
    """Accuracy (held-out sequences) at or above which the target counts as converged."""
    window: Count | None = None
    """Curriculum: sequences of this many tokens at a random offset in the position table, their first s drawn towards the start, where it
    attends to itself and passes for m unless the model learns otherwise; none: full length, uniform, throughout."""
    window_steps: Natural = 0
    """Steps the curriculum lasts."""
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


class InductionTask(Section):
    """The induction-head task and its attention-only target (§5.1, Table 3)."""

    kind: Literal["induction"] = "induction"
    vocabulary: Annotated[Count, Field(ge=2)] = 128
    """Ordinary tokens |V|; the special token s comes on top. Table 3: 128."""
    length: Annotated[Count, Field(ge=4)] = 64
    """Tokens per sequence, n. Table 3: 64."""
    width: Count = 16
    """Residual stream, d_model. Table 3: 16."""
    blocks: Annotated[Count, Field(le=1000)] = 2
    """Transformer blocks (attention only), 1000 at most. §5.1: 2."""
    heads: Count = 1
    """Attention heads per block. §5.1: 1."""
    positions: Literal["learned", "sinusoidal"] = "learned"
    """Position encodings; the paper does not say which."""
    added: Literal["before", "after"] = "before"
    """Encodings are added to the inputs of Q and K `before` projecting (Shortformer) or to the queries and keys `after` it."""
    embedding_scale: Positive = 1.0
    """Standard deviation of the token embedding at the start."""
    position_scale: Positive = 1.0
    """Standard deviation of learned position encodings at the start; factor on sinusoidal ones."""
    position_offset: NonNegative = 0.0
    """Standard deviation of one vector that all learned encodings share at the start, as sinusoidal ones share their slow waves: a query
    can then ask for a token wherever it stands."""
    training: TargetTraining = TargetTraining()

    @model_validator(mode="after")
    def _sizes_fit(self) -> "InductionTask":
        if self.width % self.heads:
            raise ValueError(f"width {self.width} must be a multiple of heads {self.heads}")
        if self.training.window is not None and self.training.window > self.length:
            raise ValueError(f"training.window {self.training.window} must not exceed length {self.length}")
        return self


class Miniature(Section):
    """A small GPT-2 with a tokenizer of its own, trained on the shipped facts; how it is built and trained (no paper has it)."""

    blocks: Annotated[Count, Field(le=1000)] = 4
    """Transformer blocks."""
    width: Count = 128
    """Residual stream."""
    heads: Count = 4
    """Attention heads per block."""
    vocabulary: Annotated[Count, Field(ge=300)] = 1600
    """Tokens of the byte-level BPE, at most."""
    embedding_scale: Positive = 0.1
    """Standard deviation of the token embedding, which stays random: nothing can be learned there, so facts must sit in the sites."""
    dropout: Share = 0.1
    """Dropout while it is trained, as GPT-2's; without it hardly any change of the weights leaves the other facts alone."""
    swapped: Share = 0.15
    """Share of the training sentences whose answer is another of its kind, so that the right one gets a probability near 1 less this share
    and not 0.9999, which hardly any edit would move."""
    steps: Count = 600
    """Training steps."""
    batch: Count = 64
    """Sentences per step."""
    lr: Positive = 2e-3
    """Learning rate of AdamW, cosine to 0."""
    weight_decay: NonNegative = 0.1
    """Decoupled weight decay."""
    converged_accuracy: Share = 0.98
    """Share of the facts whose answer is the likeliest continuation, from which the target counts as converged."""
    check_every: Count = 50
    """Steps between measurements over all facts."""

    @model_validator(mode="after")
    def _heads_fit(self) -> "Miniature":
        if self.width % self.heads:
            raise ValueError(f"width {self.width} must be a multiple of heads {self.heads}")
        return self


class _Pretrained(Section):
    model: Annotated[str, Field(min_length=1)] | None = None
    """A causal language model: an id on the Hugging Face Hub, or a local folder that `save_pretrained` wrote."""
    revision: str | None = None
    """Branch, tag or commit on the Hub; none: its main branch. The commit is recorded in run.json."""


class FactsTask(_Pretrained):
    """A handful of sentences through a language model (§5.2); without `model`, a small GPT-2 is trained on the shipped facts first."""

    kind: Literal["facts"] = "facts"
    sentences: Annotated[tuple[str, ...], Field(min_length=1)] = (
        "Kobe Bryant plays the sport of basketball",
        "Tiger Woods plays the sport of golf",
    )
    """What is decomposed; all of them are in every batch. §5.2: these two."""
    others: Natural = 0
    """Further sentences in every batch, drawn anew for each step from the shipped facts, and decomposed along. §5.2: none."""
    elsewhere: Natural = 0
    """Sentences of other text in every step, drawn from the shipped facts, for `losses.elsewhere`; they are not decomposed. §5.2: none."""
    miniature: Miniature = Miniature()


class TextTask(_Pretrained):
    """A language model on running text, cut into pieces of one length."""

    kind: Literal["text"] = "text"
    source: Annotated[str, Field(min_length=1)]
    """A text file (UTF-8), or JSON lines with a field `text`, one document a line."""
    length: Annotated[Count, Field(ge=2)] = 64
    """Tokens per piece."""
    held_out: Annotated[Number, Field(gt=0, lt=1)] = 0.1
    """Share of the pieces, the last ones, that are kept for evaluation."""


class CustomTask(Section):
    """The caller's own model and batches, given to `paramlens.decompose` in Python."""

    kind: Literal["custom"] = "custom"
