"""Shared fixtures. Importing the library under the jaxtyping hook checks every shape annotation while the tests run."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from jaxtyping import config, install_import_hook

import audit
import paramlens  # noqa: F401  # before torch, whose idle threads are to sleep

SHAPED = (
    "kernels.mlps",
    "files.tensorfile",
    "method",
    *(
        *("tasks.induction.model", "tasks.induction.sequences", "tasks.induction.training"),
        *("tasks.facts.facts", "tasks.facts.sentences", "tasks.facts.miniature", "tasks.text.pieces"),
        *("tasks.language_models.encoding", "tasks.language_models.limits", "tasks.language_models.loading", "tasks.reading"),
    ),
    *("runs.rundir", "runs.writer", "runs.integrity", "runs.resume"),
    *("runs.description", "runs.checkpoint", "runs.randomness", "runs.train", "runs.budget"),
    "analysis",
    "baselines.svd",
)
"""Whose shape annotations are checked."""

CHECKED = (
    *("test_batches", "test_decomposition", "test_importance", "test_interventions", "test_masks_and_losses", "test_native"),
    *("test_reference", "test_remainder", "test_sites", "test_step", "test_tokens"),
)
"""Tests in which shapes are checked, which takes a third of their time. The others pass through the same functions."""

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the commands that tests start, too
install_import_hook([f"paramlens.{name}" for name in SHAPED], "beartype.beartype")

import pytest  # noqa: E402
import torch  # noqa: E402

from paramlens.config.file import load_config, make_config  # noqa: E402
from paramlens.config.model import Config  # noqa: E402
from paramlens.runs.decompose import decompose_config  # noqa: E402
from paramlens.runs.rundir import Run  # noqa: E402
from paramlens.tasks.induction.model import InductionTransformer  # noqa: E402

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background, and then inherited


def until(condition: Callable[[], bool], *alive: subprocess.Popen[str]) -> None:
    """Wait for what other processes do, however long it takes; fails if one of `alive` ends. The suite's own limit ends a hang."""
    while not condition():
        for process in alive:
            assert process.poll() is None, f"ended with exit code {process.returncode}"
        time.sleep(0.02)


@pytest.fixture(scope="module", autouse=True)
def shapes(request: pytest.FixtureRequest) -> Iterator[None]:
    """Shapes are checked in the modules of `CHECKED`."""
    config.update("jaxtyping_disable", request.path.stem not in CHECKED)
    yield
    config.update("jaxtyping_disable", False)


LONGEST = ("test_page", "test_seeds", "test_cli", "test_trackers", "test_page_inputs", "test_notebooks", "test_bench", "test_faults")
"""Files of tests that take longest, which start first, so that no worker is left alone with one at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


@pytest.fixture(scope="session", autouse=True)
def no_pickle() -> Iterator[None]:
    """Over the whole suite nothing is unpickled, and no file that was written is a pickle, bare or in torch.save's archive."""
    yield
    assert audit.PICKLES_READ == []
    for name in audit.WRITTEN - audit.PLANTED:
        if Path(name).is_file():
            start = Path(name).read_bytes()[:9]
            safetensors = start[4:] == b"\0\0\0\0{"  # after its header's length, whose first bytes can be any
            assert safetensors or not (start[:1] == b"\x80" and start[1:2] in b"\x02\x03\x04\x05"), f"{name} is a pickle"
            assert start[:4] != b"PK\x03\x04", f"{name} is an archive of torch.save"


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


TINY_FACTS = {
    "name": "tiny-facts",
    "steps": 6,
    "batch": 2,
    "C": 16,
    "threads": 1,
    "sites": ["transformer.h.*.attn.c_*", "transformer.h.*.mlp.c_*"],
    "task": {"kind": "facts", "miniature": {"blocks": 2, "width": 16, "heads": 2, "steps": 4, "batch": 8, "check_every": 2}},
    "gamma": {"kind": "vector", "d_gate": 2, "output_bias": 0.5},
    "init": {"kind": "svd_rotated"},
    "losses": {"recon": 1.0, "recon_partial": 1.0, "stochastic_recon_partial": 1.0, "faithfulness": 10.0, "minimality": 0.01},
    "optim": {"name": "adamw", "lr": 0.02, "weight_decay": 0.01},
    "evaluate": {"every": 3, "batches": 1},
    "log_every": 3,
}


@pytest.fixture(scope="session")
def facts_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished run on a tiny GPT-2 trained for a few steps; read only."""
    return decompose_config(make_config(TINY_FACTS), out=tmp_path_factory.mktemp("runs") / "facts")


@pytest.fixture
def target() -> InductionTransformer:
    """An untrained induction target at a small size."""
    torch.manual_seed(0)
    return InductionTransformer(make_config(TINY).task)


@pytest.fixture(scope="session")
def quick() -> Config:
    return load_config("induction-quick")
