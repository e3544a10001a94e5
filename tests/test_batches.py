"""The forms in which a caller's batches come, and what is refused in one line."""

import collections
import dataclasses

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from paramlens import Batch, decompose
from paramlens.errors import BatchError, ConfigError, ParamLensError
from paramlens.method.batch import map_tensors
from paramlens.tasks.batches import BatchForm, batch_function

X = [torch.randint(11, (4, 6), generator=torch.Generator().manual_seed(i)) for i in range(3)]
Named = collections.namedtuple("Named", "x")


@dataclasses.dataclass
class Held:
    x: torch.Tensor
    labels: torch.Tensor


class Toy(nn.Module):
    """One input, and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.up, self.out = nn.Embedding(11, 8), nn.Linear(8, 12), nn.Linear(12, 11)

    def forward(self, x):
        return self.out(torch.relu(self.up(self.embedding(x))))


class Scaled(Toy):
    """Of several inputs, of which one is a number and one has no batch axis."""

    def forward(self, x, scale, place):
        return super().forward(x) * scale + place[None, :, None]


FORMS = {
    "tensor": X,
    "array": [x.numpy() for x in X],
    "tuple of one": [(x,) for x in X],
    "namedtuple": [Named(x) for x in X],
    "dataclass with labels": [Held(x, x) for x in X],
    "mapping with labels and more": [{"x": x, "labels": x, "source": ["a.txt"] * 4} for x in X],
    "(x, y) pairs": [(x, torch.zeros(4)) for x in X],
    "Batch": [Batch(x) for x in X],
    "function": lambda step: X[step % 3],
    "loader of (x, y)": DataLoader(TensorDataset(torch.cat(X), torch.zeros(12)), batch_size=4),
}


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    return losses(X, tmp_path_factory.mktemp("tensor"))


def losses(batches, path, model=None):
    how = {"C": 8, "steps": 3, "threads": 1, "gamma": {"kind": "vector", "d_gate": 4}, "log_every": 1}
    torch.manual_seed(0)
    run = decompose(model or Toy(), batches, sites=["up", "out"], out=path / "run", **how)
    return [line["losses"] for line in run.metrics if "losses" in line]


@pytest.mark.parametrize("batches", FORMS.values(), ids=FORMS)
def test_every_form_is_the_same_run(batches, expected, tmp_path):
    assert losses(batches, tmp_path) == expected


def test_inputs_without_the_batch_axis_are_shared_by_all_plans(tmp_path):
    """A number and a vector over positions: stacked plans get them as they are."""
    batches = [(x, torch.tensor(1.5), torch.arange(6.0)) for x in X]
    assert all(each["recon"] > 0 for each in losses(batches, tmp_path, Scaled()))


REFUSED = {
    "lists of token ids": ([x[0].tolist() for x in X], r"batch 0: a list of int; give tokens as torch.tensor \(batch, pos\)"),
    "text": ([["some text"]], "batch 0: a list of str"),
    "no tensor": ([{"x": "text"}], "batch 0: an object of type dict holds no tensor; give a tensor"),
    "None": ([None], "batch 0: None is not a batch; give a tensor"),
    "a function that returns None": (lambda step: None, "batch of step 0: None is not a batch"),
    "an empty batch": ([torch.zeros(0, 6, dtype=torch.long)], r"batch 0: is empty, its tensors are \(0, 6\)"),
    "another object": ([object()], "batch 0: an object of type object is not a batch"),
    "no batches": ([], "batches: an empty sequence"),
    "one Batch": (Batch(X[0]), "batches: Batch is not a series of batches"),
    "one tensor": (X[0], "batches: Tensor is not a series of batches"),
}


@pytest.mark.parametrize(("batches", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_batch_is_refused_in_one_line(batches, message, tmp_path):
    with pytest.raises((BatchError, ConfigError), match=message) as refused:
        decompose(Toy(), batches, out=tmp_path / "run", C=4, steps=1)
    assert isinstance(refused.value, ParamLensError)
    assert "\n" not in str(refused.value)


def test_labels_that_the_model_needs_stay():
    class Teacher(nn.Module):
        def forward(self, x, labels): ...

    class Optional(nn.Module):
        def forward(self, x, labels=None): ...

    given = {"x": X[0], "labels": X[1]}
    assert set(BatchForm(Teacher())(given, "batch").inputs) == {"x", "labels"}
    assert set(BatchForm(Optional())(given, "batch").inputs) == {"x"}


def test_the_longest_of_a_list_sizes_the_tables(tmp_path):
    """Later, longer batches neither end a run nor share a position."""
    batches = [torch.randint(11, (2, n)) for n in (3, 9, 5)]
    run = decompose(Toy(), batches, sites=["up"], out=tmp_path / "run", C=4, steps=3, threads=1)
    assert run.importance.table_length == 9


def test_a_longer_batch_of_a_function_is_reported_once(tmp_path):
    messages = []

    class Follower:
        def __getattr__(self, name):
            return messages.append if name == "message" else lambda *args, **kwargs: None

    run = decompose(
        Toy(),
        lambda step: torch.ones(2, 3 + 2 * step, dtype=torch.long),
        sites=["up"],
        out=tmp_path / "run",
        C=4,
        steps=3,
        tracker=Follower(),
    )
    assert run.status == "finished"
    assert run.importance.table_length == 3
    assert [message for message in messages if "positions" in message] == [
        "step 1: a batch of 5 positions; the attention γ's tables were sized for 3, further positions share their last entries. "
        "To give each its own, start with gamma.max_length 5"
    ]


def test_named_tuples_stay_what_they_are():
    found = map_tensors(lambda t: t + 1, {"a": [Named(torch.zeros(2))]})
    assert isinstance(found["a"][0], Named)
    assert found["a"][0].x.tolist() == [1, 1]


def test_arrays_deep_inside_become_tensors():
    class Deep(nn.Module):
        def forward(self, x, more): ...

    batch = BatchForm(Deep())({"x": np.zeros((2, 3)), "more": [np.ones(2), "text"]}, "batch")
    assert torch.equal(batch.inputs["more"][0], torch.ones(2, dtype=torch.float64))


def test_batches_are_made_again_for_every_step():
    function = batch_function(DataLoader(TensorDataset(torch.arange(6.0)[:, None]), batch_size=2), nn.Linear(1, 2))
    seen = [function(step, "train").inputs[0].flatten().tolist() for step in range(4)]
    assert seen == [[0, 1], [2, 3], [4, 5], [0, 1]]
