"""Stand-ins for parameters: tensors that recognise the operation that is a site's product, so that it can be watched or replaced.

Masks differ between tokens, so no single weight could replace the parameter: the product itself must be replaced. During a run, each
parameter is therefore replaced by a `StandIn`, a tensor with the same values; PyTorch calls its `__torch_function__` for every operation
on it. Three groups of operations are known:

* questions about it (shape, dtype, …) are answered;
* rearrangements (transpose, reshape, an index, a slice, …) give another stand-in, which remembers them;
* products (`einsum`, `matmul`, `linear`, `addmm`, … and the attention of nn.MultiheadAttention) are brought into one form,
  y[.., b, o] = Σ_i x[.., b, i] w[b, i, o]. The remembered rearrangements, applied to the *indices* of the parameter's numbers, give the
  exact b, i and o of a site's W [d_in, d_out].

Any other operation raises `SiteError` with its name and the site, so that no mask is silently ignored.
"""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from paramlens.errors import SiteError
from paramlens.method.batch import map_leaves, map_tensors, tensors_of

# fmt: off
_QUESTIONS = {
    "shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_nested", "is_cuda", "is_cpu", "is_mps", "is_meta", "is_sparse",
    "is_quantized", "is_leaf", "grad_fn", "itemsize", "dim", "size", "numel", "nelement", "stride", "storage_offset", "is_contiguous",
    "is_floating_point", "is_complex", "element_size", "__len__", "data_ptr",
}
_REARRANGEMENTS = {
    "T", "mT", "t", "transpose", "swapaxes", "swapdims", "permute", "movedim", "moveaxis", "view", "reshape", "flatten", "unflatten",
    "squeeze", "unsqueeze", "__getitem__", "select", "narrow", "chunk", "split", "unbind", "tensor_split",
}
# fmt: on
_COPIES = {"contiguous", "clone", "detach", "to", "float", "type_as"}
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class Block:
    """The position of a site's W in a product's weight w [b, i, o]: `w[b][rows][:, columns]`. None: all rows or columns, in order."""

    site: Any
    b: int
    rows: Int[Tensor, "d_in"] | None
    columns: Int[Tensor, "d_out"] | None

    def to(self, device: torch.device) -> "Block":
        rows, columns = (None if each is None else each.to(device) for each in (self.rows, self.columns))
        return Block(self.site, self.b, rows, columns)


class Holder(ABC):
    """The object that created the stand-ins and computes their products."""

    @abstractmethod
    def blocks(self, stand_in: "StandIn", arranged: Callable[[Tensor], Tensor], key: str, *, lookup: bool = False) -> Sequence[Block]:
        """The blocks of a product with weight [b, i, o] = arranged(stand_in). key: name of the product. lookup: its input is ids.

        Raises `SiteError` if it is not a product x @ W of a site.
        """

    @abstractmethod
    def computed(self, block: Block, x: Tensor) -> Tensor | None:
        """The output of the block's site for x [*leading, d_in]. None: the same as the target's."""

    @property
    @abstractmethod
    def only_watches(self) -> bool:
        """Whether sites are only watched, so that each computes the same as the target."""

    @abstractmethod
    def refusal(self, stand_in: "StandIn", what: str) -> SiteError:
        """The error for a site of the stand-in that the model uses in `what`, an operation that is not supported."""


class StandIn(Tensor):
    """A tensor that replaces a parameter, or a rearrangement of one, during a run."""

    holder: Holder
    parameter: str
    plain: Tensor
    path: tuple[Callable[[Tensor], Tensor], ...]
    key: str

    @classmethod
    def of(cls, plain: Tensor, holder: Holder, parameter: str) -> "StandIn":
        return cls._made(plain, holder, parameter, (), "")

    @classmethod
    def _made(cls, plain: Tensor, holder: Holder, parameter: str, path: tuple[Callable[[Tensor], Tensor], ...], key: str) -> "StandIn":
        made = plain.as_subclass(cls)
        made.holder, made.parameter, made.plain, made.path, made.key = holder, parameter, plain, path, key
        return made

    def then(self, plain: Tensor, step: Callable[[Tensor], Tensor], key: str) -> "StandIn":
        """The stand-in for `plain`, the result of the rearrangement `step` of this one."""
        return self._made(plain, self.holder, self.parameter, (*self.path, step), f"{self.key}|{key}")

    def replay(self, tensor: Tensor) -> Tensor:
        """Apply the remembered rearrangements to a tensor of the parameter's shape."""
        for step in self.path:
            tensor = step(tensor)
        return tensor

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = _name(func)
        if name in _QUESTIONS:
            return func(*_plain(args), **_plain(kwargs))
        if name in _COPIES and isinstance(args[0], StandIn):
            return _copied(func, name, args[0], args[1:], kwargs)
        if name == "__getitem__" and _is_lookup(args):
            return _looked_up(func, args[1][0] if isinstance(args[1], tuple) else args[1], args[0], args, kwargs)
        if name in _REARRANGEMENTS and isinstance(args[0], StandIn):
            return _rearranged(func, name, args[0], args[1:], kwargs)
        if name == "embedding":
            return _embedding(func, *args, **kwargs)
        if name == "multi_head_attention_forward":
            return _attention(func, args, kwargs)
        if name in _PRODUCTS:
            return _multiplied(func, name, args, kwargs)
        raise _refused(name, (args, kwargs))


def _name(func: Callable[..., Any]) -> str:
    name = getattr(func, "__name__", str(func))
    return getattr(getattr(func, "__self__", None), "__name__", name) if name == "__get__" else name


def _plain(tree: Any) -> Any:
    return map_tensors(lambda tensor: tensor.plain if isinstance(tensor, StandIn) else tensor, tree)


def _refused(what: str, tree: Any) -> SiteError:
    found: list[StandIn] = []
    map_tensors(lambda tensor: found.append(tensor) or tensor if isinstance(tensor, StandIn) else tensor, tree)
    return found[0].holder.refusal(found[0], f"{what}, an operation on a weight that is not known")


def _copied(func: Callable[..., Any], name: str, weight: StandIn, args: Sequence[Any], kwargs: Mapping[str, Any]) -> StandIn:
    """A stand-in for a copy with the same numbers, or for the tensor itself."""
    plain = func(weight.plain, *_plain(args), **_plain(kwargs))
    if not isinstance(plain, Tensor) or plain.dtype != weight.plain.dtype or plain.device != weight.plain.device:
        raise weight.holder.refusal(weight, f"{name} to another type or device")
    return weight.then(plain, lambda tensor: tensor, "")


def _rearranged(func: Callable[..., Any], name: str, weight: StandIn, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    args = map_leaves(Tensor, _number, list(args))
    if tensors_of(args):
        raise weight.holder.refusal(weight, "an index of several numbers, so that every token would have a weight of its own")
    if name == "view" and any(isinstance(each, torch.dtype) for each in args):
        raise weight.holder.refusal(weight, "view as another type")
    result, key = func(weight.plain, *args, **kwargs), repr((name, args, kwargs))
    if isinstance(result, Tensor):
        return weight.then(result, lambda tensor: func(tensor, *args, **kwargs), key)
    return tuple(weight.then(each, lambda tensor, i=i: func(tensor, *args, **kwargs)[i], f"{key}[{i}]") for i, each in enumerate(result))


def _series(index: Any) -> Sequence[Any]:
    return index if isinstance(index, tuple | list) else (index,)


def _number(index: Tensor) -> int | Tensor:
    whole = index.dim() == 0 and not index.is_floating_point() and index.dtype != torch.bool
    return int(index) if whole else index


def _is_lookup(args: Sequence[Any]) -> bool:
    """Whether rows are looked up by ids: `table[ids]` or `table[ids, :]`."""
    first, *rest = _series(args[1])
    ids = isinstance(first, Tensor) and first.dim() > 0 and not first.is_floating_point() and first.dtype != torch.bool
    return isinstance(args[0], StandIn) and ids and args[0].plain.dim() == 2 and all(each == slice(None) for each in rest)


def _embedding(func: Callable[..., Any], ids: Tensor, table: StandIn, *args: Any, **kwargs: Any) -> Tensor:
    bound = inspect.signature(F.embedding).bind(ids, table, *args, **kwargs).arguments
    if bound.get("max_norm") is not None:
        raise table.holder.refusal(table, "an embedding with max_norm, which changes the table")
    return _looked_up(func, ids, table, (ids, table, *args), kwargs)


def _looked_up(func: Callable[..., Any], ids: Tensor, table: StandIn, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    """Rows `ids` of a table: the product of one-hot vectors with it. The input x is ids [.., 1]."""
    found = table.holder.blocks(table, lambda tensor: tensor[None], "lookup", lookup=True)
    computed = [table.holder.computed(block, ids[..., None]) for block in found if block.rows is None and block.columns is None]
    if len(computed) != 1:
        raise table.holder.refusal(table, "rows of a part of it, looked up by number")
    return func(*_plain(args), **_plain(kwargs)) if computed[0] is None else computed[0]


@dataclass(frozen=True)
class _Einsum:
    """A product as an einsum of an input and a weight, and a tensor that is added to it."""

    equation: str
    first: Tensor
    second: Tensor
    added: Tensor | None = None


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> _Einsum:
    return _Einsum("...i,oi->...o", x, weight, bias)


def _matmul(first: Tensor, second: Tensor) -> _Einsum | None:
    if min(first.dim(), second.dim()) < 2:
        return None
    batch = _LETTERS[: max(first.dim(), second.dim()) - 2]
    a, b = (batch[len(batch) - each.dim() + 2 :] for each in (first, second))
    return _Einsum(f"{a}ni,{b}io->{batch}no", first, second)


def _added(added: Tensor, first: Tensor, second: Tensor, *, beta: float = 1, alpha: float = 1) -> _Einsum | None:
    product = _matmul(first, second) if beta == alpha == 1 else None
    return None if product is None else _Einsum(product.equation, first, second, added)


def _einsum(equation: str, *operands: Any) -> _Einsum | None:
    tensors = operands[0] if len(operands) == 1 and isinstance(operands[0], tuple | list) else operands
    return _Einsum(equation.replace(" ", ""), *tensors) if len(tensors) == 2 and "->" in equation else None


_PRODUCTS: dict[str, Callable[..., _Einsum | None]] = {
    "linear": _linear,
    "einsum": _einsum,
    "matmul": _matmul,
    "__matmul__": _matmul,
    "__rmatmul__": lambda second, first: _matmul(first, second),
    "mm": _matmul,
    "bmm": _matmul,
    "addmm": _added,
    "baddbmm": _added,
}
"""Operation → a function that writes it as an einsum. None: it is not one."""


def _multiplied(func: Callable[..., Any], name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    """The operation's result with the sites' products in it, or its own result if every site computes the same as the target."""
    try:
        product = _PRODUCTS[name](*args, **kwargs)
    except TypeError:  # out=..., or arguments of another kind
        product = None
    if product is None or isinstance(product.added, StandIn) or isinstance(product.first, StandIn) == isinstance(product.second, StandIn):
        raise _refused(name, (args, kwargs))
    y = _summed(product)
    if y is None:
        return func(*_plain(args), **_plain(kwargs))
    return y if product.added is None else y + product.added


def _summed(product: _Einsum) -> Tensor | None:
    """The einsum with the sites' products in it. None: all sites compute the same as the target."""
    operands = (product.first, product.second)
    place = int(isinstance(product.second, StandIn))
    weight, x = operands[place], operands[1 - place]
    assert isinstance(weight, StandIn)
    left, out = product.equation.split("->")
    labels = left.split(",")
    unused = [each for each in _LETTERS if each not in product.equation]
    spread = "".join(unused[: max(0, x.dim() - len(labels[1 - place].replace("...", "")))])
    lx, lw, lo = (each.replace("...", spread) for each in (labels[1 - place], labels[place], out))
    shared = [each for each in lw if each in lx and each in lo]
    inner = [each for each in lw if each in lx and each not in lo]
    outer = [each for each in lw if each not in lx and each in lo]
    lead = [each for each in lx if each not in lw]
    sizes = {**dict(zip(lw, weight.plain.shape, strict=False)), **dict(zip(lx, x.shape, strict=True))}
    once = all(len(set(each)) == len(each) for each in (lx, lw, lo)) and "." not in labels[place]
    fits = [sizes.get(each) for each in lw] == list(weight.plain.shape)
    if not once or not fits or not inner or len(shared + inner + outer) != len(lw) or set(lead + shared + outer) != set(lo):
        raise weight.holder.refusal(weight, f"einsum {product.equation!r}, which is no product x @ W")
    b, i, o = (torch.Size([sizes[each] for each in part]).numel() for part in (shared, inner, outer))

    def arranged(tensor: Tensor) -> Tensor:
        return tensor.permute([lw.index(each) for each in shared + inner + outer]).reshape(b, i, o)

    given = x.permute([lx.index(each) for each in lead + shared + inner]).reshape(*(sizes[each] for each in lead), b, i)
    y = _by_blocks(weight, given, arranged, product.equation)
    if y is None:
        return None
    made = lead + shared + outer
    return y.reshape([sizes[each] for each in made]).permute([made.index(each) for each in lo])


def _by_blocks(
    weight: StandIn, x: Float[Tensor, "*lead b i"], arranged: Callable[[Tensor], Tensor], key: str
) -> Float[Tensor, "*lead b o"] | None:
    """The sum of each block's output and the output of the rest of the weight. None: all sites compute the same as the target."""
    holder, w = weight.holder, arranged(weight.plain)
    parts: list[tuple[Block, Tensor]] = []
    for block in holder.blocks(weight, arranged, key):
        own = x[..., block.b, :]
        part = holder.computed(block, own if block.rows is None else own.index_select(-1, block.rows))
        if part is not None:
            parts.append((block, part))
    if not parts:
        return None
    if len(parts) == len(w) == 1 and parts[0][0].rows is None and parts[0][0].columns is None:
        return parts[0][1].unsqueeze(-2)
    rest, width = w.clone(), w.shape[2]
    every = [torch.arange(size, device=w.device) for size in w.shape[1:]]
    columns = [every[1] if block.columns is None else block.columns for block, _ in parts]
    for (block, _), own in zip(parts, columns, strict=True):
        rest[block.b, (every[0] if block.rows is None else block.rows)[:, None], own] = 0
    rows = [w.shape[1] if block.rows is None else len(block.rows) for block, _ in parts]
    covered = sum(i * len(own) for i, own in zip(rows, columns, strict=True))
    if covered == w.numel():
        y = parts[0][1].new_zeros(*x.shape[:-2], w.shape[0] * width)
    else:
        y = torch.einsum("...bi,bio->...bo", x, rest).flatten(-2)
    for (block, part), own in zip(parts, columns, strict=True):
        y = y.index_add(-1, block.b * width + own, part)
    return y.unflatten(-1, (w.shape[0], width))


def _attention(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor | None]:
    """`F.multi_head_attention_forward` with its four projections computed before and after it, and replaced by identities inside.

    Inside x is [pos, batch, d]; in the projections it is [batch, pos, d].
    """
    given = inspect.signature(F.multi_head_attention_forward).bind(*args, **kwargs)
    given.apply_defaults()
    a = given.arguments
    if a["query"].dim() != 3 or a["static_k"] is not None or a["static_v"] is not None:
        raise _refused("multi_head_attention_forward without an axis of sequences, or with static keys or values", (args, kwargs))
    width = a["embed_dim_to_check"]
    biases = (None, None, None) if a["in_proj_bias"] is None else a["in_proj_bias"].split(width)
    if a["use_separate_proj_weight"]:
        weights = (a["q_proj_weight"], a["k_proj_weight"], a["v_proj_weight"])
    else:
        weights = a["in_proj_weight"].split(width)
    projected = {
        name: F.linear(a[name].transpose(0, 1), weight, bias).transpose(0, 1)
        for name, weight, bias in zip(("query", "key", "value"), weights, biases, strict=True)
    }
    identity = torch.eye(width, dtype=a["query"].dtype, device=a["query"].device)
    changed = {"in_proj_weight": identity.repeat(3, 1), "in_proj_bias": None, "out_proj_weight": identity, "out_proj_bias": None}
    separate = {"use_separate_proj_weight": False, "q_proj_weight": None, "k_proj_weight": None, "v_proj_weight": None}
    heads, pattern = func(**a | changed | separate | projected)
    made = F.linear(heads.transpose(0, 1), a["out_proj_weight"], a["out_proj_bias"]).transpose(0, 1)
    holders = [each.holder for each in (*weights, a["out_proj_weight"]) if isinstance(each, StandIn)]
    return func(*_plain(args), **_plain(kwargs)) if all(holder.only_watches for holder in holders) else (made, pattern)
