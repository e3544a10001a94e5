import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import TINY
from paramlens.config.file import make_config
from paramlens.errors import ConfigError
from paramlens.tasks.induction.model import InductionTransformer, sinusoidal
from paramlens.tasks.induction.sequences import RANDOM, ROLES, S1, S2, M, induction_batch, induction_task
from paramlens.tasks.induction.task import InductionTask, TargetTraining
from paramlens.tasks.induction.training import _decayed, check_target, train_target
from rounding import TOY, assert_near, near

TASK = make_config(TINY).task


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 50), st.integers(4, 40), st.integers(0, 10_000), st.booleans())
def test_batches(vocabulary: int, length: int, step: int, early: bool):
    task = InductionTask(vocabulary=vocabulary, length=length)
    batch = induction_batch(task, seed=3, stream="train", step=step, batch=16, early=early)
    tokens, roles = batch.inputs, batch.roles
    assert tokens.shape == roles.shape == (16, length)
    assert ((tokens == vocabulary) == ((roles == S1) | (roles == S2))).all(), "s stands at s1 and s2 and nowhere else"
    for role in (S1, M, S2):
        assert ((roles == role).sum(1) == 1).all()
    first = (roles == S1).int().argmax(1)
    assert ((roles == M).int().argmax(1) == first + 1).all()
    assert (roles[:, -1] == S2).all()
    assert (roles == RANDOM).sum() == 16 * (length - 3)
    assert torch.equal(batch.answers, tokens[torch.arange(16), first + 1])
    assert (batch.answers < vocabulary).all()


def test_batches_are_a_pure_function_of_seed_stream_and_step():
    def draw(seed=0, stream="train", step=0):
        return induction_batch(TASK, seed=seed, stream=stream, step=step, batch=8).inputs

    assert torch.equal(draw(), draw())
    others = [draw(seed=1), draw(stream="evaluate"), draw(step=1)]
    assert not any(torch.equal(draw(), other) for other in others)


def test_a_share_of_the_training_sequences_is_shuffled(target):
    plain, mixed = (induction_task(TASK.model_copy(update={"shuffled": share}), target, seed=0, batch=8) for share in (0.0, 0.25))
    before, after = (task.batch(3, "train") for task in (plain, mixed))
    assert torch.equal(before.inputs[:6], after.inputs[:6])
    assert torch.equal(before.inputs[6:].sort(1).values, after.inputs[6:].sort(1).values)
    assert not torch.equal(before.inputs[6:], after.inputs[6:])
    assert (after.roles[6:] == RANDOM).all()
    assert torch.equal(after.roles[:6], before.roles[:6])
    assert after.answers is None
    assert torch.equal(plain.batch(3, "evaluate").inputs, mixed.batch(3, "evaluate").inputs)


def test_first_s_is_uniform_or_early():
    task = InductionTask(length=34)
    uniform, early = (
        (induction_batch(task, seed=0, stream="x", step=0, batch=60_000, early=flag).roles == S1).float().mean(0)[:32]
        for flag in (False, True)
    )
    assert uniform.tolist() == pytest.approx([1 / 32] * 32, abs=0.004)
    assert early[0].item() == pytest.approx(1 / math.sqrt(32), abs=0.01)


def test_last_token_alone_is_the_last_of_all(target):
    tokens = induction_batch(TASK, seed=0, stream="x", step=0, batch=5).inputs
    assert_near(target(tokens, last_token_only=True), target(tokens)[:, -1:], TOY)


def test_task_asks_the_target_for_the_last_token(target):
    task = induction_task(TASK, target, seed=0, batch=2)
    batch = task.batch(0, "train")
    assert task.loss_inputs(batch, last_token_only=False) is batch.inputs
    assert target(**task.loss_inputs(batch, last_token_only=True)).shape == (2, 1, 7)
    assert task.roles == ROLES


def test_window_reads_the_position_table_from_its_offset(target):
    tokens = induction_batch(TASK, seed=0, stream="x", step=0, batch=2, length=5).inputs
    shifted = InductionTransformer(TASK)
    shifted.load_state_dict(target.state_dict())
    with torch.no_grad():
        shifted.positions[:5] = target.positions[3:8]
    assert_near(target(tokens, offset=3), shifted(tokens), TOY)


def test_positions_reach_queries_and_keys_but_not_values(target):
    x = torch.randn(1, 8, 4)
    attention = target.blocks[0].attn
    patterns = []
    attention.pattern.register_forward_hook(lambda _module, _args, out: patterns.append(out))
    moved = [attention(x, positions) for positions in (target.positions, torch.zeros(8, 4))]
    assert not torch.allclose(patterns[0], patterns[1])
    assert_near(moved[0], attention.o(patterns[0][:, 0] @ attention.v(x)), TOY)


def test_attention_is_causal(target):
    tokens = induction_batch(TASK, seed=0, stream="x", step=0, batch=2).inputs
    changed = tokens.clone()
    changed[:, 5] = (changed[:, 5] + 1) % 6
    before, after = target(tokens), target(changed)
    assert_near(before[:, :5], after[:, :5], TOY)
    assert not torch.allclose(before[:, 5:], after[:, 5:])


@pytest.mark.parametrize(
    ("positions", "added", "heads"), [("sinusoidal", "before", 1), ("learned", "after", 2), ("sinusoidal", "after", 4)]
)
def test_variants(positions: str, added: str, heads: int):
    task = TASK.model_copy(update={"positions": positions, "added": added, "heads": heads, "blocks": 3})
    model = InductionTransformer(task)
    tokens = induction_batch(task, seed=0, stream="x", step=0, batch=2).inputs
    assert model(tokens).shape == (2, 8, 7)
    assert_near(model(tokens, last_token_only=True), model(tokens)[:, -1:], 2 * TOY)
    trained = {name for name, _ in model.named_parameters()}
    assert ("positions" in trained) is (positions == "learned")


def test_sinusoidal_by_hand():
    table = sinusoidal(3, 4)
    assert table[0].tolist() == [0, 1, 0, 1]
    assert table[2].tolist() == near([math.sin(2), math.cos(2), math.sin(0.02), math.cos(0.02)], 4, size=2)


def test_training_converges_and_says_so():
    """A task small enough to be learned in seconds; the phase change, the settling and the verdict are all there."""
    training = TargetTraining(
        lr=1e-2, weight_decay=0.0, batch=64, steps=3000, warmup=0, settle=300, attempts=3, converged_loss=0.05, converged_accuracy=0.98
    )
    task = InductionTask(vocabulary=8, length=8, width=12, embedding_scale=0.3, training=training)
    seen = []
    model, history = train_target(task, seed=0, on_check=seen.append)
    assert history.converged
    last = history.checks[-1]
    assert last.accuracy >= 0.98
    assert last == check_target(model, task, seed=0, step=last.step)
    assert last.step < 3000 or history.attempts > 1
    assert tuple(seen[-len(history.checks) :]) == history.checks


def test_training_that_does_not_converge_says_so():
    model, history = train_target(TASK, seed=0)
    assert not history.converged
    assert history.checks[-1].step == TASK.training.steps
    again, _ = train_target(TASK, seed=0)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_attempts_start_from_other_weights():
    task = TASK.model_copy(update={"training": TASK.training.model_copy(update={"attempts": 2})})
    model, history = train_target(task, seed=0)
    first, _ = train_target(TASK, seed=0)
    assert history.attempts == 2
    assert not torch.equal(model.embed.weight, first.embed.weight)


def test_undecayed_parameters_keep_their_length(target):
    """Decay reaches what no pattern names, and a pattern that names nothing is refused."""
    training = make_config(TINY).task.training.model_copy(update={"weight_decay": 0.5, "undecayed": ("positions", "blocks.0.attn.[qk].*")})
    decayed, free = _decayed(target, training)
    names = {id(value): name for name, value in target.named_parameters()}
    assert sorted(names[id(value)] for value in free["params"]) == ["blocks.0.attn.k.weight", "blocks.0.attn.q.weight", "positions"]
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.5, 0.0)
    assert len(decayed["params"]) + len(free["params"]) == len(names)
    with pytest.raises(ConfigError, match="undecayed: 'blocks.9' names no parameter"):
        _decayed(target, training.model_copy(update={"undecayed": ("blocks.9",)}))


def test_offset_is_common_to_all_positions():
    settings = InductionTask(vocabulary=6, length=200, width=4)
    torch.manual_seed(0)
    without = InductionTransformer(settings).positions
    torch.manual_seed(0)
    shifted = InductionTransformer(settings.model_copy(update={"position_offset": 2.0})).positions
    difference = shifted - without
    assert_near(difference, difference[:1].expand_as(difference), 2, size=shifted.abs().max().item())
    assert difference[0].norm() > 1
