"""Causal tracing: corrupt the subject, restore one state, see if the answer comes back (Meng et al. 2022; Figures 7-9)."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from paramlens.analysis.branches import Branch, find_branches, with_hidden, without
from paramlens.analysis.branches import hidden_of as _hidden
from paramlens.display.result import Result
from paramlens.display.tables import Cell, Column, Table, columns, shaded, token_text
from paramlens.errors import ConfigError
from paramlens.method.decomposition import block_chains
from paramlens.method.generators import generator
from paramlens.method.hooks import hooked
from paramlens.method.sites import at_rest
from paramlens.tasks.language_models.encoding import encode_fact, model_inputs
from paramlens.tasks.language_models.limits import require_tokens
from paramlens.tasks.language_models.tokens import open_ended, positions_of, token_texts

NOISE = 3.0
"""Standard deviation of the noise on the subject's embeddings, in standard deviations of the embeddings."""

SAMPLES = 10
"""Number of draws of the noise."""

WINDOW = 3
"""Number of blocks whose MLPs or attentions are restored together."""


@dataclass(frozen=True, repr=False)
class Trace(Result):
    """The answer's probability, in [0, 1], mean over the draws of noise.

    hidden, mlp, attention: [block][position], with the block's hidden state, or the outputs of the MLPs or attentions of `window` blocks
    around it, restored at that position. zero_mlp: [block], with the whole MLP of the block set to zero, without noise.
    """

    model: str
    prompt: str
    subject: str
    answer: str
    positions: list[str]
    """The prompt's tokens."""
    subject_positions: list[int]
    clean: float
    """Probability in the unchanged model."""
    corrupted: float
    """Probability with noise on the subject and nothing restored."""
    noise: float
    samples: int
    window: int
    seed: int
    hidden: list[list[float]]
    mlp: list[list[float]]
    attention: list[list[float]]
    zero_mlp: list[float]

    def to_json(self) -> dict[str, object]:
        return asdict(self)

    def summary(self) -> str:
        return f"{self.prompt!r}: p({self.answer}) {self.clean:.3f}, with {self.subject!r} corrupted {self.corrupted:.3f}"

    def tables(self, *, zero_mlp: bool = True) -> tuple[Table, ...]:
        """The three maps, one row per block, one column per token, * at the subject; with `zero_mlp`, also the sweep without one MLP."""
        heads = tuple(Column(token_text(token) + ("*" if i in self.subject_positions else "")) for i, token in enumerate(self.positions))
        maps = {"hidden state": self.hidden, "MLP": self.mlp, "attention": self.attention}
        highest = max(self.clean, *(value for rows in maps.values() for values in rows for value in values))
        together = f", {self.window} blocks together"
        shown = [
            Table(
                f"{name} restored at one place{together if name != 'hidden state' else ''}: probability of the answer",
                (Column("block"), *heads),
                tuple((Cell(str(i)), *(shaded(f"{value:.3f}", value, highest) for value in values)) for i, values in enumerate(rows)),
            )
            for name, rows in maps.items()
        ]
        draws = f"({self.samples} draws, noise {self.noise:g}, seed {self.seed})"
        told = f"p({self.answer}) {self.clean:.3f}, with the subject corrupted {self.corrupted:.3f} {draws}"
        zeroed = Table(
            f"One MLP set to zero: probability of the answer ({self.clean:.3f} with all)",
            columns("block", *map(str, range(len(self.zero_mlp)))),
            ((Cell("p"), *(shaded(f"{value:.3f}", value, highest) for value in self.zero_mlp)),),
        )
        return (Table("", (), (), notes=(Cell(told),)), *shown, *((zeroed,) if zero_mlp else ()))


@torch.no_grad()
def trace(
    model: nn.Module,
    tokenizer: Any,
    prompt: str,
    subject: str,
    *,
    answer: str | None = None,
    noise: float = NOISE,
    samples: int = SAMPLES,
    window: int = WINDOW,
    seed: int = 0,
    name: str = "",
) -> Trace:
    """Trace the answer to `prompt` in any causal language model of transformers. All hooks are removed afterwards.

    subject: words of the prompt; the first occurrence counts. answer: Defaults to the likeliest next token.
    noise: in standard deviations of the embeddings of the whole vocabulary, scaled as the model scales them (Gemma).
    An MLP or an attention that adds the residual stream to its own result (BLOOM, MPT) is restored, or set to zero, without that stream.
    Raises `ConfigError` for a subject that is not in the prompt, for a number out of range, and for a model whose blocks, or what their
    attention and MLP add, are not found; `BatchError` for a prompt longer than the model takes.
    """
    if samples < 1 or window < 1 or not 0 < noise < float("inf"):
        raise ConfigError(f"noise {noise}, samples {samples}, window {window}: give numbers above 0")
    if not prompt.strip():
        raise ConfigError("prompt: empty; give the words that come before the answer, the subject among them")
    device = next(model.parameters()).device
    with at_rest(model):
        before, after = (open_ended(tokenizer, prompt), []) if answer is None else encode_fact(tokenizer, prompt, answer)
        at = [position for position in positions_of(tokenizer, prompt, subject) if position < len(before)]
        if not at:
            raise ConfigError(f"{subject!r}: one token with the start of the answer; give a prompt that goes on after the subject")
        require_tokens(model, [[*before, *(after or before[-1:])]], [f"prompt {prompt!r} with its answer"])
        if answer is None:
            after = [int(model(**model_inputs(torch.tensor([before], device=device))).logits[0, -1].argmax())]
            [text] = token_texts(tokenizer, after)
            answer = text.strip() or text
        tracer = _Tracer(model, torch.tensor(before + after, device=device), len(before), at, noise=noise, samples=samples, seed=seed)
        clean, corrupted = tracer.clean(), tracer.corrupted()
        maps = {kind: tracer.restored(kind, window) for kind in ("hidden", "mlp", "attention")}
        return Trace(
            model=name or type(model).__name__,
            prompt=prompt,
            subject=subject,
            answer=answer,
            positions=token_texts(tokenizer, before),
            subject_positions=at,
            clean=clean,
            corrupted=corrupted,
            noise=noise,
            samples=samples,
            window=window,
            seed=seed,
            **maps,
            zero_mlp=tracer.zeroed(),
        )


class _Tracer:
    """Runs one prompt with its answer through a model: clean, corrupted, and with states restored."""

    def __init__(
        self, model: Any, ids: Int[Tensor, "pos"], prompt: int, subject: Sequence[int], *, noise: float, samples: int, seed: int
    ) -> None:
        self.model, self.ids, self.prompt, self.samples = model, ids, prompt, samples
        self.subject, self.noise_size = list(subject), noise
        inputs = model_inputs(ids[None])
        blocks = max(block_chains(model, inputs), key=len, default=())
        if not blocks:
            raise ConfigError(f"trace: {type(model).__name__} has no chain of blocks that hand a hidden state on")
        self.branches: dict[str, list[Branch]] = {"hidden": [Branch(block) for block in blocks], **find_branches(model, blocks, inputs)}
        self.embedding = _embedding(model)
        deviation, width = _spread(self.embedding, ids)
        rng = generator(seed, "trace")
        drawn = torch.randn(samples, len(subject), width, generator=rng, dtype=torch.float64)
        self.noise = (noise * deviation * drawn).to(next(self.embedding.parameters()))
        self.states = self._clean_states()

    def _clean_states(self) -> dict[Branch, Tensor]:
        """Copies of the contributions of every branch in the clean run; a model may change the originals in place."""
        kept: dict[Branch, Tensor] = {}

        def keep(branch: Branch, _module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            own = _hidden(output) - branch.rest(args, kwargs, output)
            kept[branch] = _by_row(own, 1)[0]

        with hooked([(branch.module, partial(keep, branch)) for branches in self.branches.values() for branch in branches]):
            self.model(**model_inputs(self.ids[None]))
        return kept

    def _probability(self, rows: int) -> Float[Tensor, "row"]:
        logits = self.model(**model_inputs(self.ids.expand(rows, -1))).logits[:, self.prompt - 1 : -1].double()
        expected = self.ids[self.prompt :].expand(rows, -1)
        found = logits.log_softmax(-1).gather(2, expected[..., None]).sum((1, 2)).exp()
        if not found.isfinite().all():
            cause = "the model's own logits are not finite numbers" if rows == 1 else f"noise {self.noise_size:g} makes the model overflow"
            raise ConfigError(f"trace: {cause}, so there are no probabilities")
        return found

    def _corrupt(self, _module: nn.Module, _args: Any, _kwargs: Any, output: Tensor) -> Tensor:
        if output.dim() != 3 or output.shape[1] != len(self.ids):
            raise ConfigError(
                f"trace: the embedding gives {tuple(output.shape)}, not [batch, pos, d], so the subject cannot be found in it"
            )
        noisy = output.clone()
        copies = len(output) // self.samples
        noisy[:, self.subject] += self.noise.repeat(copies, 1, 1)
        return noisy

    def clean(self) -> float:
        return self._probability(1).item()

    def corrupted(self) -> float:
        with hooked([(self.embedding, self._corrupt)]):
            return self._probability(self.samples).mean().item()

    def restored(self, kind: str, window: int) -> list[list[float]]:
        """Probability as [block][position]. All positions of a block are one batch, `samples` rows each."""
        branches = self.branches[kind]
        rows = []
        for block in range(len(branches)):
            around = range(max(0, block - (window - 1) // 2), min(len(branches), block + window // 2 + 1))
            chosen = [branches[block]] if kind == "hidden" else [branches[i] for i in around]
            with hooked([(self.embedding, self._corrupt), *((branch.module, partial(self._restore, branch)) for branch in chosen)]):
                values = self._probability(self.samples * self.prompt)
            rows.append(values.view(self.prompt, self.samples).mean(1).tolist())
        return rows

    def _restore(self, branch: Branch, _module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        hidden, rest = _hidden(output).clone(), branch.rest(args, kwargs, output)
        at, beside = (_by_row(each, self.samples * self.prompt) for each in (hidden, rest))
        for position in range(self.prompt):
            rows = slice(position * self.samples, (position + 1) * self.samples)
            at[rows, position] = self.states[branch][position] + beside[rows, position]
        return with_hidden(output, hidden)

    def zeroed(self) -> list[float]:
        """Probability with the MLP of each block in turn set to zero at every position."""
        values = []
        for branch in self.branches["mlp"]:
            with hooked([(branch.module, partial(without, branch))]):
                values.append(self._probability(1).item())
        return values


def _by_row(hidden: Tensor, rows: int) -> Float[Tensor, "row pos d"]:
    """A view of a hidden state as [row, pos, d]; some modules flatten rows and positions into one axis."""
    return hidden.view(rows, -1, hidden.shape[-1])


def _embedding(model: Any) -> nn.Module:
    try:
        embedding = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        embedding = None
    if embedding is None or not any(True for _ in embedding.parameters()):
        raise ConfigError(
            f"trace: {type(model).__name__} names no token embeddings (get_input_embeddings), so there is no subject to corrupt"
        )
    return embedding


def _spread(embedding: nn.Module, ids: Int[Tensor, "pos"]) -> tuple[float, int]:
    """Standard deviation of the embedding module's outputs over its whole vocabulary, and their width d."""
    count = len(next(embedding.parameters()))
    given = [embedding(part).double() for part in torch.arange(count, device=ids.device).split(8192)]
    return torch.cat(given).std().item(), given[0].shape[-1]
