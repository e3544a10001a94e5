"""What is at either end of a site: the tokens and positions whose vectors reach it directly, and the logits that its output reaches.

Reads use the embeddings as they enter the residual stream and pass the norm before the site. Writes pass the norms between the site and
the unembedding, at fixed scale; attention's values pass the output projection first. All other inputs and outputs of a site go through
other parts of the model; for these, look at where its subcomponents are active.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from paramlens.analysis.held_out import data_of
from paramlens.analysis.paths import find_paths
from paramlens.method.batch import Batch
from paramlens.runs.rundir import Run
from paramlens.tasks.language_models.tokens import token_texts

TOP = 8
"""Number of tokens or positions listed for what a subcomponent reads or writes."""


@dataclass(frozen=True)
class Read:
    """A token or position, and how strongly a subcomponent reads or writes it."""

    what: str
    value: float


class Streams:
    """Both ends of every site of a run, found by running `batch` a few times."""

    def __init__(self, run: Run, batch: Batch) -> None:
        self.model: Any = run.decomposition.model
        self._task = data_of(run)
        self._embedding, self._head = (_matrix(self.model, each) for each in ("get_input_embeddings", "get_output_embeddings"))
        self._paths = find_paths(self.model, run.decomposition.sites, batch.inputs, embedding=self._embedding, head=self._head)
        self._names: list[str] = []

    def reads(self, site: str, u: Float[Tensor, "d_in part"], *, top: int = TOP) -> list[tuple[list[Read], list[Read]]]:
        """For every subcomponent, the tokens and the positions of largest |inner activation|; empty if none reach the site directly."""
        reading = self._paths.reads.get(site)
        if reading is None or self._embedding is None:
            return [([], [])] * u.shape[1]
        count = len(next(self._embedding.parameters()))
        tokens = (reading.embedding(self._embedding(torch.arange(count, device=u.device))) @ u).T
        named = [_top(row, row.abs(), self._texts(len(row)), top) for row in tokens]
        table = _positions(self.model, site)
        if table is None:
            return [(each, []) for each in named]
        at = (reading.stream(table) @ u).T
        return [(each, _top(row, row.abs(), [str(i) for i in range(len(row))], top)) for each, row in zip(named, at, strict=True)]

    def writes(self, site: str, v: Float[Tensor, "part d_out"], *, top: int = TOP) -> list[tuple[list[Read], list[Read]]]:
        """For every subcomponent, the tokens whose logits it raises most and lowers most; empty if no direct path was found."""
        to_logits = self._paths.writes.get(site)
        if to_logits is None:
            return [([], [])] * len(v)
        logits = to_logits(v)
        names = self._texts(logits.shape[1])
        return [(_top(row, row, names, top), _top(row, -row, names, top)) for row in logits]

    def _texts(self, count: int) -> list[str]:
        if len(self._names) != count:
            tokenizer = self._task.tokenizer
            known = token_texts(tokenizer, list(range(min(count, len(tokenizer))))) if tokenizer else list(self._task.token_names)
            self._names = known + [f"<{i}>" if known else str(i) for i in range(len(known), count)]
        return self._names


def _matrix(model: Any, getter: str) -> nn.Module | None:
    """The module of a model's input or output embeddings, weight [token, d]. None: the model names none, or they are not for tokens."""
    module = _named(model, getter)
    weight = getattr(module, "weight", None)
    return module if isinstance(weight, Tensor) and weight.dim() == 2 else None


def _named(model: Any, getter: str) -> nn.Module | None:
    try:
        return getattr(model, getter)() if hasattr(model, getter) else None
    except NotImplementedError:  # raised by transformers' models without embeddings
        return None


def _positions(model: Any, site: str) -> Tensor | None:
    """Position encodings that reach the site, [pos, d]. None: the model has no table of them.

    They come from the model's method `position_encodings(site)`, if it has one.
    """
    if hasattr(model, "position_encodings"):
        return model.position_encodings(site)
    return next((value for name, value in model.named_parameters() if name.rsplit(".", 2)[-2:] == ["wpe", "weight"]), None)


def _top(values: Tensor, order: Tensor, names: list[str], top: int) -> list[Read]:
    return [Read(names[i], values[i].item()) for i in order.topk(min(top, len(values))).indices.tolist()]
