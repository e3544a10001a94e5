"""How many CPU threads a run takes, how they wait, what torch.compile fuses, and systems that lack what Linux has."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from conftest import TINY, tiny_with
from paramlens import machine as machine_module
from paramlens.configfile import make_config
from paramlens.layout import read_json
from paramlens.machine import _quotas, default_threads, fusible, machine, usable_cores
from paramlens.runs import decompose_config
from paramlens.tracking import Silent

VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


def cores(patch: pytest.MonkeyPatch, allowed: int, *quotas: float) -> None:
    patch.setattr("os.sched_getaffinity", lambda _: set(range(allowed)), raising=False)
    patch.setattr(machine_module, "_quotas", lambda: iter(quotas))


@pytest.mark.parametrize(
    ("allowed", "quotas", "usable", "threads"),
    [(1, (), 1, 1), (2, (), 2, 2), (64, (), 64, 4), (64, (3.5, 8.0), 3, 3), (8, (0.25,), 1, 1), (2, (16.0,), 2, 2)],
)
def test_threads_follow_the_cores_alone(monkeypatch, allowed: int, quotas: tuple[float, ...], usable: int, threads: int):
    cores(monkeypatch, allowed, *quotas)
    assert (usable_cores(), default_threads()) == (usable, threads)


def test_a_system_that_tells_no_affinity_is_asked_for_its_cores(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delattr("os.sched_getaffinity", raising=False)
    monkeypatch.setattr(machine_module, "_quotas", lambda: iter(()))
    for told, expected in ((3, 3), (None, 1)):
        monkeypatch.setattr("os.cpu_count", lambda told=told: told)
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
    assert list(_quotas(tmp_path / "fs", tmp_path / "self")) == expected
    assert list(_quotas(tmp_path / "fs", tmp_path / "missing")) == []


def in_a_process(code: str, **variables: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    return subprocess.run([sys.executable, "-c", code], env=environment | variables, capture_output=True, text=True, check=True).stdout


TELL = "import os; print(paramlens.openmp.waiting(), 'torch' in sys.modules, *(os.environ.get(name) for name in openmp._PASSIVE))"


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
    code = f"import sys; {first} import paramlens; from paramlens import openmp; {TELL}"
    assert in_a_process(code, **variables).split() == expected.split()


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads' states are read from /proc")
@pytest.mark.skipif(machine_module.usable_cores() < 2, reason="one core: there is no second thread")
def test_workers_use_no_time_between_parallel_loops():
    """Counted in the threads' own processor time, which no other program changes; the default policy spends as much on the worker."""
    code = """
import paramlens, torch
from pathlib import Path
torch.set_num_threads(2)
x = torch.zeros(100_000)
def ticks():
    fields = [task.joinpath("stat").read_text().rsplit(")", 1)[1].split() for task in Path("/proc/self/task").iterdir()]
    return sorted(int(each[11]) + int(each[12]) for each in fields)
x.add_(1)
before = ticks()
while ticks()[-1] - before[-1] < 50:
    for _ in range(20):
        x.add_(1)
        sum(range(50_000))
print(*(after - first for after, first in zip(ticks(), before)))
"""
    *_, worker, main = map(int, in_a_process(code).split())
    assert worker < main / 4


class Messages(Silent):
    def __init__(self) -> None:
        self.texts: list[str] = []

    def message(self, text: str) -> None:
        self.texts.append(text)


@pytest.mark.parametrize(("way", "threads", "told"), [("asleep", 2, 0), ("spinning", 2, 1), ("spinning", 1, 0)])
def test_a_run_records_its_threads_and_says_what_may_be_slow(tmp_path, monkeypatch, way: str, threads: int, told: int):
    monkeypatch.setattr("paramlens.runs.waiting", lambda: way)
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
