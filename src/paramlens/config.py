"""What a run is made of: frozen models in which every field states its unit, the paper's symbol and the paper's value."""

import numbers
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator


def _plain_number(value: Any) -> Any:
    """A number as Python's own, NumPy's among them; anything else unchanged, true and false refused."""
    if isinstance(value, bool):
        raise ValueError("a number is needed, not true or false")
    if isinstance(value, numbers.Integral):
        return int(value)
    return float(value) if isinstance(value, numbers.Real) else value


_Integer = Annotated[int, BeforeValidator(_plain_number), Field(strict=True)]
_Number = Annotated[float, BeforeValidator(_plain_number), Field(strict=True)]
Count = Annotated[_Integer, Field(ge=1, le=2**63 - 1)]
Natural = Annotated[_Integer, Field(ge=0, le=2**63 - 1)]
Positive = Annotated[_Number, Field(gt=0)]
NonNegative = Annotated[_Number, Field(ge=0)]
Share = Annotated[_Number, Field(ge=0, lt=1)]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


class TargetTraining(_Frozen):
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


class InductionTask(_Frozen):
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


class Miniature(_Frozen):
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


class _Pretrained(_Frozen):
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
    held_out: Annotated[_Number, Field(gt=0, lt=1)] = 0.1
    """Share of the pieces, the last ones, that are kept for evaluation."""


class CustomTask(_Frozen):
    """The caller's own model and batches, given to `paramlens.decompose` in Python."""

    kind: Literal["custom"] = "custom"


class Gamma(_Frozen):
    """The causal-importance network γ (§4.1, eq. 4, Algorithm 1)."""

    kind: Literal["scalar", "vector", "attention", "shared"] = "attention"
    """What γ sees: one inner activation, the site's input, that and all other positions, or one network for a whole site."""
    d_gate: Count = 16
    """Hidden width of each MLP, d_gate. Table 4: 16. Figure 6: 64."""
    max_length: Count | None = None
    """Positions that the attention γ's tables hold; a longer batch is then refused. Defaults to the longest batch that is known before the
    run starts; further positions share the tables' last entries."""
    relative: Literal["offset", "query"] = "offset"
    """r in eq. 4: one learned scalar per relative offset, or the 2s x d table contracted with the query."""
    relative_init: Literal["zero", "local"] = "zero"
    """Start of the per-offset scalars: zero, or -0.7 |offset| (to 8 and beyond) plus noise, so that neighbours are seen first."""
    relative_lr: Positive = 1.0
    """Factor on γ's learning rate for the relative encodings."""
    output_bias: _Number = 0.0
    """Start of the last bias; 1 starts with every subcomponent on."""

    @model_validator(mode="after")
    def _local_is_per_offset(self) -> "Gamma":
        if self.relative == "query" and self.relative_init == "local":
            raise ValueError("relative_init local needs relative offset: a table contracted with the query has no value per offset")
        return self


class Init(_Frozen):
    """Where U and V start."""

    kind: Literal["random", "svd", "svd_rotated"] = "svd"
    """`svd` starts at W's singular pairs, `svd_rotated` at a random rotation of them: both hold U V = W to rounding where C >= rank W, and
    start at the best U V of rank C where C is lower (nothing of rank C can be W). `random`: the paper does not say where it starts. Seeds
    that start at `svd` start alike, so agreement between seeds is measured from `svd_rotated`."""
    warmup_steps: Natural = 0
    """Faithfulness-only steps on U and V before step 0 (for `random`)."""
    warmup_lr: Positive = 1e-2
    """Learning rate of those steps (Adam)."""


class Losses(_Frozen):
    """Coefficients β of Algorithm 3; a loss with coefficient 0 is not computed."""

    stochastic_recon: NonNegative = 0.0
    """eq. 2. Table 4: 1. Figure 6: 0.1."""
    stochastic_recon_layerwise: NonNegative = 0.0
    """eq. 3. Table 4: 1. Figure 6: 0.1."""
    recon: NonNegative = 0.0
    """Masks equal to the importances (§4). Table 4: 0.5. Figure 6: 0.1."""
    recon_layerwise: NonNegative = 0.0
    """As `recon`, each site alone (Table 1c)."""
    recon_partial: NonNegative = 0.0
    """eq. 5, 7. Figure 6: 10."""
    stochastic_recon_partial: NonNegative = 0.0
    """eq. 6, 8. Figure 6: 10."""
    local: NonNegative = 0.0
    """Each site's own output at each token by its important subcomponents alone, squared error relative to its square: what is not
    important writes nothing there. Ours; the paper has none."""
    elsewhere: NonNegative = 0.0
    """On other text, from `task.elsewhere`, all sites replaced and every subcomponent on but those of one sentence alone, which are on in
    part at random: taking them out must not matter there. Ours; the paper has none."""
    faithfulness: NonNegative = 0.0
    """eq. 1. Table 4: 1000. Figure 6: 1e6."""
    minimality: NonNegative = 0.0
    """eq. 1. Table 4: 0.02. Figure 6: 0.05."""
    p_start: Positive = 0.9
    """Minimality's power p at the first step. Tables: 0.9."""
    p_final: Positive = 0.1
    """Power p at the last step, reached linearly. Tables: 0.1."""
    minimality_eps: Positive = 1e-12
    """ε in (g + ε)^p - ε^p, which bounds the slope at 0 by p ε^(p - 1)."""
    samples: Count = 1
    """S, mask samples per stochastic loss and step."""
    layerwise_sites: Count | Literal["all"] = "all"
    """Sites that a layerwise loss replaces in one step, each alone: all, or this many drawn anew for each step (unbiased)."""
    partial_scope: Literal["forward", "sequence", "position"] = "forward"
    """What shares one draw of the subset M of a partial loss; the paper's reading: one draw per forward."""

    @model_validator(mode="after")
    def _something_to_minimise(self) -> "Losses":
        if self.p_start < self.p_final:
            raise ValueError(f"p_start {self.p_start} is below p_final {self.p_final}; p is annealed downwards, so give p_start >= p_final")
        if not any(getattr(self, name) for name in LOSS_NAMES):
            raise ValueError(f"no loss is enabled; give at least one of {', '.join(LOSS_NAMES)} a coefficient above 0")
        return self


RECONSTRUCTION_NAMES = (
    "stochastic_recon",
    "stochastic_recon_layerwise",
    "recon",
    "recon_layerwise",
    "recon_partial",
    "stochastic_recon_partial",
)
LOSS_NAMES = (*RECONSTRUCTION_NAMES, "local", "elsewhere", "faithfulness", "minimality")


class Optim(_Frozen):
    """The optimizer of U, V and γ."""

    name: Literal["adam", "adamw"] = "adam"
    """Table 4: Adam. Figure 6: AdamW."""
    lr: Positive = 1e-3
    """Learning rate of U and V, and of γ unless `gamma_lr` is given. Tables: 0.001."""
    gamma_lr: Positive | None = None
    """Learning rate of γ; none: `lr`."""
    betas: tuple[Share, Share] = (0.9, 0.999)
    """Decay rates of Adam's two moments; the paper gives none."""
    weight_decay: NonNegative = 0.0
    """Decoupled weight decay (AdamW only). Figure 6: 0.05."""
    schedule: Literal["constant", "cosine", "linear"] = "cosine"
    """Learning rate after the warm-up; the last two end at 0. Table 4: cosine. Figure 6: constant."""
    warmup: NonNegative = 0.0
    """Linear warm-up: steps if 1 or more, a share of all steps if below 1. Table 4: 0. Figure 6: 0.01."""
    project_from: Annotated[_Number, Field(ge=0, le=1)] | None = None
    """Share of the steps after which updates of U and V keep to U V = W: the gradient loses what would change the sum, and every update
    ends at the nearest pair, so that faithfulness is rounding alone; none: never. Four eigenproblems of the size of its weight for each
    site and step: for small models."""

    @model_validator(mode="after")
    def _decay_has_an_effect(self) -> "Optim":
        if self.weight_decay and self.name == "adam":
            raise ValueError(f"weight_decay {self.weight_decay} is decoupled and needs name adamw, not adam")
        return self


class Checkpoint(_Frozen):
    every: Count = 5000
    """Steps between checkpoints; one is always written at the end."""
    keep_last: Count = 2
    """Checkpoints kept, the newest."""
    keep_every: Count | None = None
    """Steps whose multiples keep their checkpoint for good; none: no others are kept."""


class Evaluate(_Frozen):
    every: Count = 1000
    """Steps between evaluations on held-out batches."""
    batches: Count = 1
    """Held-out batches per evaluation."""


class Config(_Frozen):
    """One run. Shipped examples: `paramlens/configs/*.yaml`."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = "custom"
    """The run's name; runs go to runs/<name>-s<seed>."""
    seed: Annotated[_Integer, Field(ge=0, le=2**64 - 1)] = 0
    """Seeds the target, the data, the start and every mask."""
    steps: Count = 1000
    """Decomposition steps. Table 4: 100000. Figure 6: 20000."""
    batch: Count = 64
    """Sequences per step. Table 4: 1024. Figure 6: 2."""
    C: Count = 64
    """Subcomponents per site. Table 4: 100. Figure 6: 768."""
    sites: Annotated[tuple[str, ...], Field(min_length=1)] = ("*",)
    """Patterns of the weight matrices to decompose, as module paths (* ? [] as in file names). !PATTERN leaves some out."""
    last_token_only: bool = False
    """Loss on the last position only. Table 4: true. Figure 6: false."""
    device: Annotated[str, Field(pattern=r"^(cpu|cuda(:\d+)?|mps(:\d+)?)$")] = "cpu"
    """Where the run computes: cpu, cuda, cuda:N or mps."""
    dtype: Literal["float32", "float64"] = "float32"
    """Floating-point type of everything trained."""
    matmul: Literal["fp32", "tf32", "bf16"] = "fp32"
    """Precision inside float32 matrix products: fp32, or TF32 or bfloat16 where the device offers them (results stay float32)."""
    compile: bool = False
    """Let torch.compile fuse γ's, minimality's and the divergence's elementwise work. For GPUs; a CPU has compiled loops of its own."""
    cuda_graph: bool = False
    """Capture the whole step as one CUDA graph, which takes away the launches that bind small models; CUDA only, fixed plans only."""
    threads: Annotated[Count, Field(le=256)] | None = None
    """CPU threads, at most 256; none: one per core the process may use, within its control group's share, four at most."""
    task: InductionTask | FactsTask | TextTask | CustomTask = Field(default=CustomTask(), discriminator="kind")
    gamma: Gamma = Gamma()
    init: Init = Init()
    losses: Losses = Losses(stochastic_recon=1.0, stochastic_recon_layerwise=1.0, recon=0.5, faithfulness=1000.0, minimality=0.02)
    optim: Optim = Optim()
    checkpoint: Checkpoint = Checkpoint()
    evaluate: Evaluate = Evaluate()
    log_every: Count = 50
    """Steps between lines of metrics.jsonl."""

    @model_validator(mode="after")
    def _table_holds_the_task(self) -> "Config":
        table = self.gamma.max_length
        if self.gamma.kind == "attention" and table is not None and isinstance(self.task, InductionTask) and table < self.task.length:
            raise ValueError(
                f"gamma.max_length {table} is below task.length {self.task.length}; "
                f"the attention γ's table must hold the longest batch, so give at least {self.task.length}"
            )
        return self

    @model_validator(mode="after")
    def _elsewhere_has_text(self) -> "Config":
        if bool(self.losses.elsewhere) != bool(isinstance(self.task, FactsTask) and self.task.elsewhere):
            raise ValueError("losses.elsewhere and task.elsewhere (sentences per step, of a facts task) go together: give both or neither")
        if self.losses.elsewhere and self.cuda_graph:
            raise ValueError("cuda_graph true captures one batch a step; losses.elsewhere brings a second, so give one of them")
        return self

    @model_validator(mode="after")
    def _graph_has_one_shape(self) -> "Config":
        partial = self.losses.partial_scope == "forward" and (self.losses.recon_partial or self.losses.stochastic_recon_partial)
        if self.cuda_graph and not self.device.startswith("cuda"):
            raise ValueError(f"cuda_graph true needs device cuda, not {self.device}")
        if self.cuda_graph and self.optim.project_from is not None:
            raise ValueError(
                "cuda_graph true cannot capture the projection of optim.project_from, which the host waits for; give one of them"
            )
        if self.cuda_graph and (partial or self.losses.layerwise_sites != "all"):
            raise ValueError(
                "cuda_graph true replays one set of plans; partial losses need losses.partial_scope sequence or position, "
                "and losses.layerwise_sites must be all"
            )
        return self
