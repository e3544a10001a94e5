"""The commands' own options, as `--help` shows them. Fields of a configuration come on top of these."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from paramlens.method.threshold import ACTIVE


@dataclass
class Demo:
    """Train the induction target, decompose it, print Table 1 and write report.html."""

    seed: int = 0
    """Seeds target and decomposition."""
    out: Path | None = None
    """Run directory (runs/demo-s<seed>)."""
    overwrite: bool = False
    """Replace an existing run."""
    json: bool = False
    """One JSON document on stdout."""


@dataclass
class TrainTarget:
    """Train a toy target and save it."""

    config: Positional[str]
    """Shipped name or YAML path."""
    out: Path | None = None
    """Directory for it (runs/<name>-target-s<seed>)."""
    overwrite: bool = False
    """Replace an existing target."""
    json: bool = False
    """One JSON document on stdout."""


@dataclass
class Decompose:
    """Decompose a target into a run directory."""

    config: Positional[str]
    """Shipped name or YAML path."""
    target: Path | None = None
    """Directory that holds the target; none: train it first. With --seeds, {seed} in it stands for the seed."""
    seeds: int | None = None
    """This many seeds in one go, as many at a time as the usable cores carry; those of one --target are compared."""
    out: Path | None = None
    """Run directory (runs/<name>-s<seed>); with --seeds, the folder of the run directories s<seed>."""
    resume: bool = False
    """Continue the run at its last checkpoint, to the same bytes as if it had never stopped."""
    extend_steps: int | None = None
    """With --resume: train to this many steps, where nothing the run did so far depended on their number."""
    overwrite: bool = False
    """Replace an existing run."""
    track: tuple[str, ...] = ()
    """Trackers that follow the run beside the terminal: tensorboard, wandb, trackio."""
    json: bool = False
    """One JSON document on stdout."""


@dataclass
class Verify:
    """Check a run directory: checksums, shapes, metrics, and that all is of one run."""

    run: Positional[Path]
    """Run directory."""
    json: bool = False
    """One JSON document on stdout."""


@dataclass
class Push:
    """Upload a run directory to the Hugging Face Hub, with a card."""

    run: Positional[Path]
    """Run directory."""
    repo: Positional[str]
    """Repository, user/name; made if it is missing."""
    private: bool = False
    """Make a new repository private."""
    revision: str | None = None
    """Branch, made if it is missing; none: main."""
    message: str | None = None
    """The commit's message; none: the run's name and step."""
    resumable: bool = False
    """With optimizer and generators, so that the run can go on elsewhere: three times the bytes."""
    json: bool = False
    """One JSON document on stdout."""


@dataclass
class Doctor:
    """Count parameters and memory by part."""

    config: Positional[str]
    """Shipped name or YAML path."""
    json: bool = False
    """One JSON document on stdout."""


@dataclass
class ShowCircuit:
    """Table 1: active subcomponents by role, unique counts, metrics."""

    run: Positional[Path]
    """Run directory."""
    threshold: float = ACTIVE
    """A subcomponent is active where its importance exceeds this, in [0, 1)."""
    batches: int = 16
    """Batches evaluated: held-out ones, where the run has such."""
    adversary: int = 20
    """Steps of projected gradient towards the worst masks; 0 leaves recon_adversarial out."""
    json: bool = False
    """One JSON document on stdout."""


@dataclass
class Svd:
    """Algorithm 2, greedy rank-1 SVD pruning of the target, beside the decomposition."""

    run: Positional[Path]
    """Run directory."""
    tolerance: float | None = None
    """KL in nats at which the pruning stops; none: the decomposition's own recon."""
    batches: int = 16
    """Batches evaluated: held-out ones, where the run has such."""
    at_once: int = 1
    """Singular values removed with every pick: more is faster and less exact."""
    json: bool = False
    """One JSON document on stdout."""


@dataclass
class Agree:
    """How far runs of one target agree: their subcomponents matched by direction and by where they are active."""

    runs: Positional[tuple[Path, ...]]
    """Run directories, two or more."""
    threshold: float = ACTIVE
    """A subcomponent takes part where its importance exceeds this at one token at least."""
    batches: int = 16
    """Batches evaluated, of the first run: held-out ones, where it has such."""
    json: bool = False
    """One JSON document on stdout."""


@dataclass
class Inspect:
    """Which subcomponents are active on which token; with --site and --subcomponent, what one reads and writes."""

    run: Positional[Path]
    """Run directory."""
    prompt: str | None = None
    """A sentence; none: the run's first."""
    site: str | None = None
    """Site of the subcomponent to look at."""
    subcomponent: int | None = None
    """Its number, 0 to C - 1."""
    text: Path | None = None
    """Text file whose lines the subcomponent is looked at on; none: the run's sentences."""
    threshold: float = ACTIVE
    """A subcomponent is active where its importance exceeds this, in [0, 1)."""
    json: bool = False
    """One JSON document on stdout."""


@dataclass
class Suppress:
    """Take subcomponents out of the target, and see what that does to every fact."""

    run: Positional[Path]
    """Run directory."""
    unique_to: str | None = None
    """Sentence or prompt whose own subcomponents go: active there, in no other sentence of the run."""
    top: int | None = None
    """At most this many of them, by importance and contribution; none: all."""
    tokens: str | None = None
    """Words of the sentence; only subcomponents active there go."""
    per_token: int | None = None
    """At most this many at each token."""
    sites: tuple[str, ...] | None = None
    """Patterns of the sites whose subcomponents may go; none: all."""
    site: str | None = None
    """Site of subcomponents named by hand."""
    subcomponent: tuple[int, ...] = ()
    """Their numbers."""
    fact: str | None = None
    """Sentence the effect is judged by, where subcomponents are named by hand; none: the run's first."""
    method: Literal["projection", "subtraction"] = "projection"
    """projection (§5.2), or subtraction of the parts themselves."""
    evaluate: str = "shipped"
    """Facts to look at: a YAML or JSON file, shipped, or none."""
    text: Path | None = None
    """Text file for the perplexity, a text a line; none: the general facts."""
    skip_controls: bool = False
    """Leave out the other edits of equal rank."""
    threshold: float = ACTIVE
    """A subcomponent is active where its importance exceeds this, in [0, 1)."""
    save: Path | None = None
    """Write the edited model there, as a plain Hugging Face folder."""
    json: bool = False
    """One JSON document on stdout."""


@dataclass
class Trace:
    """Causal tracing of the answer to a prompt in any causal language model."""

    model: Positional[str]
    """Run directory, local folder, or id on the Hugging Face Hub."""
    prompt: str
    """The prompt, up to the answer."""
    subject: str
    """Its words that are corrupted."""
    answer: str | None = None
    """The answer; none: the model's likeliest next token."""
    noise: float = 3.0
    """Noise on the subject's embeddings, in standard deviations of all embeddings."""
    samples: int = 10
    """Draws of the noise."""
    window: int = 3
    """Blocks whose MLPs or attentions are restored together."""
    seed: int = 0
    """Seeds the noise."""
    zero_mlp: bool = False
    """Show the sweep in which one whole MLP is put to zero."""
    json: bool = False
    """One JSON document on stdout."""


@dataclass
class Report:
    """Write report.html into the run directory."""

    run: Positional[Path | None] = None
    """Run directory; with --example, where the shipped run goes (runs/example)."""
    example: bool = False
    """Of a finished run that comes with the library: nothing needs to be trained."""
    budget: float = 8.0
    """Size in MB; above it the token strips of the least important subcomponents are left out, and the page says so."""
    open: bool = False
    """Show it in the browser."""
    json: bool = False
    """One JSON document on stdout."""


@dataclass
class Bench:
    """Steps per second, beside the same step written the obvious way, alternating in one process."""

    grid: str = "like-for-like"
    """Cases: like-for-like, table2, C, length, batch or sites."""
    importance: str | None = None
    """This γ alone: scalar, vector or attention."""
    length: int | None = None
    """Tokens per sequence."""
    batch: int | None = None
    """Sequences per step."""
    C: int | None = None
    """Subcomponents per site."""
    sites: int | None = None
    """Sites, three per block."""
    layerwise_sites: str | None = None
    """Sites that the layerwise loss replaces in a step: all, or a number."""
    threads: int | None = None
    """CPU threads."""
    device: str = "cpu"
    """cpu or cuda."""
    matmul: str = "fp32"
    """fp32, tf32 or bf16 inside matrix products."""
    compile: bool = False
    """With torch.compile."""
    cuda_graph: bool = False
    """With the step captured as one CUDA graph."""
    repeats: int = 7
    """Steps of either kind per case, at most."""
    seconds: float = 60.0
    """A case stops repeating after this long."""
    skip_naive: bool = False
    """Measure the library alone."""
    skip_busy: bool = False
    """Leave the step beside a busy process out."""
    skip_memory: bool = False
    """Leave peak memory out."""
    json: bool = False
    """One JSON document on stdout."""


@dataclass
class Completion:
    """Print a script by which a shell completes commands, options and fields."""

    shell: Positional[Literal["bash", "zsh", "fish"]]
    """The shell that is to read it."""
