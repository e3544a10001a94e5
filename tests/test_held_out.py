"""What evaluations and analyses look at: held-out batches where a run has them, and a word for it where they are the training data."""

import itertools
import json

import pytest
import torch
from torch import nn

from paramlens.analysis.circuit import circuit
from paramlens.errors import ConfigError
from paramlens.page import report
from paramlens.runs.decompose import decompose
from paramlens.runs.rundir import open_run
from paramlens.tasks.batches import HELD_OUT, own_task


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up = nn.Embedding(9, 5), nn.Linear(5, 9)

    def forward(self, ids):
        return self.up(self.embed(ids))


SMALL = {"sites": ["up"], "C": 5, "steps": 2, "gamma": {"kind": "vector", "d_gate": 2}, "evaluate": {"every": 2, "batches": 3}}
TRAIN, OTHER = [torch.tensor([[1, 2, 3]])] * 3, [torch.tensor([[4, 5], [6, 7]]), torch.tensor([[8, 0], [8, 1]])]


def test_held_out_batches_are_evaluated_and_never_trained_on(tmp_path):
    torch.manual_seed(0)
    seen: list[tuple[int, ...]] = []
    model = Model()
    model.register_forward_pre_hook(lambda _module, args: seen.append(tuple(args[0].shape)))
    run = decompose(model, TRAIN, held_out=OTHER, out=tmp_path / "run", **SMALL)
    assert (2, 2) in seen
    assert run.task.batch(0, "train").inputs.equal(TRAIN[0])
    assert run.task.batch(3, "evaluate").inputs.equal(OTHER[1])
    found = circuit(run, adversary=0)
    assert (run.evaluated_on, found.evaluated_on, found.sequences) == ("held-out", "held-out", 4)
    assert "4 held-out sequences" in found.tables()[0].title
    assert "Held out: nats, accuracies" in {table.title for table in run.tables()}


def test_without_them_every_table_says_training(tmp_path, facts_run, tiny_run):
    torch.manual_seed(0)
    model = Model()
    run = decompose(model, TRAIN, out=tmp_path / "run", **SMALL)
    found = circuit(run, adversary=0)
    assert (run.evaluated_on, found.evaluated_on, found.sequences) == ("training", "training", 3)
    for each in (run, facts_run):
        assert "Training data: nats, accuracies" in {table.title for table in each.tables()}
        assert "2 training sequences" in circuit(facts_run, adversary=0).tables()[0].title
    assert "Measured on 3 training sequences" in report(run).read_text(encoding="utf-8")
    assert "held-out" not in report(run).read_text(encoding="utf-8")
    assert (tiny_run.evaluated_on, tiny_run.task.evaluated_on) == ("held-out", "held-out")
    opened = open_run(run.path, model=model, batches=OTHER)
    assert circuit(opened, adversary=0).evaluated_on == "given"
    assert opened.evaluated_on == "training"
    file = run.path / "run.json"
    file.write_text(json.dumps({key: value for key, value in json.loads(file.read_text()).items() if key != "evaluated_on"}))
    assert open_run(run.path, model=model).evaluated_on == "training"


def test_an_endless_iterable_is_read_once_and_not_to_its_end():
    task = own_task(Model(), TRAIN, held_out=(torch.tensor([[i % 9]]) for i in itertools.count()))
    assert task.held_out == HELD_OUT
    assert [task.batch(i, "circuit").inputs.item() for i in (1, 5, 1)] == [1, 5, 1]


@pytest.mark.parametrize(("given", "message"), [("text", "held_out: str is not a series"), (3, "held_out: int is not a series")])
def test_what_is_no_series_of_batches_is_refused_by_its_name(given, message: str, tmp_path):
    with pytest.raises(ConfigError, match=message):
        decompose(Model(), TRAIN, held_out=given, out=tmp_path / "run", **SMALL)
    with pytest.raises(ConfigError, match="resume: held_out from an iterable"):
        decompose(Model(), TRAIN, held_out=iter(OTHER), out=tmp_path / "run", resume=True, **SMALL)
