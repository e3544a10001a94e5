"""model.json: all that is needed to load a run. Its content is validated, and it does not depend on the fields of `Config`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch import Tensor

from paramlens.config.file import explain, make_config, read_tree, with_known_fields
from paramlens.config.model import Config
from paramlens.errors import RunDirError
from paramlens.fields import Count
from paramlens.files.plain import read_json
from paramlens.method.decomposition import Decomposition
from paramlens.method.importance.network import Importance
from paramlens.method.importance.settings import SIZES, Gamma, Kind
from paramlens.runs.layout import FORMAT

_REBUILT = ("seed", "batch", "last_token_only", "device", "dtype", "task")
"""Fields of the configuration from which the task is rebuilt."""


Size = Annotated[Count, Field(lt=2**24)]
"""One dimension of a weight matrix. Below 2^24, so that products of dimensions do not overflow."""


class _Checked(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", strict=False)


class SiteShape(_Checked):
    name: str
    d_in: Size
    d_out: Size
    d_seen: Size | None = None
    """Width of γ's input. None: d_in."""


class GammaShape(_Checked):
    kind: Kind
    d_gate: Size
    relative: Literal["offset", "query"]
    max_length: Size | None
    width: Size | None = None
    layers: Annotated[Count, Field(lt=2**10)] | None = None
    heads: Size | None = None
    """The transformer's sizes. None: another kind."""

    @model_validator(mode="after")
    def _is_a_network(self) -> "GammaShape":
        self.settings()
        return self

    def settings(self) -> Gamma:
        sizes = {name: value for name in SIZES if (value := getattr(self, name)) is not None}
        return Gamma(kind=self.kind, d_gate=self.d_gate, relative=self.relative, **sizes)


class TargetIdentity(_Checked):
    id: str
    revision: str | None = None
    sha256: str


class ModelDescription(_Checked):
    """The content of `model.json`."""

    format: Count
    C: Size
    """Number of subcomponents of every site at the start; merging leaves fewer."""
    delta: bool = False
    """Whether the remainder W - U V is a component."""
    dtype: Literal["float32", "float64"]
    sites: tuple[SiteShape, ...] = Field(min_length=1)
    gamma: GammaShape
    target: TargetIdentity
    config: dict[str, Any]
    """The fields of the run's configuration that are in `_REBUILT`."""

    def rebuilt(self) -> Config:
        """A configuration with the task and data of the run, without fields that this version does not know."""
        return make_config(with_known_fields(self.config), source="model.json", partial=True)

    def importance(self, C: Mapping[str, int] | None = None) -> Importance:
        """γ, without loaded values. C: number of subcomponents of each site. Defaults to None: as at the start."""
        shapes = {site.name: (site.d_seen or site.d_in, self.C if C is None else C[site.name]) for site in self.sites}
        return Importance(shapes, self.gamma.settings(), max_length=self.gamma.max_length).to(getattr(torch, self.dtype))

    def tensors(self, C: Mapping[str, int]) -> dict[str, dict[str, Tensor]]:
        """File stem → tensor name → a meta tensor, as in a checkpoint of this run with C subcomponents at each site."""
        kind = {"dtype": getattr(torch, self.dtype), "device": "meta"}
        components = {f"{site.name}.U": torch.empty(site.d_in, C[site.name], **kind) for site in self.sites}
        components |= {f"{site.name}.V": torch.empty(C[site.name], site.d_out, **kind) for site in self.sites}
        with torch.device("meta"):
            return {"components": components, "importance": self.importance(C).named_values()}


def describe(config: Config, decomposition: Decomposition, importance: Importance, target: dict[str, Any]) -> dict[str, Any]:
    """The content of `model.json`. target: id, revision and sha256."""
    gamma = importance.gamma
    sizes = {name: getattr(gamma, name) for name in SIZES} if importance.trunk is not None else {}
    return {
        "format": FORMAT,
        "C": max(decomposition.C.values()),
        "delta": decomposition.delta,
        "dtype": str(decomposition.U[decomposition.names[0]].dtype).removeprefix("torch."),
        "sites": [
            {"name": site.name, "d_in": site.d_in, "d_out": site.d_out} | ({"d_seen": site.d_seen} if site.d_seen != site.d_in else {})
            for site in decomposition.sites
        ],
        "gamma": {"kind": gamma.kind, "d_gate": gamma.d_gate, "relative": gamma.relative, "max_length": importance.max_length} | sizes,
        "target": target,
        "config": config.model_dump(mode="json", include=set(_REBUILT)),
    }


def require_known_format(path: Path) -> int:
    """The format of a run directory. Raises `RunDirError` if `model.json` has none, or one that is newer than `FORMAT`."""
    file = path / "model.json"
    version = read_json(file).get("format")
    if not isinstance(version, int) or version < 1:
        raise RunDirError(f"{file}: format {version!r}, a number was expected; restore the file from a copy")
    if version > FORMAT:
        raise RunDirError(f"{path}: written in format {version}, this version reads up to {FORMAT}; upgrade paramlens")
    return version


def read_description(path: Path) -> ModelDescription:
    """Read a run directory's `model.json`. Raises `RunDirError` for a newer format and for invalid content."""
    file = path / "model.json"
    version, document = require_known_format(path), read_json(file)
    if version == 1:  # the target was in run.json, and the task only in config.yaml
        tree = read_tree(path / "config.yaml")[1]
        document |= {"target": read_json(path / "run.json").get("target"), "config": {key: tree[key] for key in _REBUILT if key in tree}}
    try:
        return ModelDescription.model_validate(document)
    except ValidationError as error:
        raise RunDirError(f"{explain(error, source=str(file))}; restore the file from a copy") from None


def parameters(decomposition: Decomposition, importance: Importance) -> dict[str, Mapping[str, Tensor]]:
    """File stem → tensor name → view of U, V or γ, as in a checkpoint."""
    U, V = decomposition.U, decomposition.V
    return {
        "components": {f"{name}.U": U[name] for name in U} | {f"{name}.V": V[name] for name in V},
        "importance": importance.named_values(),
    }
