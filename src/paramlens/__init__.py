"""ParamLens takes a Transformer's weights apart into rank-1 subcomponents, shows which of them matter where, and edits them."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from paramlens.openmp import sleep_when_idle

__version__ = "0.1.0"

sleep_when_idle()

if TYPE_CHECKING:
    from paramlens.analysis.agreement import agreement
    from paramlens.analysis.circuit import circuit
    from paramlens.analysis.components import inspect_prompt, inspect_subcomponent
    from paramlens.analysis.edit import suppress
    from paramlens.analysis.effect import evaluate_edit
    from paramlens.analysis.svd import svd_baseline
    from paramlens.analysis.trace import trace
    from paramlens.configfile import load_config
    from paramlens.decomposition import Decomposition
    from paramlens.page import report
    from paramlens.rundir import Run, open_run
    from paramlens.runs import decompose, decompose_config
    from paramlens.sharing import push_to_hub
    from paramlens.shipped import example
    from paramlens.tasks import Batch
    from paramlens.verification import verify

_HOME = {
    "decompose": "paramlens.runs",
    "decompose_config": "paramlens.runs",
    "open_run": "paramlens.rundir",
    "load_config": "paramlens.configfile",
    "circuit": "paramlens.analysis.circuit",
    "svd_baseline": "paramlens.analysis.svd",
    "agreement": "paramlens.analysis.agreement",
    "suppress": "paramlens.analysis.edit",
    "evaluate_edit": "paramlens.analysis.effect",
    "trace": "paramlens.analysis.trace",
    "inspect_prompt": "paramlens.analysis.components",
    "inspect_subcomponent": "paramlens.analysis.components",
    "report": "paramlens.page",
    "example": "paramlens.shipped",
    "verify": "paramlens.verification",
    "push_to_hub": "paramlens.sharing",
    "Batch": "paramlens.tasks",
    "Decomposition": "paramlens.decomposition",
    "Run": "paramlens.rundir",
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
    """Import on first use, so that `import paramlens` needs no torch."""
    if name not in _HOME:
        raise AttributeError(f"module 'paramlens' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
