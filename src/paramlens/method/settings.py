"""The fields of a configuration that set the method, with the paper's symbols and values."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from paramlens.fields import Count, Integer, Natural, NonNegative, Number, Positive, Section, Share
from paramlens.kernels.settings import MachineSettings
from paramlens.method.importance.settings import Gamma


class Init(Section):
    """The first values of U and V."""

    kind: Literal["random", "svd", "svd_rotated"] = "svd"
    """`svd`: W's singular pairs. `svd_rotated`: a random rotation of them. `random`: normal entries (the paper names no start). With the
    first two, U V = W to rounding if C >= rank W; otherwise U V is the best approximation of rank C. All seeds start at the same `svd`, so
    measure agreement between seeds with `svd_rotated`."""
    warmup_steps: Natural = 0
    """Steps on U and V before step 0 with faithfulness as the only loss (for `random`)."""
    warmup_lr: Positive = 1e-2
    """Learning rate of those steps (Adam)."""


class Adversary(Section):
    """How `losses.adversarial` chooses its masks: sources s in [0, 1] climb the KL by the signs of its slopes."""

    sources: Literal["fresh", "persistent"] = "fresh"
    """Drawn anew in every step (fresh), or kept between steps (persistent), which then have one more ascent from the loss's own slopes."""
    start: Share = 0.35
    """Share of all steps before the adversary begins."""
    groups: Count = 8
    """Groups of a batch's rows; a group shares its sources over rows and positions. Half of them begin at random, half at corners."""
    ascents: Natural = 3
    """Steps of ascent per training step, before the loss is taken. Persistent sources climb with 0 too, by the loss's own slopes."""
    step_size: Positive = 0.4
    """Change of every source in one ascent."""

    @model_validator(mode="after")
    def _climbs(self) -> "Adversary":
        if self.sources == "fresh" and not self.ascents:
            raise ValueError("ascents 0: fresh sources that do not climb are random masks; give 1 or more, or sources persistent")
        return self


class Smooth(Section):
    """The smooth count of `losses.smooth_minimality`: φ = g² / (g² + w²), and a price of f (1 + b log2(1 + a f)) on φ's mean f."""

    start: Positive = 1.0
    """Width w at the first step: importances well below it cost little, so all are lowered alike at first."""
    final: Positive = 0.01
    """Width w at the last step; w changes linearly."""
    frequency_weight: NonNegative = 0.5
    """b: how much more a subcomponent costs that is on often. 0: as much at each position."""
    frequency_scale: Positive = 4096.0
    """a: from a share of 1 / a of all positions on, a subcomponent costs more."""

    @model_validator(mode="after")
    def _narrows(self) -> "Smooth":
        if self.start < self.final:
            raise ValueError(f"start {self.start:g} is below final {self.final:g}; the width is annealed downwards, so give start >= final")
        return self


class Merge(Section):
    """Merging of dead subcomponents into the remainder Δ while training; needs `delta: true`. The paper has none."""

    every: Count | None = None
    """Steps between merges. Defaults to None: no merging."""
    start: Share = 0.15
    """Share of all steps before the first merge."""
    end: Annotated[Number, Field(ge=0, le=1)] = 0.95
    """Share of all steps after which there are no more merges."""
    threshold: Share = 0.1
    """A subcomponent is dead if the running maximum of its importance is at most this."""
    memory: Annotated[Number, Field(ge=1)] = 60.0
    """Steps after which the running maximum has fallen to 1 / e of an importance that does not come again."""


COEFFICIENT = "coefficient"
Coefficient = Annotated[NonNegative, COEFFICIENT]
"""Weight of the loss with the field's name."""


class Losses(Section):
    """Coefficients β of Algorithm 3; a loss with coefficient 0 is not computed."""

    stochastic_recon: Coefficient = 0.0
    """eq. 2. Table 4: 1. Figure 6: 0.1."""
    stochastic_recon_layerwise: Coefficient = 0.0
    """eq. 3. Table 4: 1. Figure 6: 0.1."""
    recon: Coefficient = 0.0
    """Masks equal to the importances (§4). Table 4: 0.5. Figure 6: 0.1."""
    recon_layerwise: Coefficient = 0.0
    """As `recon`, with each site replaced alone (Table 1c)."""
    recon_partial: Coefficient = 0.0
    """eq. 5, 7. Figure 6: 10."""
    stochastic_recon_partial: Coefficient = 0.0
    """eq. 6, 8. Figure 6: 10."""
    adversarial: Coefficient = 0.0
    """Masks r = g + (1 - g) s, with s chosen to raise the KL (`adversary`). The paper has none."""
    local: Coefficient = 0.0
    """Each site's output at each token from its important subcomponents alone: squared error relative to the output's square. The others
    then write nothing there. Ours; the paper has none."""
    elsewhere: Coefficient = 0.0
    """KL on a second stream of data that is not decomposed (`task.elsewhere`; `elsewhere` in Python), with some subcomponents partly on at
    random (`elsewhere_masks`) and Δ fully on: removing them must not matter there. Ours; the paper has none."""
    faithfulness: Coefficient = 0.0
    """eq. 1. Table 4: 1000. Figure 6: 1e6."""
    minimality: Coefficient = 0.0
    """eq. 1. Table 4: 0.02. Figure 6: 0.05."""
    smooth_minimality: Coefficient = 0.0
    """A smooth count of what is on, in which often costs more (`smooth`), instead of `minimality` or beside it. The paper has none."""
    p_start: Positive = 0.9
    """Minimality's power p at the first step. Tables: 0.9."""
    p_final: Positive = 0.1
    """Power p at the last step; p changes linearly. Tables: 0.1."""
    minimality_eps: Positive = 1e-12
    """ε in (g + ε)^p - ε^p, which bounds the slope at 0 by p ε^(p - 1)."""
    samples: Count = 1
    """Number of mask samples S per stochastic loss and step."""
    layerwise_sites: Count | Literal["all"] = "all"
    """Sites that a layerwise loss replaces in one step, each alone: all, or this many, drawn at random in each step (unbiased)."""
    elsewhere_masks: Literal["own", "all"] = "own"
    """What `elsewhere` has at random: subcomponents of one sequence of the decomposed batch alone (own), or all, with a mask in [0, 1] at
    every position (all). With all, Δ must do there what the target does, so it needs `delta: true`."""
    partial_scope: Literal["forward", "sequence", "position"] = "forward"
    """The subset M of a partial loss is drawn once per forward pass (how we read the paper), sequence or position."""

    @model_validator(mode="after")
    def _something_to_minimise(self) -> "Losses":
        if self.p_start < self.p_final:
            raise ValueError(f"p_start {self.p_start} is below p_final {self.p_final}; p is annealed downwards, so give p_start >= p_final")
        if not any(getattr(self, name) for name in LOSS_NAMES):
            raise ValueError(f"no loss is enabled; give at least one of {', '.join(LOSS_NAMES)} a coefficient above 0")
        return self


LOSS_NAMES = tuple(name for name, field in Losses.model_fields.items() if COEFFICIENT in field.metadata)
"""The fields of `Losses` that are coefficients; `method/losses` defines a loss for each."""


class Optim(Section):
    """The optimizer of U, V and γ."""

    name: Literal["adam", "adamw"] = "adam"
    """Table 4: Adam. Figure 6: AdamW."""
    lr: Positive = 1e-3
    """Learning rate of U and V. Tables: 0.001."""
    gamma_lr: Positive | None = None
    """Learning rate of γ. Defaults to `lr`."""
    betas: tuple[Share, Share] = (0.9, 0.999)
    """Decay rates of Adam's two moments; the paper does not give them."""
    clip: Positive | None = None
    """Largest norm of the gradient of U, of V and of γ, each clipped apart. Defaults to None: no clipping."""
    weight_decay: NonNegative = 0.0
    """Decoupled weight decay (AdamW only). Figure 6: 0.05."""
    schedule: Literal["constant", "cosine", "linear"] = "cosine"
    """Learning rate after the warm-up; cosine and linear end at 0. Table 4: cosine. Figure 6: constant."""
    warmup: NonNegative = 0.0
    """Linear warm-up: a number of steps if 1 or more, a share of all steps if below 1. Table 4: 0. Figure 6: 0.01."""
    project_from: Annotated[Number, Field(ge=0, le=1)] | None = None
    """Share of the steps after which every update keeps U V = W: gradients are projected, and U and V move to the nearest pair with
    U V = W, so that faithfulness is only rounding. Each step solves four eigenproblems per site, of the size of its weight: for small
    models. Defaults to None: never."""

    @model_validator(mode="after")
    def _decay_has_an_effect(self) -> "Optim":
        if self.weight_decay and self.name == "adam":
            raise ValueError(f"weight_decay {self.weight_decay} is decoupled and needs name adamw, not adam")
        return self


class MethodSettings(MachineSettings):
    """All settings of the method: what is decomposed, into how many subcomponents, and how it is trained."""

    seed: Annotated[Integer, Field(ge=0, le=2**64 - 1)] = 0
    """Seed of the target, the data, the first U, V and γ, and every mask."""
    steps: Count = 1000
    """Number of decomposition steps. Table 4: 100000. Figure 6: 20000."""
    C: Count | Literal["auto"] = 64
    """Subcomponents per site. Table 4: 100. Figure 6: 768. `auto`, with merging (`merge.every`): twice the rank that the largest weight can
    have, of which merging leaves those that are used."""
    delta: bool = False
    """Whether the remainder Δ = W - U V is one more component of each site: off where masks are g, at random in stochastic losses. Then
    the components add up to W at every step, no faithfulness loss is needed, and C can be below the rank of W. The paper has no Δ."""
    sites: Annotated[tuple[str, ...], Field(min_length=1)] = ("*",)
    """Patterns of the weight matrices to decompose, as module paths (* ? [] as in file names). !PATTERN excludes matrices."""
    last_token_only: bool = False
    """Whether the loss is taken at the last position only. Table 4: true. Figure 6: false."""
    gamma: Gamma = Gamma()
    init: Init = Init()
    losses: Losses = Losses(stochastic_recon=1.0, stochastic_recon_layerwise=1.0, recon=0.5, faithfulness=1000.0, minimality=0.02)
    optim: Optim = Optim()
    merge: Merge = Merge()
    adversary: Adversary = Adversary()
    smooth: Smooth = Smooth()

    @model_validator(mode="after")
    def _settings_have_an_effect(self) -> "MethodSettings":
        sections = {"adversary": ("adversarial", self.adversary != Adversary()), "smooth": ("smooth_minimality", self.smooth != Smooth())}
        for section, (loss, given) in sections.items():
            if given and not getattr(self.losses, loss):
                raise ValueError(f"{section}.* is for losses.{loss}, which is 0; give it a coefficient, or leave {section} out")
        if self.merge.every is None and self.merge != Merge():
            raise ValueError("merge.* is for merging, and merge.every is not given; give it a number of steps, or leave merge out")
        return self

    @model_validator(mode="after")
    def _adversary_begins(self) -> "MethodSettings":
        start = self.adversary.start
        if not self.losses.adversarial or not start:
            return self
        if start * self.steps > self.steps - 1:
            raise ValueError(
                f"adversary.start {start:g}: the adversary begins after the last of {self.steps} steps; give a smaller share, or more steps"
            )
        if not any(getattr(self.losses, name) for name in LOSS_NAMES if name != "adversarial"):
            raise ValueError(
                f"losses.adversarial is the only loss and begins after a share of {start:g} of the steps, so that the first have none; "
                "give adversary.start 0, or another loss beside it"
            )
        return self

    @model_validator(mode="after")
    def _remainder_is_free(self) -> "MethodSettings":
        if self.C == "auto" and self.optim.project_from is not None:
            raise ValueError(
                f"optim.project_from {self.optim.project_from:g} leaves no remainder into which C auto could merge what is unused; "
                "give C a number, or delta true and merge.every in place of the projection"
            )
        if self.C == "auto" and self.merge.every is None:
            raise ValueError(
                "merge.every is not given, and C auto is what merging leaves; give delta true and merge.every, or give C a number"
            )
        if self.delta and self.optim.project_from is not None:
            raise ValueError(
                f"optim.project_from {self.optim.project_from:g} keeps U V = W, and with delta true what U V lacks is a component; "
                "give one of them"
            )
        if self.losses.elsewhere and self.losses.elsewhere_masks == "all" and not self.delta:
            raise ValueError(
                "losses.elsewhere_masks all: with every subcomponent at random, only the remainder is left; give delta true with it"
            )
        if self.merge.every is not None and not self.delta:
            raise ValueError(f"merge.every {self.merge.every}: dead subcomponents are merged into the remainder; give delta true with it")
        return self
