"""The induction-head task (§5.1, Figure 1, Table 3): an attention-only Transformer that must copy the token after the first s.

A sequence has n - 2 ordinary tokens, the special token s at a random place, and s again at the end. The answer is m, the
token after the first s. The first s is never directly before the last, as m would then be s itself.
"""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from paramlens.method.batch import Batch
from paramlens.method.generators import generator
from paramlens.method.hooks import hooked
from paramlens.method.task import Link, Task
from paramlens.tasks.induction.model import InductionTransformer
from paramlens.tasks.induction.task import InductionTask

ROLES = ("s1", "m", "s2", "random")
S1, M, S2, RANDOM = range(4)


def induction_batch(
    task: InductionTask, *, seed: int, stream: str, step: int, batch: int, length: int | None = None, early: bool = False
) -> Batch:
    """Tokens (batch, pos) in [0, vocabulary], where s = vocabulary; roles (batch, pos) index ROLES; answers (batch,) are m.

    early: draw the first s more often near the start (density ∝ 1 / sqrt(position)) instead of uniformly.
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


def with_shuffled(batch: Batch, rows: int, *, seed: int, step: int) -> Batch:
    """The batch with the tokens of its last `rows` sequences in random order, each its own.

    Their positions have no role but `random`, and as they have no answer, the batch has none.
    """
    if not rows:
        return batch
    assert isinstance(batch.inputs, Tensor)
    assert batch.roles is not None
    rng = generator(seed, "induction", "shuffled", step)
    tokens, roles = batch.inputs.clone(), batch.roles.clone()
    order = torch.rand(rows, tokens.shape[1], generator=rng).argsort(1)
    tokens[-rows:] = tokens[-rows:].gather(1, order)
    roles[-rows:] = RANDOM
    return dataclasses.replace(batch, inputs=tokens, roles=roles, answers=None)


def induction_task(task: InductionTask, model: InductionTransformer, *, seed: int, batch: int) -> Task:
    """The task of a trained target."""

    def batches(step: int, stream: str) -> Batch:
        made = induction_batch(task, seed=seed, stream=stream, step=step, batch=batch)
        return with_shuffled(made, round(task.shuffled * batch), seed=seed, step=step) if stream == "train" else made

    def elsewhere(step: int) -> Batch:
        made = induction_batch(task, seed=seed, stream="elsewhere", step=step, batch=task.elsewhere)
        return with_shuffled(made, task.elsewhere, seed=seed, step=step)

    patterns = tuple(f"blocks.{i}.attn.pattern" for i in range(task.blocks))
    return Task(
        model=model,
        batch=batches,
        roles=ROLES,
        attention_patterns=patterns,
        links=(Link("attention_m_s1", patterns[0], "m", "s1"), Link("attention_s2_m", patterns[-1], "s2", "m")),
        changes={
            "no position in the query at m": partial(_without_position, model, "q", M),
            "no position in the key at s1": partial(_without_position, model, "k", S1),
        },
        elsewhere=elsewhere if task.elsewhere else None,
        token_names=(*map(str, range(task.vocabulary)), "s"),
        last_token=lambda tokens: {"tokens": tokens, "last_token_only": True},
    )


@contextmanager
def _without_position(model: InductionTransformer, projection: Literal["q", "k"], role: int, batch: Batch) -> Iterator[None]:
    """While active, the first block computes its queries or keys at positions of `role` without the position encoding (§6.1)."""
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
