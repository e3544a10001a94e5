"""`paramlens verify`: check that all files of a run directory are unchanged and belong to one run."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from paramlens.display.result import Result
from paramlens.display.tables import Cell, Column, Table
from paramlens.errors import ParamLensError
from paramlens.files.plain import read_json
from paramlens.files.tensorfile import require_fit
from paramlens.runs.checkpoint import damage, subcomponents
from paramlens.runs.description import ModelDescription
from paramlens.runs.integrity import require_own, require_whole_run
from paramlens.runs.layout import checkpoint_step, checkpoints, is_begun, is_resumable, read_metrics, require_run
from paramlens.runs.metrics import recorded_part

T = TypeVar("T")


@dataclass(frozen=True)
class CheckpointReport:
    """The problems of one checkpoint. There are none if it is whole."""

    step: int
    problems: tuple[str, ...]

    @property
    def whole(self) -> bool:
        """True if the checkpoint has no problems."""
        return not self.problems


@dataclass(frozen=True, repr=False)
class Verification(Result):
    """The result of `verify`. A problem names the file, what was expected and what was found."""

    run: Path
    status: str | None
    """Status in run.json. None: it cannot be read."""
    problems: tuple[str, ...]
    """Problems of the run's own files, its metrics and its analyses."""
    checkpoints: tuple[CheckpointReport, ...]
    resumable: bool
    """False for a copy that was pushed without optimizer and random generators."""

    @property
    def whole(self) -> bool:
        """True if there are no problems, in the run's own files and in its checkpoints."""
        return not self.problems and all(each.whole for each in self.checkpoints)

    @property
    def last_good(self) -> int | None:
        """Step of the newest checkpoint that is whole. None: there is none."""
        return next((each.step for each in reversed(self.checkpoints) if each.whole), None)

    def summary(self) -> str:
        problems = sum(len(each) for each in (self.problems, *(report.problems for report in self.checkpoints)))
        found = f"damaged, {problems} problems" if problems else "whole"
        return f"{self.run}, {self.status or 'status unknown'}: {found}, {len(self.checkpoints)} checkpoints"

    def tables(self) -> tuple[Table, ...]:
        """A row for the run and one for each checkpoint, with their problems."""
        parts = {"the run": self.problems} | {f"checkpoint of step {each.step}": each.problems for each in self.checkpoints}
        rows = tuple(
            (Cell(name), Cell("damaged", "bad") if problems else Cell("whole", "good"), Cell("\n".join(problems)))
            for name, problems in parts.items()
        )
        heads = (Column("part", right=False), Column("state", right=False), Column("what is wrong", right=False, wraps=True))
        notes = () if self.checkpoints else (Cell("no checkpoint yet", "warn"),)
        if not self.resumable:
            notes = (*notes, Cell("a copy for reading: it has no optimizer and generators, and cannot be resumed"))
        shown = heads if any(parts.values()) else heads[:2]
        return (Table(f"{self.run}, {self.status or 'status unknown'}", shown, tuple(each[: len(shown)] for each in rows), notes=notes),)

    def to_json(self) -> dict[str, Any]:
        """The values that `verify --json` prints."""
        reports = [asdict(each) | {"whole": each.whole} for each in self.checkpoints]
        return asdict(self) | {"run": str(self.run), "checkpoints": reports, "whole": self.whole, "last_good": self.last_good}


def verify(path: str | Path) -> Verification:
    """Check a run directory against its manifests, and its files against each other: formats, shapes, types, metrics, run.

    Reads every byte once, and does not load the model. Raises `RunDirError` if `path` is not a run directory.
    """
    path = Path(path)
    require_run(path)
    found: list[str] = []
    described = _attempt(found, lambda: require_whole_run(path)) if is_begun(path) else None  # otherwise its writer has just started
    info = _attempt([], lambda: read_json(path / "run.json")) or {}
    reports, recorded = list[CheckpointReport](), None
    for folder in checkpoints(path):
        report, state = _report(folder, path, described), _attempt([], lambda folder=folder: read_json(folder / "state.json")) or {}
        if not folder.is_dir():
            continue  # a run in progress has removed it in the meantime
        reports.append(report)
        recorded = state.get("metrics") if report.whole else recorded
    newest = next((each.step for each in reversed(reports) if each.whole), None)
    if newest is not None:
        _attempt(found, lambda: recorded_part(path / "metrics.jsonl", recorded, step=newest))
    _attempt(found, lambda: read_metrics(path))
    for file in sorted((path / "analysis").glob("*.json")):
        _attempt(found, lambda file=file: read_json(file))
    return Verification(path, info.get("status"), tuple(found), tuple(reports), is_resumable(path))


def _report(folder: Path, path: Path, described: ModelDescription | None) -> CheckpointReport:
    found = damage(folder)
    if not found and described is not None:
        _attempt(found, lambda: require_own(folder, path))
        for name, tensors in described.tensors(subcomponents(folder, described)).items():
            _attempt(found, lambda name=name, tensors=tensors: require_fit(folder / f"{name}.safetensors", tensors))
    return CheckpointReport(checkpoint_step(folder), tuple(found))


def _attempt(found: list[str], check: Callable[[], T]) -> T | None:
    """Return what `check` returns. If it raises, add the error to `found` and return None."""
    try:
        return check()
    except ParamLensError as error:
        found.append(str(error))
        return None
