"""The facts task: the shipped facts, sentences of different lengths in one batch, the stream of other text, and the small GPT-2."""

import dataclasses
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from conftest import TINY_FACTS
from paramlens.config.file import load_config, make_config
from paramlens.errors import BatchError, ConfigError
from paramlens.method.batch import Batch
from paramlens.method.decomposition import Decomposition
from paramlens.method.evaluate import evaluate, importances
from paramlens.method.generators import generator
from paramlens.method.importance.sigmoids import lower
from paramlens.method.losses.divergence import LossAt
from paramlens.method.losses.elsewhere import elsewhere_loss
from paramlens.method.losses.local import local_loss
from paramlens.method.losses.minimality import minimality
from paramlens.method.masks import Replacement, mask_noise
from paramlens.method.sites import at_rest
from paramlens.method.start import initialise
from paramlens.method.step import training_step
from paramlens.runs.decompose import decompose_config
from paramlens.runs.rundir import open_run
from paramlens.tasks.base import Target
from paramlens.tasks.facts.facts import Fact, fact_of, kinds, read_facts, recall, shipped_facts
from paramlens.tasks.facts.miniature import train_miniature
from paramlens.tasks.facts.sentences import facts_task
from paramlens.tasks.facts.task import Miniature
from paramlens.tasks.language_models.encoding import encode, encode_fact, model_inputs, padded
from paramlens.tasks.language_models.loading import load_language
from paramlens.tasks.text.pieces import packed, text_task
from paramlens.tasks.text.task import TextTask
from rounding import GPT, near, near_divergence

KOBE, TIGER = "Kobe Bryant plays the sport of basketball", "Tiger Woods plays the sport of golf"


def test_the_shipped_facts_are_many_and_different():
    facts = shipped_facts()
    assert len({fact.prompt for fact in facts}) == len(facts) == 322
    assert sum(fact.reverse for fact in facts) == 8
    assert len([fact for fact in facts if fact.relation == "sport"]) == 208
    assert {fact.answer for fact in facts if fact.relation == "sport"} >= {"golf", "basketball", "cricket"}
    assert all(fact.subject in fact.prompt for fact in facts)
    assert all(fact.prompt == fact.prompt.strip() and fact.answer == fact.answer.strip() for fact in facts)
    assert fact_of(KOBE, facts).subject == "Kobe Bryant"
    assert fact_of("Snow is very cold", ()) == Fact("Snow is very", "cold")


def test_kinds_of_facts_seen_from_one():
    facts = shipped_facts()
    seen = dict(kinds(facts, fact_of(KOBE, facts), (KOBE, TIGER)))
    kind = {fact.sentence: value for fact, value in seen.items()}
    assert kind[KOBE] == "target"
    assert kind["The sport played by Kobe Bryant is basketball"] == "paraphrase"
    assert kind[TIGER] == "other-target"
    assert kind["Larry Bird plays the sport of basketball"] == "same-sport"
    assert kind["Babe Ruth plays the sport of baseball"] == "other-sport"
    assert kind["The most famous athlete in golf is Tiger Woods"] == "reverse"
    assert kind["Snow is cold and white"] == "general"


def test_facts_from_a_file(tmp_path: Path):
    file = tmp_path / "facts.yaml"
    file.write_text("- {prompt: The sky is, answer: blue}\n- {prompt: Who, answer: me, reverse: true}\n", encoding="utf-8")
    assert read_facts(file) == (Fact("The sky is", "blue"), Fact("Who", "me", reverse=True))
    file.write_text("- {prompt: Pigs fly, answer: no}\n- prompt: 1969\n  answer: 007\n  reverse: no\n", encoding="utf-8")
    assert read_facts(file) == (Fact("Pigs fly", "no"), Fact("1969", "007"))
    for text, message in {
        "[]": "give a list of",
        "{": "cannot be read",
        "[3]": "entry 1: a mapping with prompt and answer is needed, not 3",
        "- prompt: a\n  answer:": "entry 1: answer: None; known are prompt, answer",
        '[{"prompt": "a", "answer": false}]': "entry 1: answer: False; known are prompt, answer",
        "[{prompt: a, answer: b, kind: c}]": "entry 1: kind: 'c'; known are prompt, answer",
    }.items():
        file.write_text(text, encoding="utf-8")
        with pytest.raises(ConfigError, match=message):
            read_facts(file)


def parts(run, sentence: str) -> Batch:
    return padded(run.task.tokenizer, [encode(run.task.tokenizer, sentence)])


def louder(facts_run):
    """The run opened anew with ten times the weights in its blocks, so that divergences are far above rounding."""
    run = open_run(facts_run.path)
    with torch.no_grad():
        for parameter in run.task.model.transformer.h.parameters():
            parameter.mul_(10 if parameter.dim() == 2 else 1)
    return run


def test_sentences_of_different_lengths_count_token_by_token(facts_run):
    """The divergence, minimality and metrics of a filled-up batch are those of its sentences alone, weighted by their tokens."""
    run, short = louder(facts_run), "Snow is white"
    both = padded(run.task.tokenizer, [encode(run.task.tokenizer, each) for each in (KOBE, short)])
    assert both.present is not None
    sizes = both.present.sum(1).tolist()
    rows = []
    with at_rest(run.task.model):
        for batch in (parts(run, KOBE), parts(run, short), both):
            target, g = importances(run.decomposition, run.importance, batch)
            scores = evaluate(run.task, run.decomposition, batch, target, g, last_token_only=False)
            last = evaluate(run.task, run.decomposition, batch, target, g, last_token_only=True)["recon"]
            result = training_step(run.config, run.task, run.decomposition, run.importance, batch, 3)
            rows.append((scores["recon"], scores["recon_rounded"], result.losses["minimality"].item(), result.losses["recon"].item(), last))
    for kind, (alone, short_alone, together) in enumerate(list(zip(*rows, strict=True))[:4]):
        expected = (alone * sizes[0] + short_alone * sizes[1]) / sum(sizes)
        assert together == (near(expected, GPT) if kind == 2 else near_divergence(expected, target.logits, GPT))
    assert rows[2][4] == near_divergence((rows[0][4] + rows[1][4]) / 2, target.logits, GPT)


def test_what_fills_a_sentence_up_is_never_important(facts_run):
    batch = padded(facts_run.task.tokenizer, [encode(facts_run.task.tokenizer, each) for each in (KOBE, "Snow is white")])
    _, g = importances(facts_run.decomposition, facts_run.importance, batch)
    assert all((value[~batch.present] == 0).all() and (value[batch.present] > 0).any() for value in g.values())


def test_batches_hold_the_sentences_and_others_drawn_by_step(facts_run):
    settings = facts_run.config.task.model_copy(update={"others": 3, "elsewhere": 2})
    language = Target(facts_run.task.model, facts_run.task.tokenizer, "test")
    task = facts_task(settings, language, seed=1)
    first, second = task.batch(0, "train"), task.batch(1, "train")
    assert len(first.texts) == 5
    assert ["".join(texts) for texts in first.texts[:2]] == [KOBE, TIGER]
    assert first.texts[2:] != second.texts[2:]
    assert task.batch(0, "train").texts == first.texts
    assert ["".join(texts) for texts in task.batch(0, "circuit").texts] == [KOBE, TIGER]
    assert len(task.elsewhere(0).texts) == 2
    assert not {"".join(texts) for texts in task.elsewhere(0).texts} & {KOBE, TIGER}
    assert set(task.roles) >= {"Kobe", "Woods", "golf", "sport"}
    with pytest.raises(ConfigError, match=r"task.others 400: there are 320 other facts"):
        facts_task(settings.model_copy(update={"others": 400}), language, seed=1)
    with pytest.raises(BatchError, match="1 token"):
        facts_task(settings.model_copy(update={"sentences": ("Kobe",)}), language, seed=1)


def test_the_loss_on_other_text_takes_out_what_is_one_sentences_own(facts_run):
    """By hand: mask 1 - (largest g of a sentence less the next sentence's) u; a run in which all sentences agree leaves the target."""
    run = louder(facts_run)
    other = padded(run.task.tokenizer, [encode(run.task.tokenizer, "Snow is cold and white"), encode(run.task.tokenizer, "Grass is green")])
    decomposition = Decomposition(run.task.model, run.decomposition.sites, C=64)
    initialise(decomposition, run.config.init, generator=generator("init"))
    rng = generator("g")
    g = {name: torch.rand(3, 4, 64, generator=rng).requires_grad_() for name in decomposition.names}
    with at_rest(run.task.model), torch.enable_grad():
        value = elsewhere_loss(decomposition, other, g, generator=generator("keys"))
        value.backward()
        keys = torch.randint(2**31, (len(g),), generator=generator("keys")).tolist()
        plan = {}
        for (site, each), key in zip(g.items(), keys, strict=True):
            per_sentence = each.detach().amax(1)
            own = torch.stack(
                [(per_sentence[i] - per_sentence[[j for j in range(3) if j != i]].amax(0)).clamp(min=0) for i in range(3)]
            ).amax(0)
            x = decomposition.target_run(other.inputs).inputs[site]
            like = (1 - own).expand(*x.shape[:-1], -1)
            plan[site] = Replacement(like + (1 - like) * mask_noise(key, like))
        at = LossAt(present=other.present)
        log_probs = at.log_probs(run.task.model(**other.inputs).logits)
        by_hand = at.divergence(log_probs, decomposition(other.inputs, [plan]))[0]
        alike = {name: each[:1].expand(3, -1, -1) for name, each in g.items()}
        nothing = elsewhere_loss(decomposition, other, alike, generator=generator("keys"))
    assert value.item() == near_divergence(by_hand.item(), log_probs, GPT)
    assert nothing.item() == near_divergence(0, log_probs, GPT)
    assert value.item() != near_divergence(0, log_probs, GPT)
    assert all(each.grad is None for each in g.values())
    assert all(each.grad.abs().sum() > 0 for each in decomposition.parameters())
    few = Decomposition(run.task.model, run.decomposition.sites, C=3, delta=True)
    initialise(few, run.config.init, generator=generator("init"))
    with at_rest(run.task.model):
        nothing = elsewhere_loss(few, other, {name: each[..., :3] for name, each in alike.items()}, generator=generator("keys"))
    assert nothing.item() == near_divergence(0, log_probs, GPT), "what few subcomponents lack is in Δ, which is on"


def test_the_loss_on_other_text_needs_its_text():
    for change in ({"losses": {"recon": 1.0, "elsewhere": 1.0}}, {"task": {"kind": "facts", "elsewhere": 2}}):
        with pytest.raises(ConfigError, match="losses.elsewhere and task.elsewhere"):
            make_config(TINY_FACTS | change)


def test_minimality_is_a_mean_over_what_is_present():
    pre = {"a": torch.tensor([[[0.5], [0.0]]])}
    whole = minimality(pre, p=1.0, eps=0.0)
    assert minimality(pre, p=1.0, eps=0.0, present=0.5).item() == near(2 * whole.item(), 4)
    assert lower(pre["a"]).sum().item() == 0.5


def test_the_probability_of_an_answer_is_the_product_over_its_tokens(facts_run):
    model, tokenizer = facts_run.task.model, facts_run.task.tokenizer
    fact = Fact("The capital of Zanzibar is", "Stone Town")
    before, after = encode_fact(tokenizer, fact.prompt, fact.answer)
    expected, best = 1.0, True
    with at_rest(model), torch.no_grad():
        for i, token in enumerate(after):
            p = model(**model_inputs(torch.tensor([before + after[:i]]))).logits[0, -1].double().softmax(-1)
            expected *= p[token].item()
            best &= p.argmax().item() == token
        right, probability = recall(model, tokenizer, [Fact("Snow is", "white"), fact])
    assert probability[1].item() == near(expected, 2 * GPT)
    assert bool(right[1]) == best


@pytest.mark.slow
def test_the_small_gpt2_is_a_pure_function_of_its_seed_and_learns():
    settings = Miniature(blocks=2, width=32, heads=2, steps=60, batch=32, lr=3e-3, dropout=0.05, check_every=30)
    models = [train_miniature(settings, (KOBE,), seed=seed, device="cpu") for seed in (3, 3, 4)]
    states = [target.model.state_dict() for target in models]
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())
    assert any(not torch.equal(value, states[2][key]) for key, value in states[0].items())
    checks = models[0].history.checks
    assert [check.step for check in checks] == [30, 60]
    assert checks[1].loss < checks[0].loss
    assert checks[1].probability > checks[0].probability
    tokenizer = models[0].tokenizer
    assert tokenizer.tokenize("Kobe Bryant") == ["Kobe", "ĠBryant"]
    assert max(parameter.abs().max() for parameter in models[0].model.transformer.wte.parameters()) < 0.6


def test_a_facts_run_holds_a_plain_model_and_opens_alone(facts_run):
    run = open_run(facts_run.path)
    assert run.task.tokenizer.tokenize("Tiger Woods") == ["Tiger", "ĠWoods"]
    model = AutoModelForCausalLM.from_pretrained(run.path / "target")
    assert all(torch.equal(value, run.task.model.state_dict()[key]) for key, value in model.state_dict().items())
    assert len(AutoTokenizer.from_pretrained(run.path / "target")) == len(run.task.tokenizer)
    assert run.target_history.checks[-1].step == 4
    assert dataclasses.asdict(run.target_history) == dataclasses.asdict(facts_run.target_history)
    assert run.info["target"]["id"] == "tiny-facts toy target"


def test_any_model_takes_the_targets_place(facts_run, tmp_path: Path):
    """--target: a toy's directory is copied in; a plain folder is recorded in the configuration and read again from there."""
    config = make_config(TINY_FACTS | {"steps": 2})
    copied = decompose_config(config, out=tmp_path / "copied", target=facts_run.path)
    assert copied.info["target"]["sha256"] == facts_run.info["target"]["sha256"]
    named = decompose_config(config, out=tmp_path / "named", target=facts_run.path / "target")
    assert named.config.task.model == str(facts_run.path / "target")
    assert named.info["target"] == {"id": str(facts_run.path / "target"), "revision": None, "sha256": facts_run.info["target"]["sha256"]}
    assert not (tmp_path / "named" / "target").exists()
    assert open_run(tmp_path / "named").task.tokenizer is not None
    again = decompose_config(config, out=tmp_path / "named", target=facts_run.path / "target", resume=True)
    assert again.step == 2


def test_running_text_is_packed_and_drawn_once_an_epoch(facts_run, tmp_path: Path):
    file = tmp_path / "text.txt"
    file.write_text(" ".join(fact.sentence for fact in shipped_facts()[:120]), encoding="utf-8")
    tokenizer = facts_run.task.tokenizer
    settings = TextTask(model="x", source=str(file), length=8, held_out=0.2)
    task = text_task(settings, Target(facts_run.task.model, tokenizer, "test"), seed=0, batch=5)
    pieces = packed(tokenizer, [file.read_text(encoding="utf-8")], 8)
    train = len(pieces) - round(len(pieces) * 0.2)
    steps = [task.batch(step, "train").inputs["input_ids"] for step in range(train)]
    rows = torch.cat(steps)[: 5 * train].view(5, train, 8)  # five epochs
    for epoch in rows:
        assert sorted(map(tuple, epoch.tolist())) == sorted(map(tuple, pieces[:train].tolist()))
    assert not torch.equal(rows[0], rows[1])
    assert torch.equal(task.batch(1, "train").inputs["input_ids"], steps[1])
    held = {tuple(row) for row in task.batch(0, "evaluate").inputs["input_ids"].tolist()}
    assert held <= {tuple(row) for row in pieces[train:].tolist()}
    with pytest.raises(BatchError, match="fewer than one piece"):
        packed(tokenizer, ["Snow is white"], 8)


def test_text_has_a_second_stream_from_another_file(tmp_path: Path, facts_run):
    own, other = (tmp_path / name for name in ("own.txt", "other.txt"))
    own.write_text("Tiger Woods plays the sport of golf. " * 20)
    cities = {"France": "Paris", "Italy": "Rome", "Japan": "Tokyo", "Egypt": "Cairo", "Spain": "Madrid"}
    other.write_text(" ".join(f"The capital of {country} is {city}." for country, city in cities.items()) * 9)
    settings = TextTask(model="x", source=str(own), length=8, held_out=0.2, elsewhere=3, elsewhere_source=str(other))
    tokenizer = facts_run.task.tokenizer
    task = text_task(settings, Target(facts_run.task.model, tokenizer, "test"), seed=0, batch=5)
    assert settings.has_elsewhere
    assert task.elsewhere is not None
    first, again, second = task.elsewhere(0), task.elsewhere(0), task.elsewhere(1)
    assert first.inputs["input_ids"].shape == (3, 8)
    assert first.inputs["input_ids"].equal(again.inputs["input_ids"])
    assert not first.inputs["input_ids"].equal(second.inputs["input_ids"])
    assert "capital" in "".join(piece for row in first.texts for piece in row)
    assert "capital" not in "".join(piece for row in task.batch(0, "train").texts for piece in row)


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"elsewhere": 2}, "give its path as elsewhere_source"), ({"elsewhere_source": "b.txt"}, "no step reads it; give elsewhere")],
)
def test_a_second_stream_of_text_needs_its_file_and_its_size(fields: dict[str, object], message: str):
    with pytest.raises(ValidationError, match=message):
        TextTask(model="x", source="a.txt", **fields)


def test_text_files_that_cannot_be_read(facts_run, tmp_path: Path):
    language = Target(facts_run.task.model, facts_run.task.tokenizer, "test")
    lines = tmp_path / "x.jsonl"
    lines.write_text('{"text": "Snow is white"}\n{"txt": 3}\n', encoding="utf-8")
    for source, message in ((tmp_path / "none.txt", "cannot be read"), (lines, r"x.jsonl line 2: a JSON object with a field text")):
        with pytest.raises(ConfigError, match=message):
            text_task(TextTask(model="x", source=str(source)), language, seed=0, batch=1)


def test_a_text_run_end_to_end(facts_run, tmp_path: Path):
    file = tmp_path / "text.jsonl"
    file.write_text("\n".join(f'{{"text": "{fact.sentence}"}}' for fact in shipped_facts()[:60]), encoding="utf-8")
    task = {"kind": "text", "model": str(facts_run.path / "target"), "source": str(file), "length": 12}
    config = make_config(TINY_FACTS | {"task": task, "steps": 2, "gamma": {"kind": "shared", "d_gate": 2}})
    run = open_run(decompose_config(config, out=tmp_path / "run").path)
    assert run.step == 2
    assert run.task.batch(0, "evaluate").inputs["input_ids"].shape == (2, 12)


def test_gpt2_facts_is_figure_6():
    config = load_config("gpt2-facts")
    target = config.task.skeleton(batch=config.batch)
    assert (target.rows, target.length, target.vocabulary) == (2, 8, 50257)
    assert (config.batch, config.steps, config.C, config.gamma.kind, config.gamma.d_gate) == (2, 20000, 768, "vector", 64)
    assert config.losses.model_dump(exclude_defaults=True) == {
        "stochastic_recon": 0.1,
        "stochastic_recon_partial": 10.0,
        "stochastic_recon_layerwise": 0.1,
        "recon": 0.1,
        "recon_partial": 10.0,
        "faithfulness": 1e6,
        "minimality": 0.05,
    }
    assert (config.optim.name, config.optim.lr, config.optim.weight_decay, config.optim.schedule, config.optim.warmup) == (
        "adamw",
        0.001,
        0.05,
        "constant",
        0.01,
    )
    assert target.model.config.n_layer == 12


def test_a_language_model_can_be_loaded_from_the_run(facts_run):
    assert F.mse_loss(load_language(str(facts_run.path / "target")).model.lm_head.weight, facts_run.task.model.lm_head.weight).item() == 0


def test_the_local_loss_is_what_the_important_parts_do_not_write(facts_run):
    """By hand, position by position; one where nothing is important counts nowhere, and neither g nor the target gets a gradient."""
    run = facts_run
    batch = padded(run.task.tokenizer, [encode(run.task.tokenizer, each) for each in (KOBE, "Snow is white")])
    decomposition = run.decomposition
    target = decomposition.target_run(batch.inputs)
    rng = generator("local")
    g = {name: (torch.rand(*x.shape[:-1], 16, generator=rng) - 0.3).clamp(min=0).requires_grad_() for name, x in target.inputs.items()}
    with torch.no_grad():
        for value in g.values():
            value[0, 2] = 0
    found = local_loss(decomposition, target, g, present=batch.present)
    shares = []
    for site in decomposition.sites:
        missing = whole = 0.0
        for row, column in batch.present.nonzero().tolist():
            if (row, column) == (0, 2):
                continue
            x, mask = target.inputs[site.name][row, column].double(), g[site.name][row, column].double()
            written = x @ site.W.double()
            parts = sum(
                mask[c] * (x @ decomposition.U[site.name][:, c].double()) * decomposition.V[site.name][c].double() for c in range(16)
            )
            missing += (written - parts).square().sum().item()
            whole += written.square().sum().item()
        shares.append(missing / whole)
    assert found.item() == near(sum(shares) / len(shares), GPT)
    gradients = torch.autograd.grad(found, [*decomposition.parameters(), *g.values()], allow_unused=True)
    count = len(list(decomposition.parameters()))
    assert all(each.abs().sum() > 0 for each in gradients[:count])
    assert all(each is None for each in gradients[count:])
