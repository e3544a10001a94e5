"""What a configuration says of the machine."""

from typing import Annotated, Literal

from pydantic import Field

from paramlens.fields import Count, Section


class MachineSettings(Section):
    """Where a run computes, how precisely, and on how many threads."""

    device: Annotated[str, Field(pattern=r"^(cpu|cuda(:\d+)?|mps(:\d+)?)$")] = "cpu"
    """Where the run computes: cpu, cuda, cuda:N or mps."""
    dtype: Literal["float32", "float64"] = "float32"
    """Floating-point type of everything trained."""
    matmul: Literal["fp32", "tf32", "bf16"] = "fp32"
    """Precision inside float32 matrix products: fp32, or TF32 or bfloat16 where the device offers them (results stay float32)."""
    compile: bool = False
    """Let torch.compile fuse γ's, minimality's and the divergence's elementwise work. For GPUs; a CPU has compiled loops of its own."""
    cuda_graph: bool = False
    """Capture the whole step as one CUDA graph, which takes away the launches that bind small models; CUDA only, fixed plans only."""
    threads: Annotated[Count, Field(le=256)] | None = None
    """CPU threads, at most 256. Defaults to one per core that the process may use, within its control group's share, but at most four and
    at most OMP_NUM_THREADS where that is set."""
