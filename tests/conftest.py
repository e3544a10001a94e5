"""Shared fixtures. Importing the library under the jaxtyping hook checks every shape annotation while the tests run."""

from jaxtyping import install_import_hook

SHAPED = (
    "sites",
    "decomposition",
    "importance",
    "mlps",
    "masks",
    "losses",
    "evaluation",
    "rundir",
    "step",
    "train",
    "tasks.induction",
    "analysis",
)
install_import_hook([f"paramlens.{name}" for name in SHAPED], "beartype.beartype")

import pytest  # noqa: E402
import torch  # noqa: E402

from paramlens.config import Config  # noqa: E402
from paramlens.configfile import load_config, make_config  # noqa: E402
from paramlens.rundir import Run  # noqa: E402
from paramlens.runs import decompose_config  # noqa: E402
from paramlens.tasks.induction import InductionTransformer  # noqa: E402

torch.set_num_threads(1)

TINY = {
    "name": "tiny",
    "steps": 12,
    "batch": 4,
    "C": 5,
    "threads": 1,
    "sites": ["blocks.*.attn.[qkv]"],
    "last_token_only": True,
    "task": {
        "kind": "induction",
        "vocabulary": 6,
        "length": 8,
        "width": 4,
        "training": {"steps": 20, "batch": 8, "lr": 0.01, "warmup": 0, "check_every": 10},
    },
    "gamma": {"kind": "attention", "d_gate": 3},
    "init": {"kind": "svd"},
    "checkpoint": {"every": 4, "keep_last": 2},
    "evaluate": {"every": 6, "batches": 1},
    "log_every": 3,
}


@pytest.fixture
def tiny() -> Config:
    return make_config(TINY)


def tiny_with(**changes: object) -> Config:
    """The tiny configuration with top-level fields replaced."""
    return make_config(TINY | changes)


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished run of the tiny configuration; read only."""
    return decompose_config(make_config(TINY), out=tmp_path_factory.mktemp("runs") / "tiny")


@pytest.fixture
def target() -> InductionTransformer:
    """An untrained induction target at a small size."""
    torch.manual_seed(0)
    return InductionTransformer(make_config(TINY).task)


@pytest.fixture(scope="session")
def quick() -> Config:
    return load_config("induction-quick")
