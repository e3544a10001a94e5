"""Estimate what a run will need from the shape of its target alone, without training it, loading weights or sampling batches."""

import math
from dataclasses import replace

import psutil
import torch

from paramlens.config.model import Config
from paramlens.errors import ConfigError
from paramlens.kernels import native
from paramlens.kernels.resources import free_memory
from paramlens.method.sites import Site, find_sites
from paramlens.runs.budget import COMPILED, Diagnosis, Footprint, diagnose, footprint, require_memory, size_text


def forecast(config: Config) -> tuple[tuple[Site, ...], Footprint, int]:
    """The sites of a configuration, the size of its batches, and the bytes of its target. Raises `ConfigError` and `SiteError`."""
    target = config.task.skeleton(batch=config.batch)
    sites, last = find_sites(target.model, config.sites), target.last_token and config.last_token_only
    size = footprint(target.model, sites, target.inputs, last=last) or Footprint(1, target.length, target.vocabulary, last=last)
    word = torch.finfo(getattr(torch, config.dtype)).bits // 8
    numbers = {id(value): value.numel() for value in [*target.model.parameters(), *target.model.buffers()]}
    return tuple(sites), replace(size, rows=target.rows), sum(numbers.values()) * word


def diagnose_config(config: Config) -> Diagnosis:
    """Parameters and memory of a run, with the target and the libraries."""
    sites, size, target = forecast(config)
    libraries = psutil.Process().memory_info().rss + COMPILED * native.serves(torch.empty(0))
    return diagnose(config, sites, size, target=target, libraries=libraries if config.device == "cpu" else 0)


def require_room(config: Config) -> None:
    """Raise `ConfigError` or `SiteError` if a run of this configuration is impossible, before anything is made for it."""
    sites, size, target = forecast(config)
    require_memory(config, sites, size, target=target)


def require_training_room(config: Config) -> None:
    """Raise `ConfigError` if the training batches of a toy target do not fit into memory."""
    plan, free = config.task.training_plan(), free_memory(config.device)
    if free is not None and plan.bytes > free:
        fitting = 2 ** math.floor(math.log2(max(1, plan.batch * free // plan.bytes)))
        raise ConfigError(
            f"{plan.batch_field} {plan.batch}: training the target needs {size_text(plan.bytes)} of memory on {config.device}, "
            f"{size_text(free)} are free; give {fitting} or less"
        )
