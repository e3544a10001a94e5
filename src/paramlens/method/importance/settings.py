"""γ's fields of a configuration, and the registry of γ kinds. Does not import torch."""

from typing import TYPE_CHECKING, Literal

from pydantic import model_validator

from paramlens.fields import Count, Number, Positive, Section

KINDS = {
    "scalar": "scalar.ScalarGamma",
    "vector": "vector.VectorGamma",
    "attention": "attention.AttentionGamma",
    "attention_shared": "attention_shared.AttentionSharedGamma",
    "shared": "shared.SharedGamma",
    "transformer": "transformer.TransformerGamma",
}
"""Value of `gamma.kind` → its module and class in this package. A new kind adds a line here."""

if TYPE_CHECKING:
    Kind = str
else:
    Kind = Literal[*KINDS]


class Gamma(Section):
    """The causal-importance network γ (§4.1, eq. 4, Algorithm 1)."""

    kind: Kind = "attention"
    """Input of each MLP: its inner activation (scalar), the site's input (vector), or that and all other positions (attention). shared and
    attention_shared: as vector and attention, with one MLP for all subcomponents of a site, so that γ's size hardly depends on C.
    transformer: one small transformer for all sites, which reads all their inputs at all positions."""
    d_gate: Count = 16
    """Hidden width of each MLP. Table 4: 16. Figure 6: 64."""
    max_length: Count | None = None
    """Number of positions in the attention γ's tables; a longer batch is an error. Defaults to the longest batch that is known before the
    run starts; further positions then share the tables' last entries."""
    relative: Literal["offset", "query"] = "offset"
    """r in eq. 4: one learned scalar per relative offset (offset), or the 2s x d table contracted with the query (query)."""
    relative_init: Literal["zero", "local"] = "zero"
    """First values of the scalars per offset: zero, or sqrt(d) (-0.7 min(|offset|, 8) plus noise), so that γ
    first attends to neighbours (local)."""
    relative_lr: Positive = 1.0
    """Factor on γ's learning rate for the relative encodings."""
    output_bias: Number = 0.0
    """First value of the last bias; with 1, every subcomponent starts fully on."""
    width: Count = 64
    """Width of the transformer γ; its MLPs have four times as many hidden units."""
    layers: Count = 2
    """Number of the transformer γ's blocks of attention and MLP."""
    heads: Count = 4
    """Number of attention heads in each block of the transformer γ; twice as many must divide `width`."""

    @model_validator(mode="after")
    def _local_is_per_offset(self) -> "Gamma":
        if self.relative == "query" and self.relative_init == "local":
            raise ValueError("relative_init local needs relative offset: a table contracted with the query has no value per offset")
        return self

    @model_validator(mode="after")
    def _transformer_has_its_sizes(self) -> "Gamma":
        given = {name: getattr(self, name) for name in SIZES if getattr(self, name) != Gamma.model_fields[name].default}
        if self.kind != "transformer" and given:
            names = ", ".join(f"{name} {value}" for name, value in given.items())
            raise ValueError(f"{names}: only for kind transformer, not {self.kind}; leave it out")
        if self.kind == "transformer" and self.width % (2 * self.heads):
            raise ValueError(
                f"width {self.width} must be a multiple of {2 * self.heads}, twice heads {self.heads}: "
                "rotary position encodings turn pairs of numbers"
            )
        return self


SIZES = ("width", "layers", "heads")
"""The fields of `Gamma` that are of the transformer alone."""
