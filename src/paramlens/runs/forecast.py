"""What a configuration will need, found out from its target's shape alone: nothing is trained, loaded or drawn."""

import math
from dataclasses import replace

import psutil
import torch

from paramlens.config.model import Config
from paramlens.errors import ConfigError
from paramlens.kernels import native
from paramlens.kernels.resources import free_memory
from paramlens.method.sites import Site, find_sites
from paramlens.runs import targets
from paramlens.runs.budget import COMPILED, Diagnosis, Footprint, diagnose, footprint, require_memory, size_text
from paramlens.tasks.settings import FactsTask, InductionTask

POSITIONS = 64
"""Most tokens of a sentence that the small GPT-2 is trained on."""


def forecast(config: Config) -> tuple[tuple[Site, ...], Footprint, int]:
    """The sites of a configuration, the size of its batches, and the bytes of its target. Raises `ConfigError` and `SiteError`."""
    model, length, vocabulary = targets.skeleton(config)
    sites, task = find_sites(model, config.sites), config.task
    rows = len(task.sentences) + task.others if isinstance(task, FactsTask) else config.batch
    ids = torch.empty(1, length, dtype=torch.long, device="meta")
    last = isinstance(task, InductionTask) and config.last_token_only
    mask = torch.empty(1, 1, length, length, dtype=torch.bool, device="meta")  # given whole, no value of it is looked at
    inputs = ids if isinstance(task, InductionTask) else {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    size = footprint(model, sites, inputs, last=last) or Footprint(1, length, vocabulary, last=last)
    word = torch.finfo(getattr(torch, config.dtype)).bits // 8
    numbers = {id(value): value.numel() for value in [*model.parameters(), *model.buffers()]}
    return tuple(sites), replace(size, rows=rows), sum(numbers.values()) * word


def foretell(config: Config) -> Diagnosis:
    """Parameters and memory of a run, the target and the libraries included."""
    sites, size, target = forecast(config)
    libraries = psutil.Process().memory_info().rss + COMPILED * native.serves(torch.empty(0))
    return diagnose(config, sites, size, target=target, libraries=libraries if config.device == "cpu" else 0)


def require_room(config: Config) -> None:
    """Raise `ConfigError`, `SiteError` if a run of this configuration cannot be, before anything is made for it."""
    sites, size, target = forecast(config)
    require_memory(config, sites, size, target=target)


def require_training_room(config: Config) -> None:
    """Raise `ConfigError` if the batches on which a toy target is trained cannot fit into memory."""
    task = config.task
    if isinstance(task, InductionTask):
        field, batch, length = "task.training.batch", task.training.batch, task.length
        numbers = 3 * (task.vocabulary + 1) + task.blocks * (6 * task.width + 2 * task.heads * length)
    else:
        assert isinstance(task, FactsTask)
        small = task.miniature
        field, batch, length = "task.miniature.batch", small.batch, POSITIONS
        numbers = 3 * small.vocabulary + small.blocks * (20 * small.width + 2 * small.heads * length)
    needed, free = 4 * batch * length * numbers, free_memory(config.device)
    if free is not None and needed > free:
        fitting = 2 ** math.floor(math.log2(max(1, batch * free // needed)))
        raise ConfigError(
            f"{field} {batch}: training the target needs {size_text(needed)} of memory on {config.device}, {size_text(free)} are free; "
            f"give {fitting} or less"
        )
