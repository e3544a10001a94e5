"""Causal tracing: where restoring one state of a run with a corrupted subject brings the answer back (Meng et al. 2022; Figures 7-9)."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from paramlens.analysis.edit import positions_of
from paramlens.decomposition import block_chains
from paramlens.errors import BatchError, ConfigError
from paramlens.shown import Shown
from paramlens.sites import at_rest
from paramlens.tables import Cell, Column, Table, columns, shaded, token_text
from paramlens.tasks import generator
from paramlens.tasks.language import encode, encode_fact, model_inputs, token_texts
from paramlens.tasks.limits import require_tokens

NOISE = 3.0
"""Standard deviation of the noise on the subject's embeddings, in standard deviations of the embeddings."""

SAMPLES = 10
"""Draws of the noise."""

WINDOW = 3
"""Blocks whose MLPs or attentions are restored together."""

_PARTS = {
    "mlp": ("mlp", "feed_forward", "ffn", "block_sparse_moe"),
    "attention": ("attn", "attention", "self_attn", "self_attention"),
}

Kind = Literal["hidden", "mlp", "attention"]


@dataclass(frozen=True, repr=False)
class Trace(Shown):
    """The answer's probability, in [0, 1], mean over the draws of noise.

    hidden, mlp, attention: [block][position], with that block's state, or the outputs of the MLPs or attentions of `window` blocks around
    it, restored at that position. zero_mlp: with the whole MLP of a block put to zero, no noise.
    """

    model: str
    prompt: str
    subject: str
    answer: str
    positions: list[str]
    """The prompt's tokens."""
    subject_positions: list[int]
    clean: float
    """Of the model as it is."""
    corrupted: float
    """With noise on the subject, nothing restored."""
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
        """The three maps, one row a block, one column a token, * at the subject's; and, with `zero_mlp`, the sweep without one MLP."""
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
            f"One MLP put to zero: probability of the answer ({self.clean:.3f} with all)",
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
    """Trace the answer to `prompt` in any causal language model of transformers, by hooks that are taken off again.

    subject: words of the prompt. answer: none: the likeliest next token. Raises `ConfigError` for a subject that is not in the prompt, an
    odd number, or a model whose blocks are not found.
    """
    if samples < 1 or window < 1 or noise <= 0:
        raise ConfigError(f"noise {noise}, samples {samples}, window {window}: give numbers above 0")
    device = next(model.parameters()).device
    with at_rest(model):
        if answer is None:
            prompted = encode(tokenizer, prompt)
            require_tokens(model, [prompted], [f"prompt {prompt!r}"])
            ids = torch.tensor([prompted], device=device)
            likeliest = model(**model_inputs(ids)).logits[0, -1].argmax().item()
            answer = token_texts(tokenizer, [likeliest])[0].strip()
        before, after = encode_fact(tokenizer, prompt, answer)
        require_tokens(model, [before + after], [f"prompt and answer {prompt!r} {answer!r}"])
        texts = token_texts(tokenizer, before)
        at = positions_of(texts, subject)
        tracer = _Tracer(model, torch.tensor(before + after, device=device), len(before), at, noise=noise, samples=samples, seed=seed)
        maps = {kind: tracer.restored(kind, window) for kind in ("hidden", "mlp", "attention")}
        return Trace(
            model=name or type(model).__name__,
            prompt=prompt,
            subject=subject,
            answer=answer,
            positions=texts,
            subject_positions=at,
            clean=tracer.clean(),
            corrupted=tracer.corrupted(),
            noise=noise,
            samples=samples,
            window=window,
            seed=seed,
            **maps,
            zero_mlp=tracer.zeroed(),
        )


class _Tracer:
    """One prompt with its answer through a model, clean, corrupted and partly restored."""

    def __init__(
        self, model: Any, ids: Int[Tensor, "pos"], prompt: int, subject: Sequence[int], *, noise: float, samples: int, seed: int
    ) -> None:
        self.model, self.ids, self.prompt, self.samples = model, ids, prompt, samples
        blocks = max(block_chains(model, model_inputs(ids[None])), key=len, default=())
        if not blocks:
            raise ConfigError(f"trace: {type(model).__name__} has no chain of blocks that hand a hidden state on")
        self.modules: dict[Kind, list[nn.Module]] = {"hidden": list(blocks)}
        for kind in ("mlp", "attention"):
            found = [next((child for name, child in block.named_children() if name in _PARTS[kind]), None) for block in blocks]
            if any(each is None for each in found):
                raise ConfigError(f"trace: a block of {type(model).__name__} has no {kind} (a child named {', '.join(_PARTS[kind])})")
            self.modules[kind] = [each for each in found if each is not None]
        self.embedding = model.get_input_embeddings()
        weight = self.embedding.weight
        rng = generator(seed, "trace")
        drawn = torch.randn(samples, len(subject), weight.shape[1], generator=rng, dtype=torch.float64)
        self.subject, self.noise = list(subject), (noise * weight.double().std().item() * drawn).to(weight)
        self.states = self._clean_states()

    def _clean_states(self) -> dict[nn.Module, Tensor]:
        kept: dict[nn.Module, Tensor] = {}

        def keep(module: nn.Module, _args: Any, output: Any) -> None:
            kept[module] = _hidden(output)[0]

        with _hooked([(module, keep) for modules in self.modules.values() for module in modules]):
            self.model(**model_inputs(self.ids[None]))
        return kept

    def _probability(self, rows: int) -> Float[Tensor, "row"]:
        logits = self.model(**model_inputs(self.ids.expand(rows, -1))).logits[:, self.prompt - 1 : -1].double()
        expected = self.ids[self.prompt :].expand(rows, -1)
        return logits.log_softmax(-1).gather(2, expected[..., None]).sum((1, 2)).exp()

    def _corrupt(self, _module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        noisy = output.clone()
        copies = len(output) // self.samples
        noisy[:, self.subject] += self.noise.repeat(copies, 1, 1)
        return noisy

    def clean(self) -> float:
        return self._probability(1).item()

    def corrupted(self) -> float:
        with _hooked([(self.embedding, self._corrupt)]):
            return self._probability(self.samples).mean().item()

    def restored(self, kind: Kind, window: int) -> list[list[float]]:
        """[block][position]; all positions of a block go through the model together, `samples` rows each."""
        modules = self.modules[kind]
        rows = []
        for block in range(len(modules)):
            around = range(max(0, block - (window - 1) // 2), min(len(modules), block + window // 2 + 1))
            chosen = [modules[block]] if kind == "hidden" else [modules[i] for i in around]
            with _hooked([(self.embedding, self._corrupt), *((module, self._restore) for module in chosen)]):
                values = self._probability(self.samples * self.prompt)
            rows.append(values.view(self.prompt, self.samples).mean(1).tolist())
        return rows

    def _restore(self, module: nn.Module, _args: Any, output: Any) -> Any:
        hidden = _hidden(output).clone()
        for position in range(self.prompt):
            hidden[position * self.samples : (position + 1) * self.samples, position] = self.states[module][position]
        return _with_hidden(output, hidden)

    def zeroed(self) -> list[float]:
        """Probability with one block's MLP put to zero at every position."""
        values = []
        for module in self.modules["mlp"]:
            with _hooked([(module, lambda _module, _args, output: _with_hidden(output, torch.zeros_like(_hidden(output))))]):
                values.append(self._probability(1).item())
        return values


def _hidden(output: Any) -> Tensor:
    hidden = output[0] if isinstance(output, tuple) else output
    if not isinstance(hidden, Tensor):
        raise BatchError(f"trace: a block returned {type(output).__name__}, no hidden state")
    return hidden


def _with_hidden(output: Any, hidden: Tensor) -> Any:
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


@contextmanager
def _hooked(hooks: Sequence[tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    handles = [module.register_forward_hook(hook) for module, hook in hooks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
