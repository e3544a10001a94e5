"""How many CPU threads a run takes, how they wait, what torch.compile fuses, and systems that lack what Linux has."""

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from conftest import TINY, tiny_with
from paramlens.config.file import make_config
from paramlens.files import plain
from paramlens.files.lock import locked
from paramlens.files.plain import read_json, write_text
from paramlens.kernels import native, openmp, resources
from paramlens.kernels.machine import default_threads, fusible, machine, torch_threads
from paramlens.kernels.resources import usable_cores
from paramlens.runs.decompose import decompose_config
from paramlens.runs.seeds import decompose_seeds
from paramlens.tracking import signals
from paramlens.tracking.tracker import Silent

VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


def cores(patch: pytest.MonkeyPatch, allowed: int, *quotas: float) -> None:
    patch.setattr("psutil.Process.cpu_affinity", lambda _: list(range(allowed)), raising=False)
    patch.setattr(resources, "_cpu_quotas", lambda: iter(quotas))
    patch.delenv("OMP_NUM_THREADS", raising=False)


@pytest.mark.parametrize(("wanted", "threads"), [("2", 2), (" 3,1", 3), ("0", 1), ("64", 4), ("", 4), ("many", 4)])
def test_a_wish_for_fewer_threads_is_kept(monkeypatch: pytest.MonkeyPatch, wanted: str, threads: int):
    cores(monkeypatch, 8)
    monkeypatch.setenv("OMP_NUM_THREADS", wanted)
    assert default_threads() == threads


@pytest.mark.parametrize(
    ("allowed", "quotas", "usable", "threads"),
    [(1, (), 1, 1), (2, (), 2, 2), (64, (), 64, 4), (64, (3.5, 8.0), 3, 3), (8, (0.25,), 1, 1), (2, (16.0,), 2, 2)],
)
def test_threads_follow_the_cores_alone(monkeypatch, allowed: int, quotas: tuple[float, ...], usable: int, threads: int):
    cores(monkeypatch, allowed, *quotas)
    assert (usable_cores(), default_threads()) == (usable, threads)


def test_a_system_that_tells_no_affinity_is_asked_for_its_cores(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delattr("psutil.Process.cpu_affinity", raising=False)
    monkeypatch.setattr(resources, "_cpu_quotas", lambda: iter(()))
    for told, expected in ((3, 3), (None, 1)):
        monkeypatch.setattr("psutil.cpu_count", lambda told=told: told)
        assert usable_cores() == expected


@pytest.mark.parametrize(
    ("membership", "files", "expected"),
    [
        ("0::/", {"cpu.max": "max 100000"}, []),
        ("0::/", {"cpu.max": "150000 100000"}, [1.5]),
        ("0::/a/b", {"a/b/cpu.max": "max 100000", "a/cpu.max": "200000 100000"}, [2.0]),
        ("0::/not/mounted/here", {"cpu.max": "100000 50000"}, [2.0]),
        (
            "4:memory:/x\n3:cpu,cpuacct:/x",
            {"cpu,cpuacct/x/cpu.cfs_quota_us": "300000", "cpu,cpuacct/x/cpu.cfs_period_us": "100000"},
            [3.0],
        ),
        ("1:cpu:/", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, []),
        ("0::/", {"cpu.max": "what is this"}, []),
        ("nonsense", {}, []),
    ],
)
def test_quotas_of_control_groups(tmp_path, membership: str, files: dict[str, str], expected: list[float]):
    (tmp_path / "self").write_text(membership + "\n", encoding="utf-8")
    for name, content in files.items():
        file = tmp_path / "fs" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content + "\n", encoding="utf-8")
    assert list(resources._cpu_quotas(tmp_path / "fs", tmp_path / "self")) == expected
    assert list(resources._cpu_quotas(tmp_path / "fs", tmp_path / "missing")) == []


def in_a_process(code: str, **variables: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    return subprocess.run([sys.executable, "-c", code], env=environment | variables, capture_output=True, text=True, check=True).stdout


TELL = "import os; print(openmp.waiting(), 'torch' in sys.modules, *(os.environ.get(name) for name in openmp._PASSIVE))"


@pytest.mark.parametrize(
    ("first", "variables", "expected"),
    [
        ("", {}, "asleep False passive 0 0"),
        ("import torch;", {}, "spinning True None None None"),
        ("", {"OMP_WAIT_POLICY": "ACTIVE"}, "spinning False ACTIVE None None"),
        ("", {"GOMP_SPINCOUNT": "1000"}, "spinning False None 1000 None"),
        ("import torch;", {"OMP_WAIT_POLICY": "PASSIVE"}, "asleep True PASSIVE None None"),
    ],
)
def test_idle_threads_sleep_unless_the_user_says_otherwise(first: str, variables: dict[str, str], expected: str):
    code = f"import sys; {first} import paramlens; from paramlens.kernels import openmp; {TELL}"
    assert in_a_process(code, **variables).split() == expected.split()


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads' states are read from /proc")
@pytest.mark.skipif(usable_cores() < 2, reason="one core: there is no second thread")
@pytest.mark.parametrize("order", [pytest.param("paramlens, torch", marks=pytest.mark.slow), "torch, paramlens"])
def test_workers_use_no_time_between_parallel_loops(order: str):
    """Counted in the threads' own processor time, which no other program changes; the default policy spends as much on the worker."""
    code = (
        f"import {order}"
        + """
from pathlib import Path
from paramlens.kernels.machine import torch_threads
x = torch.zeros(100_000)
def ticks():
    fields = [task.joinpath("stat").read_text().rsplit(")", 1)[1].split() for task in Path("/proc/self/task").iterdir()]
    return sorted(int(each[11]) + int(each[12]) for each in fields)
with torch_threads(2):
    x.add_(1)
    before = ticks()
    while ticks()[-1] - before[-1] < 50:
        for _ in range(20):
            x.add_(1)
            sum(range(50_000))
    print(*(after - first for after, first in zip(ticks(), before)))
"""
    )
    *_, worker, main = map(int, in_a_process(code).split())
    assert worker < main / 4


@pytest.mark.slow
def test_a_wish_of_the_users_is_not_crowded_out():
    code = "import torch\nfrom paramlens.kernels.machine import torch_threads\nfrom paramlens.kernels.openmp import waiting\n"
    code += "with torch_threads(2): print(waiting())"
    assert in_a_process(code, OMP_WAIT_POLICY="active").strip() == "spinning"
    assert in_a_process(code, OMP_WAIT_POLICY="passive").strip() == "asleep"


class Messages(Silent):
    def __init__(self) -> None:
        self.texts: list[str] = []

    def message(self, text: str) -> None:
        self.texts.append(text)


@pytest.mark.parametrize(("way", "threads", "told"), [("asleep", 2, 0), ("spinning", 2, 1), ("spinning", 1, 0)])
def test_a_run_records_its_threads_and_says_what_may_be_slow(tmp_path, monkeypatch, way: str, threads: int, told: int):
    monkeypatch.setattr("paramlens.runs.decompose.waiting", lambda: way)
    cores(monkeypatch, threads)
    messages = Messages()
    run = decompose_config(make_config(TINY | {"threads": None, "steps": 1}), out=tmp_path / "run", tracker=messages)
    info = read_json(run.path / "run.json")
    assert (info["threads"], info["cores"], info["waiting"]) == (threads, threads, way)
    assert len([text for text in messages.texts if "set OMP_WAIT_POLICY=passive before Python starts" in text]) == told


def test_what_may_be_fused_is_seen_by_other_threads(monkeypatch: pytest.MonkeyPatch):
    """As autograd's on a GPU, which run the backward passes and were started by nobody who had entered `machine`."""
    fused = []

    def compiled(function):
        return lambda x: fused.append(True) or function(x)

    monkeypatch.setattr(torch, "compile", compiled)
    double = fusible(lambda x: 2 * x)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(int).result()  # the thread stands before the configuration does
        with machine(tiny_with(compile=True)):
            assert pool.submit(double, 3).result() == 6
            with machine(tiny_with(compile=False)):
                assert pool.submit(double, 3).result() == 6
        assert pool.submit(double, 3).result() == 6
    assert fused == [True]


def of_directories(function: Callable[..., int], error: OSError) -> Callable[..., int]:
    """`os.open` or `os.fsync` of a system on which it fails for directories."""

    def patched(what, *arguments: int) -> int:
        if Path(what if isinstance(what, str | Path) else f"/proc/self/fd/{what}").is_dir():
            raise error
        return function(what, *arguments)

    return patched


def test_a_system_that_cannot_open_directories(tmp_path, monkeypatch: pytest.MonkeyPatch):
    """Windows."""
    monkeypatch.setattr(os, "open", of_directories(os.open, PermissionError(errno.EACCES, "Permission denied")))
    run = decompose_config(make_config(TINY | {"steps": 4}), out=tmp_path / "run")
    assert run.step == 4


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="what a descriptor stands for is read from /proc")
def test_a_file_system_that_cannot_flush_directories(tmp_path, monkeypatch: pytest.MonkeyPatch):
    """Some network shares; a disk that fails is still told."""
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", of_directories(fsync, OSError(errno.EINVAL, "Invalid argument")))
    write_text(tmp_path / "file", "text\n")
    assert (tmp_path / "file").read_bytes() == b"text\n"
    monkeypatch.setattr(os, "fsync", of_directories(fsync, OSError(errno.EIO, "Input/output error")))
    with pytest.raises(OSError, match="Input/output error"):
        write_text(tmp_path / "file", "text")


def test_a_file_that_cannot_be_opened_is_told(tmp_path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: object) -> int:
        raise PermissionError(errno.EACCES, "Permission denied")

    (tmp_path / "file").write_text("", encoding="utf-8")
    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(PermissionError):
        plain.sync(tmp_path / "file")


def test_a_lock_that_removes_its_own_file(tmp_path, monkeypatch: pytest.MonkeyPatch):
    """As filelock does on Windows."""
    from paramlens.files import lock

    class Own(lock.FileLock):
        def release(self, force: bool = False) -> None:
            super().release(force)
            Path(self.lock_file).unlink()

    monkeypatch.setattr(lock, "FileLock", Own)
    with locked(tmp_path / "a/b"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_without_gnu_openmp_kernels_run_on_one_thread(tmp_path, monkeypatch: pytest.MonkeyPatch):
    """macOS, Windows, and a library that cannot be loaded."""
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib/libgomp.so.1").write_bytes(b"not a library")
    monkeypatch.setattr(openmp, "find_spec", lambda _name: SimpleNamespace(origin=str(tmp_path / "__init__.py")))
    assert openmp.library.__wrapped__() is None
    monkeypatch.setattr(native, "library", lambda: None)
    if native.serves(torch.ones(1)):
        kernel, out = native._Kernel("lower_backward", "ttti"), torch.zeros(5000)
        with torch_threads(2):
            kernel(native.units(out), torch.full((5000,), 0.5), torch.ones(5000), out, 5000)
        assert out.tolist() == [1.0] * 5000


@pytest.mark.slow
def test_seeds_are_stopped_where_signals_end_a_process_at_once(tmp_path, monkeypatch: pytest.MonkeyPatch):
    """Windows: closing a seed's input is what tells it to save; here the whole way but for the system's own names."""
    monkeypatch.setattr(signals, "WINDOWS", True)
    assert signals.own_session() == {"creationflags": 0}
    code = "import os, sys; sys.exit(len(os.read(0, 1)) + 5)"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, **signals.own_session()
    ) as process:
        signals.request_end(process, signal.SIGINT)
        signals.request_end(process, signal.SIGINT)
        assert process.communicate() == ("", None)
    assert process.returncode == 5
    with pytest.raises(signals.Terminated), signals.termination():
        signals.terminate_self()
    assert len(decompose_seeds(make_config(TINY | {"steps": 1}), 1, out=tmp_path / "seeds")) == 1
