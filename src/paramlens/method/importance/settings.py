"""γ's fields of a configuration, and the registry of its kinds. Needs no torch."""

from typing import TYPE_CHECKING, Literal

from pydantic import model_validator

from paramlens.fields import Count, Number, Positive, Section

KINDS = {
    "scalar": "scalar.ScalarGamma",
    "vector": "vector.VectorGamma",
    "attention": "attention.AttentionGamma",
    "shared": "shared.SharedGamma",
}
"""Values of `gamma.kind`, and the module and class of each in this package. A new kind adds a line here."""

if TYPE_CHECKING:
    Kind = str
else:
    Kind = Literal[*KINDS]


class Gamma(Section):
    """The causal-importance network γ (§4.1, eq. 4, Algorithm 1)."""

    kind: Kind = "attention"
    """What γ sees: one inner activation, the site's input, that and all other positions, or one network for a whole site."""
    d_gate: Count = 16
    """Hidden width of each MLP, d_gate. Table 4: 16. Figure 6: 64."""
    max_length: Count | None = None
    """Positions that the attention γ's tables hold; a longer batch is then refused. Defaults to the longest batch that is known before the
    run starts; further positions share the tables' last entries."""
    relative: Literal["offset", "query"] = "offset"
    """r in eq. 4: one learned scalar per relative offset, or the 2s x d table contracted with the query."""
    relative_init: Literal["zero", "local"] = "zero"
    """Start of the per-offset scalars: zero, or -0.7 |offset| (to 8 and beyond) plus noise, so that neighbours are seen first."""
    relative_lr: Positive = 1.0
    """Factor on γ's learning rate for the relative encodings."""
    output_bias: Number = 0.0
    """Start of the last bias; 1 starts with every subcomponent on."""

    @model_validator(mode="after")
    def _local_is_per_offset(self) -> "Gamma":
        if self.relative == "query" and self.relative_init == "local":
            raise ValueError("relative_init local needs relative offset: a table contracted with the query has no value per offset")
        return self
