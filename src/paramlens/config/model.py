"""The fields of a configuration, as frozen models. The text of a field states its unit, the paper's symbol and the paper's value."""

from typing import Annotated

from pydantic import Field, ValidationInfo, model_validator

from paramlens.fields import Count, Section
from paramlens.method.settings import MethodSettings
from paramlens.tasks.custom import CustomTask
from paramlens.tasks.registry import AnyTask


class Checkpoint(Section):
    every: Count = 5000
    """Steps between checkpoints. A checkpoint is always written at the end."""
    keep_last: Count = 2
    """Number of newest checkpoints that are kept."""
    keep_every: Count | None = None
    """Checkpoints at multiples of this step are never deleted. None: only the newest are kept."""


class Evaluate(Section):
    every: Count = 1000
    """Steps between evaluations on held-out batches."""
    batches: Count = 1
    """Number of held-out batches per evaluation."""


class Config(MethodSettings):
    """All fields of a run: method, machine, task, and what is measured and written. The shipped ones are `config/shipped/*.yaml`."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = "custom"
    """Name of the run. Its directory is runs/<name>-s<seed>."""
    batch: Count = 64
    """Sequences per step. Table 4: 1024. Figure 6: 2."""
    task: AnyTask = CustomTask()
    checkpoint: Checkpoint = Checkpoint()
    evaluate: Evaluate = Evaluate()
    log_every: Count = 50
    """Steps between lines of metrics.jsonl."""

    @model_validator(mode="after")
    def _table_holds_the_task(self) -> "Config":
        table, longest = self.gamma.max_length, self.task.longest
        if table is None or longest is None or table >= longest:
            return self
        from paramlens.method.importance.kind import kind_class  # imports torch, which is slow and rarely needed here

        if kind_class(self.gamma.kind).has_table:
            raise ValueError(
                f"gamma.max_length {table} is below task.length {longest}; "
                f"the {self.gamma.kind} γ's table must hold the longest batch, so give at least {longest}"
            )
        return self

    @model_validator(mode="after")
    def _elsewhere_has_data(self, info: ValidationInfo) -> "Config":
        partial = info.context is not None and info.context["partial"]
        if bool(self.losses.elsewhere) != self.task.has_elsewhere and not self.task.given_in_python and not partial:
            raise ValueError(
                "losses.elsewhere and task.elsewhere (sequences per step, of an induction or facts task) go together: give both or neither"
            )
        if self.losses.elsewhere and self.cuda_graph:
            raise ValueError("cuda_graph true captures one batch a step; losses.elsewhere brings a second, so give one of them")
        return self

    @model_validator(mode="after")
    def _graph_has_one_shape(self) -> "Config":
        partial = self.losses.partial_scope == "forward" and (self.losses.recon_partial or self.losses.stochastic_recon_partial)
        if self.cuda_graph and not self.device.startswith("cuda"):
            raise ValueError(f"cuda_graph true needs device cuda, not {self.device}")
        if self.cuda_graph and self.optim.project_from is not None:
            raise ValueError(
                "cuda_graph true cannot capture the projection of optim.project_from, which the host waits for; give one of them"
            )
        if self.cuda_graph and self.losses.adversarial:
            raise ValueError("cuda_graph true replays one step, and losses.adversarial draws its sources on the host; give one of them")
        if self.cuda_graph and self.losses.smooth_minimality:
            raise ValueError("cuda_graph true replays one step, and losses.smooth_minimality changes its width; give one of them")
        if self.cuda_graph and self.merge.every is not None:
            raise ValueError("cuda_graph true replays tensors of one size, which merge.every changes; give one of them")
        if self.cuda_graph and (partial or self.losses.layerwise_sites != "all"):
            raise ValueError(
                "cuda_graph true replays one set of plans; partial losses need losses.partial_scope sequence or position, "
                "and losses.layerwise_sites must be all"
            )
        return self
