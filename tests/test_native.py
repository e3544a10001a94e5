"""The compiled loops against PyTorch's own functions, their behaviour at what is not finite, and on any number of threads."""

import inspect
import math
import re
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from conftest import tiny_with
from paramlens.kernels import native
from paramlens.kernels.mlps import Mlps, ScalarMlps
from paramlens.kernels.openmp import library
from paramlens.method.generators import generator
from paramlens.method.importance.sigmoids import lower, upper
from paramlens.method.losses.divergence import kl_divergence
from paramlens.method.losses.minimality import minimality
from paramlens.method.masks import Replacement, mask_noise, masked_linear
from paramlens.runs.decompose import decompose_config
from rounding import TOY, assert_near, bound, near

pytestmark = pytest.mark.skipif(not native.serves(torch.ones(1)), reason="Numba is not installed")


def numbers(*shape: int, key: str = "x", scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(shape, generator=generator("native", key))


@pytest.fixture
def twin(monkeypatch: pytest.MonkeyPatch):
    """A function that runs another one in plain PyTorch."""

    def run(function):
        with monkeypatch.context() as patch:
            patch.setattr(native, "serves", lambda *_: False)
            return function()

    return run


def leaves(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [tensor.clone().requires_grad_() for tensor in tensors]


def value_and_gradients(function, *tensors: torch.Tensor) -> list[torch.Tensor]:
    inputs = leaves(*tensors)
    out = function(*inputs)
    slope = numbers(*out.shape, key="slope")
    return [out.detach(), *torch.autograd.grad((slope * out).sum(), inputs)]


FUNCTIONS = {
    "mlps": (Mlps.apply, [(2, 70, 5), (2, 7, 5, 3), (2, 7, 3), (2, 7, 3), (2, 7)]),
    "scalar mlps": (ScalarMlps.apply, [(2, 70, 7), (2, 7, 3), (2, 7, 3), (2, 7, 3), (2, 7)]),
    "lower": (lower, [(5, 3000)]),
    "minimality": (lambda pre: minimality({"site": pre}, p=0.9, eps=1e-12), [(5, 3000)]),
    "divergence": (lambda logits: kl_divergence(numbers(4, 6, 129, key="p").log_softmax(-1), logits), [(3, 4, 6, 129)]),
    "masked product": (
        lambda x, U, V, g, h: masked_linear(x, U, V, [Replacement(g), Replacement(h), Replacement(g)], None),
        [(12, 50, 6), (6, 9), (9, 5), (4, 50, 9), (4, 50, 9)],
    ),
    "masked product and remainder": (
        lambda x, U, V, g, h, m, n: masked_linear(
            x, U, V, [Replacement(g, remainder=m), Replacement(h), Replacement(g, remainder=n)], None
        ),
        [(12, 50, 6), (6, 9), (9, 5), (4, 50, 9), (4, 50, 9), (4, 50), (4, 50)],
    ),
}


TERMS = 150 + 32
"""The longest sum of `FUNCTIONS`: over 3 plans of 50 rows, or 129 tokens; and what is done to each term before."""


@pytest.mark.parametrize("name", FUNCTIONS)
def test_equals_its_twin(name: str, twin):
    function, shapes = FUNCTIONS[name]
    tensors = [numbers(*shape, key=f"{name} {i}") for i, shape in enumerate(shapes)]
    ours = value_and_gradients(function, *tensors)
    theirs = twin(lambda: value_and_gradients(function, *tensors))
    for mine, other in zip(ours, theirs, strict=True):
        assert_near(mine, other, TERMS)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_threads_do_not_change_a_bit(name: str):
    """Units are shared out, never split; only PyTorch's own products and sums may round otherwise, and not at these sizes."""
    function, shapes = FUNCTIONS[name]
    tensors = [numbers(*shape, key=f"{name} {i}") for i, shape in enumerate(shapes)]
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(value_and_gradients(function, *tensors))
    finally:
        torch.set_num_threads(before)
    for one, two in zip(*results, strict=True):
        assert_near(one, two, TERMS)


def gelu_by_one_mlp(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """GELU and its derivative, read out of a scalar MLP with one hidden unit and unit weights."""
    inner = x[None, :, None].clone().requires_grad_()
    one = torch.ones(1, 1, 1)
    out = ScalarMlps.apply(inner, one, torch.zeros(1, 1, 1), one, torch.zeros(1, 1))
    (slope,) = torch.autograd.grad(out.sum(), inner)
    return out.detach().flatten(), slope.flatten()


def test_exact_gelu_to_single_precision():
    x = torch.linspace(-12, 12, 20_001)
    value, slope = gelu_by_one_mlp(x)
    exact = x.double().requires_grad_()
    gelu = F.gelu(exact)
    (exact_slope,) = torch.autograd.grad(gelu.sum(), exact)
    assert ((value - gelu).abs() / x.abs().clamp(min=1)).max() < bound(2, 1)
    assert (slope - exact_slope).abs().max() < bound(4, 1.2)  # the largest slope; Φ from the density, to 1e-7, and two terms
    value, slope = gelu_by_one_mlp(torch.tensor([-1e4, -40.0, 40.0, 1e4]))
    assert value.tolist() == [0, 0, 40, 1e4]
    assert slope.tolist() == near([0, 0, 1, 1], 2)


@pytest.mark.parametrize("p", [0.9, 0.5, 0.1])
def test_power_over_all_importances(p: float):
    pre = torch.logspace(-30, 1, 4097)
    ours = torch.stack([minimality({"site": value[None]}, p=p, eps=1e-12) for value in pre[:, None]])
    exact = (upper(pre.double()) + 1e-12).pow(p) - 1e-12**p
    logarithm = abs(math.log(1e-12))  # its rounding is the power's: x^p = exp(p log x)
    assert ((ours - exact).abs() / (exact + 1e-12**p)).max() < bound(2, p * logarithm) + bound(4, 1)


def test_minimality_of_many_blocks_is_one_sum():
    pre = numbers(3 * native.loop_compiler().loops.BLOCK // 8 + 5, 8, key="blocks")
    ours = minimality({"site": pre}, p=0.5, eps=1e-12)
    assert ours.item() == near(
        ((upper(pre.double()) + 1e-12).sqrt() - 1e-6).sum(-1).mean().item(), native.loop_compiler().loops.BLOCK // 16 + 64
    )


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", [name for name in FUNCTIONS if name != "lower"])
def test_what_is_not_finite_stays_so(name: str, bad: float):
    """A broken number anywhere shows in the result or in a gradient, as it does in PyTorch."""
    function, shapes = FUNCTIONS[name]
    for broken in range(len(shapes)):
        tensors = [numbers(*shape, key=f"{name} {i}") for i, shape in enumerate(shapes)]
        if name == "minimality" and bad == -math.inf:
            continue  # an importance of 0
        tensors[broken].view(-1)[tensors[broken].numel() // 2] = bad
        assert not all(value.isfinite().all() for value in value_and_gradients(function, *tensors))


def test_masks_draw_their_noise_in_place():
    """What the compiled product multiplies by is g + (1 - g) u with the noise that `mask_noise` tells, chunk after chunk."""
    x, U, V, g = numbers(3, 700, 4), torch.eye(4), torch.eye(4), torch.rand(3, 700, 4, generator=generator("g"))
    out = masked_linear(x, U, V, [Replacement(g, key=77)], None)
    assert_near(out, x * (g + (1 - g) * mask_noise(77, g)), 8)
    m = torch.rand(3, 700, generator=generator("m"))
    out = masked_linear(x, U, V, [Replacement(g, key=77, remainder=m)], None)
    assert_near(out, x * (g + (1 - g) * mask_noise(77, g) - m[..., None]), 8)


def test_machine_code_is_kept_for_later_processes(tmp_path, monkeypatch):
    """In a folder that can be written; without one the loops are compiled each time."""
    compiled = partial(native.loop_compiler().compiled, "uniform", library())
    monkeypatch.setattr("numba.config.CACHE_DIR", str(tmp_path / "cache"))
    assert [compiled().cache_hits, compiled().cache_hits] == [0, 1]

    cfunc = native.loop_compiler().cfunc

    def unwritable(*arguments: object, cache: bool = False, **options: object) -> object:
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return cfunc(*arguments, **options)

    monkeypatch.setattr(native.loop_compiler(), "cfunc", unwritable)
    assert compiled().cache_hits == 0


KERNELS = {kernel.name: kernel for kernel in vars(native).values() if isinstance(kernel, native._Kernel)}


def arguments(kernel: native._Kernel, **changed) -> list:
    """Valid ones by the kernel's own types, those of a kind replaced."""
    valid = {"t": torch.ones(6), "i": 3, "f": 2.0} | changed
    return [valid[kind] for kind in kernel.types]


@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_is_told_what_its_body_reads(name: str):
    """The body's own subscripts say how it reads each argument; the types it is packed by are these."""
    body = inspect.getsource(getattr(native.loop_compiler().loops, name))
    read = dict.fromkeys(map(int, re.findall(r"\bd\[(\d+)\]", body)), "i")
    read |= dict.fromkeys(map(int, re.findall(r"floats\(d\[(\d+)\]", body)), "t")
    read |= dict.fromkeys(map(int, re.findall(r"\breals\[(\d+)\]", body)), "f")
    read.pop(0, None)  # the units
    assert "".join(read[i] for i in sorted(read)) == KERNELS[name].types
    assert sorted(read) == list(range(1, len(KERNELS[name].types) + 1))


@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_converts_numbers_or_refuses_them(name: str):
    kernel = KERNELS[name]
    expected = list(kernel.packed(2, *arguments(kernel, t=(tensor := torch.ones(6)))))
    for number in (2, np.float32(2), np.int64(2), torch.tensor(2.0), torch.tensor(2)):
        assert list(kernel.packed(2, *arguments(kernel, t=tensor, f=number))) == expected
    for number in (np.int32(3), torch.tensor(3)):
        assert list(kernel.packed(2, *arguments(kernel, t=tensor, i=number))) == expected
    refused = [{"t": bad} for bad in (torch.ones(6).double(), torch.ones(2, 6).T, torch.ones(1, device="meta"), 2.0, None)]
    refused += [{"i": 3.0}, {"i": None}] + ([{"f": "2"}, {"f": torch.ones(2)}, {"f": None}] if "f" in kernel.types else [])
    for changed in refused:
        with pytest.raises(TypeError, match=f"kernel {name}: "):
            kernel.packed(2, *arguments(kernel, **changed))
    with pytest.raises(TypeError, match="arguments"):
        kernel.packed(2)


OUTSIDE = """
import numpy as np, torch
from paramlens.method.losses.minimality import minimality

for p in (1.0, 1, np.float32(1), np.int64(1), torch.tensor(1), torch.tensor(1.0)):
    for eps in (0.0, 0, np.float64(0), torch.tensor(0)):
        pre = torch.tensor([[0.25, 0.5, -1.0]]).requires_grad_()
        value = minimality({"site": pre}, p=p, eps=eps)
        value.backward()
        print(round(value.item(), 5), [round(slope, 5) for slope in pre.grad[0].tolist()])
"""


@pytest.mark.slow
def test_a_power_may_be_any_number():
    """At p = 1 minimality is the sum of the importances: an int is not taken for the bits of a float, where no types are checked."""
    found = subprocess.run([sys.executable, "-c", OUTSIDE], capture_output=True, text=True, check=True).stdout.splitlines()
    assert found == ["0.75 [1.0, 1.0, 0.0]"] * 24


@pytest.mark.parametrize("name", FUNCTIONS)
def test_strides_do_not_matter(name: str):
    """Every input as a transposed view of memory that holds it the other way round."""
    function, shapes = FUNCTIONS[name]
    tensors = [numbers(*shape, key=f"{name} {i}") for i, shape in enumerate(shapes)]
    strided = [tensor.mT.contiguous().mT for tensor in tensors]
    slope = numbers(*function(*tensors).shape, key="slope")
    results = []
    for given, above in ((tensors, slope), (strided, slope.mT.contiguous().mT if slope.dim() > 1 else slope)):
        inputs = [tensor.detach().requires_grad_() for tensor in given]
        out = function(*inputs)
        results.append([out, *torch.autograd.grad(out, inputs, above)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_divergence_from_a_target_of_another_form(dtype: torch.dtype):
    """A target whose memory is transposed, or whose numbers are of another precision."""
    target, logits = numbers(4, 6, 9, key="p").log_softmax(-1), numbers(3, 4, 6, 9, key="q").requires_grad_()
    given = target.to(dtype).mT.contiguous().mT
    results = [(value := kl_divergence(each, logits).sum(), torch.autograd.grad(value, logits)[0]) for each in (target, given)]
    torch.testing.assert_close(results[0][0], results[1][0].float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-5, atol=1e-6)


def test_other_types_are_left_to_pytorch():
    assert not native.serves(torch.ones(1, dtype=torch.float64))
    assert not native.serves(torch.ones(1), torch.ones(1, device="meta"))


def test_whole_run_without_numba_is_the_same_within_rounding(tmp_path, monkeypatch: pytest.MonkeyPatch):
    """The fallback: plain PyTorch everywhere, the same losses after the first steps where no mask is random."""
    losses = {"recon": 1.0, "recon_layerwise": 1.0, "faithfulness": 10.0, "minimality": 0.01}
    config = tiny_with(losses=losses, steps=3, log_every=1)
    ours = decompose_config(config, out=tmp_path / "ours").metrics
    monkeypatch.setattr(native, "loop_compiler", lambda: None)
    theirs = decompose_config(config, out=tmp_path / "theirs").metrics
    for mine, other in zip(ours, theirs, strict=True):
        if "losses" in mine:
            for name, value in other["losses"].items():  # three updates, each of which moves a parameter that has lost its sign by its rate
                assert mine["losses"][name] == pytest.approx(value, rel=2e-3, abs=bound(TOY, 2)), name
