"""The fields of a configuration that set the machine."""

from typing import Annotated, Literal

from pydantic import Field

from paramlens.fields import Count, Section


class MachineSettings(Section):
    """Device, precision and threads of a run."""

    device: Annotated[str, Field(pattern=r"^(cpu|cuda(:\d+)?|mps(:\d+)?)$")] = "cpu"
    """Device of the run: cpu, cuda, cuda:N or mps."""
    dtype: Literal["float32", "float64"] = "float32"
    """Floating-point type of the target, U, V and γ."""
    matmul: Literal["fp32", "tf32", "bf16"] = "fp32"
    """Precision inside float32 matrix products: fp32, or TF32 or bfloat16 if the device has them (results stay float32)."""
    compile: bool = False
    """Let torch.compile fuse the elementwise operations of γ, minimality and KL. For GPUs; a CPU has its own compiled loops."""
    cuda_graph: bool = False
    """Capture the whole step as one CUDA graph, which removes the kernel launches that slow small models; CUDA and fixed plans only."""
    threads: Annotated[Count, Field(le=256)] | None = None
    """Number of CPU threads, at most 256. Defaults to the number of cores that the process may use, within the limit of its control
    group, but at most four, and at most OMP_NUM_THREADS if that is set."""
