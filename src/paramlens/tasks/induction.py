"""The induction-head task (§5.1, Figure 1, Table 3): an attention-only Transformer that must copy the token after the first s.

A sequence holds n - 2 ordinary tokens, the special token s at a random place and s again at the end. The answer is m, the
token after the first s. The first s never stands directly before the last, where m would be s itself.
"""

import fnmatch
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from paramlens.errors import ConfigError, DivergedError
from paramlens.method.batch import Batch
from paramlens.method.generators import generator
from paramlens.method.hooks import hooked
from paramlens.method.task import Link, TargetHistory, Task
from paramlens.tasks.settings import InductionTask, TargetTraining

ROLES = ("s1", "m", "s2", "random")
S1, M, S2, RANDOM = range(4)


def induction_batch(
    task: InductionTask, *, seed: int, stream: str, step: int, batch: int, length: int | None = None, early: bool = False
) -> Batch:
    """Tokens (batch, pos) in [0, vocabulary], where s = vocabulary; roles (batch, pos) index ROLES; answers (batch,) are m.

    early: draw the first s towards the start (density falling as 1 / sqrt(position)) instead of uniformly.
    """
    n = task.length if length is None else length
    rng = generator(seed, "induction", stream, step)
    tokens = torch.randint(task.vocabulary, (batch, n), generator=rng)
    u = torch.rand(batch, generator=rng, dtype=torch.float64)
    first = ((u.square() if early else u) * (n - 2)).long()
    row = torch.arange(batch)
    tokens[row, first] = task.vocabulary
    tokens[:, -1] = task.vocabulary
    roles = torch.full((batch, n), RANDOM)
    roles[row, first] = S1
    roles[row, first + 1] = M
    roles[:, -1] = S2
    return Batch(tokens, roles=roles, answers=tokens[row, first + 1])


class Attention(nn.Module):
    """Causal attention whose queries and keys see the position encodings and whose values do not ("Shortformer").

    The pattern itself is computed only for a hook on `pattern`; otherwise PyTorch's fused attention gives the same output.
    """

    def __init__(self, width: int, *, heads: int, added: str) -> None:
        super().__init__()
        self.heads, self.added = heads, added
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.pattern = nn.Identity()

    def forward(self, x: Tensor, positions: Tensor, *, last_query_only: bool = False) -> Tensor:
        """X (B, T, d), positions (T, d) → what attention adds to the residual stream, (B, T or 1, d)."""
        start = x.shape[1] - 1 if last_query_only else 0
        if self.added == "before":
            q, k = self.q((x + positions)[:, start:]), self.k(x + positions)
        else:
            q, k = self.q(x[:, start:]) + positions[start:], self.k(x) + positions
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, self.v(x)))  # (B, H, T, d_head)
        if self.pattern._forward_hooks:
            scores = q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2)
            future = torch.full((x.shape[1], x.shape[1]), -torch.inf, dtype=x.dtype, device=x.device).triu(1)[start:]
            seen = self.pattern((scores + future).softmax(-1)) @ v  # the pattern is (B, H, T, T), rows sum to 1
        else:
            seen = F.scaled_dot_product_attention(q, k, v, is_causal=not start)
        return self.o(seen.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, width: int, *, heads: int, added: str) -> None:
        super().__init__()
        self.attn = Attention(width, heads=heads, added=added)

    def forward(self, x: Tensor, positions: Tensor, *, last_query_only: bool = False) -> Tensor:
        return (x[:, -1:] if last_query_only else x) + self.attn(x, positions, last_query_only=last_query_only)


class InductionTransformer(nn.Module):
    """Embedding, attention blocks, unembedding: no feed-forward, no LayerNorm, no biases (Table 3)."""

    def __init__(self, task: InductionTask) -> None:
        super().__init__()
        self.embed = nn.Embedding(task.vocabulary + 1, task.width)
        nn.init.normal_(self.embed.weight, std=task.embedding_scale)
        if task.positions == "learned":
            self.positions = nn.Parameter(torch.randn(task.length, task.width) * task.position_scale)
            if task.position_offset:
                self.positions.data += torch.randn(task.width) * task.position_offset
        else:
            self.register_buffer("positions", sinusoidal(task.length, task.width) * task.position_scale)
        self.blocks = nn.ModuleList(Block(task.width, heads=task.heads, added=task.added) for _ in range(task.blocks))
        self.unembed = nn.Linear(task.width, task.vocabulary + 1, bias=False)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embed

    def get_output_embeddings(self) -> nn.Linear:
        return self.unembed

    def forward(
        self, tokens: Int[Tensor, "batch pos"], *, offset: int = 0, last_token_only: bool = False
    ) -> Float[Tensor, "batch query token"]:
        """Logits at every position, or at the last one; `offset` is where in the position table the sequence starts."""
        positions = self.positions[offset : offset + tokens.shape[1]]
        x = self.embed(tokens)
        for block in self.blocks[:-1]:
            x = block(x, positions)
        return self.unembed(self.blocks[-1](x, positions, last_query_only=last_token_only))


def sinusoidal(length: int, width: int) -> Float[Tensor, "pos width"]:
    """The fixed encodings of Vaswani et al. (2017)."""
    angle = torch.arange(length)[:, None] / 10_000 ** (torch.arange(0, width, 2) / width)
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)[:, :width]


def induction_task(task: InductionTask, model: InductionTransformer, *, seed: int, batch: int) -> Task:
    """The task around a trained target."""
    patterns = tuple(f"blocks.{i}.attn.pattern" for i in range(task.blocks))
    return Task(
        model=model,
        batch=lambda step, stream: induction_batch(task, seed=seed, stream=stream, step=step, batch=batch),
        roles=ROLES,
        attention_patterns=patterns,
        links=(Link("attention_m_s1", patterns[0], "m", "s1"), Link("attention_s2_m", patterns[-1], "s2", "m")),
        changes={
            "no position in the query at m": partial(_without_position, model, "q", M),
            "no position in the key at s1": partial(_without_position, model, "k", S1),
        },
        token_names=(*map(str, range(task.vocabulary)), "s"),
        last_token=lambda tokens: {"tokens": tokens, "last_token_only": True},
    )


@contextmanager
def _without_position(model: InductionTransformer, projection: Literal["q", "k"], role: int, batch: Batch) -> Iterator[None]:
    """While active, the first block's queries or keys at positions of `role` are made without the position encoding (§6.1)."""
    assert batch.roles is not None
    attention = model.blocks[0].get_submodule("attn")
    encoding = model.positions[: batch.roles.shape[1]] * (batch.roles == role)[..., None]

    def before(_module: nn.Module, args: tuple[Tensor], kwargs: dict[str, Any]) -> tuple[tuple[Tensor], dict[str, Any]]:
        return (args[0] - encoding,), kwargs

    def after(_module: nn.Module, _args: tuple[Tensor], _kwargs: dict[str, Any], output: Tensor) -> Tensor:
        return output - encoding

    module = attention.get_submodule(projection)
    added_before = attention.added == "before"
    with hooked(before=[(module, before)]) if added_before else hooked([(module, after)]):
        yield


@dataclass(frozen=True)
class TargetCheck:
    """A trained target on held-out sequences: the last point of Figure 5, and the attention that carries the circuit."""

    step: int
    loss: float
    """Cross-entropy of the answer, nats."""
    accuracy: float
    attention_m_s1: float
    """Mean attention from m to s1 in the first block, over heads its best."""
    attention_s2_m: float
    """Mean attention from s2 to m in the last block, over heads its best."""


@torch.no_grad()
def check_target(model: InductionTransformer, task: InductionTask, *, seed: int, step: int, batch: int = 1024) -> TargetCheck:
    """Loss, accuracy and attention on `batch` held-out sequences."""
    held_out = induction_batch(task, seed=seed, stream="target-check", step=0, batch=batch).to(model.unembed.weight.device)
    roles, answers = held_out.roles, held_out.answers
    assert roles is not None
    assert answers is not None
    with _patterns(model) as patterns:
        logits = model(held_out.inputs)[:, -1]
    row = torch.arange(batch)
    s1, m = (roles == S1).int().argmax(1), (roles == M).int().argmax(1)
    return TargetCheck(
        step=step,
        loss=F.cross_entropy(logits, answers).item(),
        accuracy=(logits.argmax(-1) == answers).double().mean().item(),
        attention_m_s1=patterns[0][row, :, m, s1].mean(0).max().item(),
        attention_s2_m=patterns[-1][row, :, -1, m].mean(0).max().item(),
    )


@contextmanager
def _patterns(model: InductionTransformer) -> Iterator[list[Tensor]]:
    seen: list[Tensor] = []
    modules = [module for name, module in model.named_modules() if name.endswith(".pattern")]
    with hooked([(module, lambda _module, _args, _kwargs, pattern: seen.append(pattern)) for module in modules]):
        yield seen


def train_target(
    task: InductionTask,
    *,
    seed: int,
    device: str = "cpu",
    on_check: Callable[[TargetCheck], object] = lambda _: None,
    on_given_up: Callable[[int, TargetCheck], object] = lambda _attempt, _last: None,
) -> tuple[InductionTransformer, TargetHistory]:
    """Train the target on the answer alone (§5.1, Table 3).

    With `settle`, the rate stays constant until a check reaches `settle_accuracy`, then decays to 0, which ends the attempt; an attempt
    with no time left to settle is given up, of which `on_given_up` is told by number and last check. A target that has not converged in
    any attempt is returned as it is, with `converged` false.
    """
    attempt = 0
    while True:
        model, checks = _attempt(task, seed=seed, attempt=attempt, device=device, on_check=on_check)
        attempt += 1
        converged = _converged(checks[-1], task.training)
        if converged or attempt == task.training.attempts:
            return model, TargetHistory(tuple(checks), converged=converged, attempts=attempt)
        on_given_up(attempt, checks[-1])


def _attempt(
    task: InductionTask, *, seed: int, attempt: int, device: str, on_check: Callable[[TargetCheck], object]
) -> tuple[InductionTransformer, list[TargetCheck]]:
    training = task.training
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(generator(seed, "target", attempt).initial_seed())
        model = InductionTransformer(task).to(device)
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[training.optimizer]
    optimizer = kind(_decayed(model, training), lr=training.lr)
    warmup = training.warmup if training.warmup >= 1 else training.warmup * training.steps
    checks: list[TargetCheck] = []
    end, settling = training.steps, False
    for step in range(training.steps):
        rate = min(1.0, (step + 1) / warmup) if warmup else 1.0
        if settling:
            rate *= 0.5 * (1 - math.cos(math.pi * (end - step) / training.settle))
        for group in optimizer.param_groups:
            group["lr"] = training.lr * rate
        logits, answers = _training_logits(model, task, seed=seed, attempt=attempt, step=step, device=device)
        loss = F.cross_entropy(logits, answers)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        done = step + 1
        if done % training.check_every == 0 or done == end:
            check = check_target(model, task, seed=seed, step=done)
            if not math.isfinite(check.loss):
                raise DivergedError(f"target step {done}: loss is {check.loss}; lower task.training.lr ({training.lr:g})")
            checks.append(check)
            on_check(check)
            if done == end or (training.settle and not settling and done + training.settle > training.steps):
                break
            if training.settle and not settling and done >= training.settle_from and check.accuracy >= training.settle_accuracy:
                settling, end = True, done + training.settle
    return model, checks


def _decayed(model: InductionTransformer, training: TargetTraining) -> list[dict[str, Any]]:
    """The optimizer's groups. Raises `ConfigError` for a pattern that names no parameter."""
    free: set[str] = set()
    for pattern in training.undecayed:
        named = fnmatch.filter((name for name, _ in model.named_parameters()), pattern)
        if not named:
            raise ConfigError(f"task.training.undecayed: {pattern!r} names no parameter of the target")
        free.update(named)
    return [
        {"params": [value for name, value in model.named_parameters() if name not in free], "weight_decay": training.weight_decay},
        {"params": [value for name, value in model.named_parameters() if name in free], "weight_decay": 0.0},
    ]


def _training_logits(
    model: InductionTransformer, task: InductionTask, *, seed: int, attempt: int, step: int, device: str
) -> tuple[Tensor, Tensor]:
    training = task.training
    curriculum = step < training.window_steps
    length = (training.window if curriculum else None) or task.length
    offset = int(torch.randint(task.length - length + 1, (1,), generator=generator(seed, "window", attempt, step)))
    batch = induction_batch(
        task, seed=seed, stream=f"target-{attempt}", step=step, batch=training.batch, length=length, early=curriculum
    ).to(device)
    assert batch.answers is not None
    return model(batch.inputs, offset=offset, last_token_only=True)[:, -1], batch.answers


def _converged(check: TargetCheck, training: TargetTraining) -> bool:
    return check.loss <= training.converged_loss and check.accuracy >= training.converged_accuracy
