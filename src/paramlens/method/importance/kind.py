"""The interface of a γ kind: its parameters as data, its memory, the pre-activations of sites of one shape, and what all sites share."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from paramlens.errors import BatchError
from paramlens.method.importance.settings import KINDS, Gamma


@dataclass(frozen=True)
class Parameter:
    """One parameter of γ at one site.

    shape: its sizes, with "C" for the axis that has one entry per subcomponent.
    fan_in: the first values are normal with variance 1 / fan_in. Defaults to None: every entry starts at `start`.
    lr_factor: factor on γ's learning rate. Defaults to None: γ's own rate, in one optimizer group with all others that have None.
    rearranged: whether a step copies it and its gradient with axes in another order.
    """

    shape: tuple[int | Literal["C"], ...]
    fan_in: int | None = None
    start: float = 0.0
    lr_factor: float | None = None
    rearranged: bool = False

    @property
    def C_axis(self) -> int | None:
        """The axis along which subcomponents can be removed. None: all of them share the parameter."""
        return self.shape.index("C") if "C" in self.shape else None

    def sizes(self, C: int) -> tuple[int, ...]:
        return tuple(C if size == "C" else size for size in self.shape)

    def count(self, C: int) -> int:
        """Number of entries at one site."""
        return math.prod(self.sizes(C))


def mlps(width: int, gamma: Gamma) -> dict[str, Parameter]:
    """Parameters of C independent MLPs: `width` inputs, d_gate hidden units, one output."""
    h = gamma.d_gate
    return {
        "w_in": Parameter(("C", width, h), fan_in=width, rearranged=width > 1),
        "b_in": Parameter(("C", h)),
        "w_out": Parameter(("C", h), fan_in=h),
        "b_out": Parameter(("C",), start=gamma.output_bias),
    }


def shared_mlp(width: int, gamma: Gamma) -> dict[str, Parameter]:
    """Parameters of one MLP for all C subcomponents of a site: `width` inputs, d_gate hidden units, C outputs."""
    h = gamma.d_gate
    return {
        "w_in": Parameter((width, h), fan_in=width),
        "b_in": Parameter((h,)),
        "w_out": Parameter((h, "C"), fan_in=h),
        "b_out": Parameter(("C",), start=gamma.output_bias),
    }


class Declared(nn.Module):
    """A module whose parameters are `declared`, by name. leading: sizes of the axes that each of them has before its declared shape."""

    def __init__(self, declared: Mapping[str, Parameter], *, C: int, leading: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.declared = declared
        for name, parameter in declared.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(*leading, *parameter.sizes(C))))

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Tensor: ...

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        """Set the first values: random if `fan_in` is declared, otherwise `start`."""
        for name, parameter in self.named_parameters():
            declared = self.declared[name]
            if declared.fan_in is None:
                parameter.fill_(declared.start)
            else:
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * declared.fan_in**-0.5)


class Trunk(Declared, ABC):
    """A network that all sites share. It makes one vector per position of their inputs, which every site then reads in place of its own.

    widths: site → d_in, in model order.
    """

    def __init__(self, widths: Mapping[str, int], gamma: Gamma) -> None:
        super().__init__(self.parameters_of(gamma, d_in=sum(widths.values())), C=0)
        self.names, self.gamma = tuple(widths), gamma

    @classmethod
    @abstractmethod
    def parameters_of(cls, gamma: Gamma, *, d_in: int) -> dict[str, Parameter]:
        """Parameters by name, as in `importance.safetensors`; d_in: the sum over all sites. None of them has an axis of subcomponents."""

    @classmethod
    @abstractmethod
    def activations(cls, gamma: Gamma, *, length: int) -> int:
        """Numbers kept for the backward pass per position, beyond those that the kind counts at each site; length: of a sequence."""

    @abstractmethod
    def forward(self, inputs: Mapping[str, Tensor], present: Bool[Tensor, "batch pos"] | None) -> Float[Tensor, "batch pos width"]:
        """What all sites read. inputs: each site's input in the target; present: not padding. None: all."""


class GammaKind(Declared, ABC):
    """γ of a group of sites of one shape (d_in, C); the first axis of every parameter is the site. Each `gamma.kind` is one subclass."""

    trunk: ClassVar[type[Trunk] | None] = None
    """What all sites share. Defaults to None: each site's γ reads that site alone."""
    has_table: ClassVar[bool] = False
    """Whether it has tables of positions, and so needs inputs (batch, pos, d_in) and the longest sequence's length, `max_length`."""
    reads_inner: ClassVar[bool] = False
    """Whether it reads the inner activations x @ U instead of the site's input."""
    saves_memory: ClassVar[bool] = False
    """Whether error messages suggest it when another kind does not fit into memory."""

    def __init__(self, names: Sequence[str], gamma: Gamma, *, d_in: int, C: int, max_length: int | None) -> None:
        super().__init__(self.parameters_of_site(gamma, d_in=d_in, max_length=max_length), C=C, leading=(len(names),))
        self.names, self.gamma = tuple(names), gamma

    @classmethod
    @abstractmethod
    def parameters_of_site(cls, gamma: Gamma, *, d_in: int, max_length: int | None) -> dict[str, Parameter]:
        """Parameters by name, as in `importance.safetensors`, in the order in which their first values are drawn."""

    @classmethod
    @abstractmethod
    def activations(cls, gamma: Gamma, *, d_in: int, C: int, length: int) -> int:
        """Numbers kept for the backward pass per site and position, without the sites' inputs; length: of a sequence."""

    @abstractmethod
    def forward(
        self, x: Sequence[Float[Tensor, "*batch d_in"]], U: Sequence[Float[Tensor, "_ C"]], present: Bool[Tensor, "batch pos"] | None
    ) -> Float[Tensor, "site row C"]:
        """Pre-activations, one row per position. x, U: each site's input in the target, or what the trunk made of all of them, and its U;
        present: not padding. None: all.
        """

    @torch.no_grad()
    def switch_off(self, off: Sequence[Bool[Tensor, "C"]]) -> None:
        """Make the pre-activation -1 everywhere, so that g = 0 and has no gradient, for the subcomponents `off` of each site."""
        axis = self.declared["w_out"].C_axis
        assert axis is not None
        for w_out, b_out, where in zip(self.w_out, self.b_out, off, strict=True):
            w_out.index_fill_(axis, where.nonzero()[:, 0], 0)
            b_out.masked_fill_(where, -1)


def require_positions(gamma: Gamma, site: str, batch: tuple[int, ...]) -> None:
    """Raise `BatchError` unless a site's input has the leading axes (batch, pos)."""
    if len(batch) != 2:
        raise BatchError(
            f"site {site}: the {gamma.kind} γ needs inputs (batch, pos, d_in), but these have the leading axes {tuple(batch)}; "
            "use gamma.kind vector"
        )


def kind_class(kind: str) -> type[GammaKind]:
    """The class of a `gamma.kind`."""
    module, name = KINDS[kind].split(".")
    return getattr(import_module(f"{__package__}.{module}"), name)
