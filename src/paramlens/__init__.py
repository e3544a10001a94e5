"""ParamLens takes a Transformer's weights apart into rank-1 subcomponents, shows which of them matter where, and edits them."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from paramlens.kernels.openmp import sleep_when_idle
from paramlens.version import __version__

sleep_when_idle()

if TYPE_CHECKING:
    from paramlens.analysis.agreement import agreement
    from paramlens.analysis.circuit import circuit
    from paramlens.analysis.components import inspect_prompt, inspect_subcomponent
    from paramlens.analysis.edit import suppress
    from paramlens.analysis.effect import evaluate_edit
    from paramlens.analysis.trace import trace
    from paramlens.baselines.svd import svd_baseline
    from paramlens.config.file import load_config
    from paramlens.method.batch import Batch
    from paramlens.method.decomposition import Decomposition
    from paramlens.page import report
    from paramlens.runs.decompose import decompose, decompose_config
    from paramlens.runs.rundir import Run, open_run
    from paramlens.runs.sharing import push_to_hub
    from paramlens.runs.shipped import example
    from paramlens.runs.verification import verify

_HOME = {
    "decompose": "paramlens.runs.decompose",
    "decompose_config": "paramlens.runs.decompose",
    "open_run": "paramlens.runs.rundir",
    "load_config": "paramlens.config.file",
    "circuit": "paramlens.analysis.circuit",
    "svd_baseline": "paramlens.baselines.svd",
    "agreement": "paramlens.analysis.agreement",
    "suppress": "paramlens.analysis.edit",
    "evaluate_edit": "paramlens.analysis.effect",
    "trace": "paramlens.analysis.trace",
    "inspect_prompt": "paramlens.analysis.components",
    "inspect_subcomponent": "paramlens.analysis.components",
    "report": "paramlens.page",
    "example": "paramlens.runs.shipped",
    "verify": "paramlens.runs.verification",
    "push_to_hub": "paramlens.runs.sharing",
    "Batch": "paramlens.method.batch",
    "Decomposition": "paramlens.method.decomposition",
    "Run": "paramlens.runs.rundir",
}

__all__ = [
    "Batch",
    "Decomposition",
    "Run",
    "__version__",
    "agreement",
    "circuit",
    "decompose",
    "decompose_config",
    "evaluate_edit",
    "example",
    "inspect_prompt",
    "inspect_subcomponent",
    "load_config",
    "open_run",
    "push_to_hub",
    "report",
    "suppress",
    "svd_baseline",
    "trace",
    "verify",
]


def __getattr__(name: str) -> Any:
    """Import a name on first use, so that `import paramlens` does not load torch."""
    if name not in _HOME:
        raise AttributeError(f"module 'paramlens' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
