"""γ of every site. Sites of one shape form a group, which is computed in one batched product."""

from collections.abc import Mapping
from typing import cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from paramlens.errors import BatchError, ConfigError
from paramlens.method.importance.kind import Declared, GammaKind, kind_class
from paramlens.method.importance.settings import Gamma


class Importance(nn.Module):
    """The networks γ of all sites; a call gives pre-activations, of which `sigmoids.lower` makes the importances g.

    shapes: site name → (d_in, C), in model order.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, int]], gamma: Gamma, *, max_length: int | None = None) -> None:
        super().__init__()
        self.gamma, self.kind, self.max_length = gamma, kind_class(gamma.kind), gamma.max_length or max_length
        if self.kind.has_table and self.max_length is None:
            raise ConfigError(f"gamma.max_length: the {gamma.kind} γ needs the longest sequence it will see, in tokens; give a number")
        groups: dict[tuple[int, int], list[str]] = {}
        for name, shape in shapes.items():
            groups.setdefault(shape, []).append(name)
        self.groups = nn.ModuleList(
            self.kind(names, gamma, d_in=d_in, C=C, max_length=self.max_length) for (d_in, C), names in groups.items()
        )
        trunk = self.kind.trunk
        self.trunk = None if trunk is None else trunk({name: d_in for name, (d_in, _) in shapes.items()}, gamma)

    @property
    def typed_groups(self) -> list[GammaKind]:
        return cast("list[GammaKind]", list(self.groups))

    @property
    def declared(self) -> list[Declared]:
        """Every module that has parameters."""
        return [*self.typed_groups, *([] if self.trunk is None else [self.trunk])]

    def initialise(self, generator: torch.Generator) -> None:
        """Set fan-in normal weights and zero biases (the last bias: `gamma.output_bias`)."""
        for module in self.declared:
            module.initialise(generator)

    @property
    def table_length(self) -> int | None:
        """Number of positions in γ's tables; further positions share the last entries. None: a kind without tables."""
        return self.max_length if self.kind.has_table else None

    def forward(
        self, inputs: Mapping[str, Tensor], U: Mapping[str, Tensor], present: Bool[Tensor, "batch pos"] | None = None
    ) -> dict[str, Float[Tensor, "*batch C"]]:
        """Site → pre-activations, from the target's site inputs [batch, pos, d_in].

        Only the scalar γ uses U, because its input is the inner activation. At positions that are not `present` (defaults to all)
        pre-activations are 0, so nothing there is important or has a cost, and no other position attends to them.
        Raises `BatchError` for a sequence longer than `gamma.max_length`, if that was given, and for inputs that do not match `present`.
        """
        if present is not None:
            self._require_padded(inputs, present)
        seen = inputs if self.trunk is None else dict.fromkeys(inputs, self.trunk(inputs, present))
        pre: dict[str, Tensor] = {}
        for group in self.typed_groups:
            rows = group([seen[name] for name in group.names], [U[name] for name in group.names], present)
            for name, of_site in zip(group.names, rows, strict=True):
                pre[name] = of_site.unflatten(0, inputs[name].shape[:-1])
        if present is None:
            return {name: pre[name] for name in inputs}
        return {name: pre[name].masked_fill(~present[..., None], 0) for name in inputs}

    def _require_padded(self, inputs: Mapping[str, Tensor], present: Bool[Tensor, "batch pos"]) -> None:
        for name, value in inputs.items():
            if value.shape[:-1] != present.shape:
                raise BatchError(
                    f"site {name}: its input has the leading axes {tuple(value.shape[:-1])}, the padding mask {tuple(present.shape)}; "
                    "leave the site out, or give batches without padding"
                )

    def site_parameters(self) -> dict[str, dict[str, Tensor]]:
        """Site name → parameter name → that site's values, as a view."""
        return {
            name: {key: parameter[i] for key, parameter in group.named_parameters()}
            for group in self.typed_groups
            for i, name in enumerate(group.names)
        }

    def named_values(self) -> dict[str, Tensor]:
        """Name in `importance.safetensors` → values, as a view: `<site>.<parameter>`, and `.trunk.<parameter>` for what all sites share.

        No site's name begins with a dot, as a module's name is not empty.
        """
        named = {f"{site}.{key}": value for site, parts in self.site_parameters().items() for key, value in parts.items()}
        return named if self.trunk is None else named | {f".trunk.{key}": value for key, value in self.trunk.named_parameters()}

    def by_lr_factor(self) -> dict[float | None, list[nn.Parameter]]:
        """Parameters by their factor on γ's learning rate. None: γ's own rate."""
        found: dict[float | None, list[nn.Parameter]] = {}
        for module in self.declared:
            for name, parameter in module.named_parameters():
                found.setdefault(module.declared[name].lr_factor, []).append(parameter)
        return found
