"""DDP and FSDP2 can wrap a decomposition: its forward is the masked run."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from paramlens.kernels import native
from paramlens.method.decomposition import Decomposition
from paramlens.method.losses.divergence import kl_divergence
from paramlens.method.masks import Replacement
from paramlens.method.sites import find_sites
from rounding import TOY_STEP, assert_near

WRAPPERS = {"DDP": DistributedDataParallel, "FSDP2": fully_shard}


@pytest.fixture
def one_process(tmp_path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def gradients(decomposition: Decomposition, masked_run: nn.Module) -> list[torch.Tensor]:
    """Of U, V and g, after two passes of two plans, each with a backward pass of its own."""
    x = torch.linspace(-1, 1, 56).view(2, 7, 4)
    g = {name: torch.linspace(0, 1, 42).view(2, 7, 3).requires_grad_() for name in decomposition.names}
    target = decomposition.target_run(x)
    plans = [{name: Replacement(value, 5) for name, value in g.items()}, {"0": Replacement(g["0"])}]
    for _ in range(2):
        kl_divergence(target.logits.log_softmax(-1), masked_run(x, plans, target)).sum().backward()
    found = [each.grad for each in (*decomposition.parameters(), *g.values())]
    return [each.full_tensor() if isinstance(each, DTensor) else each for each in found]


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view tensor")
@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_a_wrapped_decomposition_has_the_same_gradients(one_process, wrap):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5)).requires_grad_(False)
    plain, wrapped = (Decomposition(model, find_sites(model, ["*"]), C=3) for _ in range(2))
    with torch.no_grad():
        for a, b in zip(plain.parameters(), wrapped.parameters(), strict=True):
            b.copy_(a.copy_(torch.randn(a.shape)))
    masked_run = wrap(wrapped)
    for mine, other in zip(gradients(wrapped, masked_run), gradients(plain, plain), strict=True):
        assert_near(mine, other, TOY_STEP)


def test_compiled_kernels_leave_sharded_tensors_alone(one_process):
    """A kernel reads memory by its address, and a shard's is not the tensor's."""
    sharded = fully_shard(nn.Linear(3, 2))
    assert not native.serves(sharded.weight)
