"""Edits by subcomponents: the projection's algebra, the choice of what goes, weights that come back, and what every fact keeps."""

import dataclasses
import json
import statistics
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from paramlens.analysis.components import inspect_prompt, inspect_subcomponent, run_sentences
from paramlens.analysis.controls import CONTROLS, controls, independent_slices, without_activations
from paramlens.analysis.edit import Edit, Selected, answer_slopes, edit, project_out, suppress, unique
from paramlens.analysis.effect import _effect, evaluate_edit, perplexity
from paramlens.display.tables import Cell
from paramlens.errors import ConfigError, SiteError
from paramlens.method.decomposition import Decomposition
from paramlens.method.generators import generator
from paramlens.method.importance.network import Importance
from paramlens.method.settings import Init
from paramlens.method.sites import at_rest
from paramlens.method.start import initialise
from paramlens.page import report
from paramlens.tasks.facts.facts import Fact, fact_of, recall, shipped_facts
from paramlens.tasks.language_models.encoding import encode, model_inputs
from rounding import GPT, assert_near, bound, near

KOBE, TIGER = "Kobe Bryant plays the sport of basketball", "Tiger Woods plays the sport of golf"
FIRST = "transformer.h.0.mlp.c_fc"


def numbers(*shape: int, key: object) -> torch.Tensor:
    return torch.randn(shape, generator=generator("edit", str(key)), dtype=torch.float64)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 4), st.integers(0, 99))
def test_the_projection_leaves_nothing_along_any_slice_and_is_idempotent(d_in: int, d_out: int, r: int, key: int):
    W, reads, writes = numbers(d_in, d_out, key=key), numbers(d_in, r, key=(key, 1)), numbers(r, d_out, key=(key, 2))
    once = project_out(W, reads, writes)
    along = torch.einsum("ik,ij,kj->k", reads, once, writes)
    torch.testing.assert_close(along, torch.zeros(r, dtype=torch.float64), atol=1e-8, rtol=0)
    torch.testing.assert_close(project_out(once, reads, writes), once, atol=1e-8, rtol=0)
    assert once.norm() <= W.norm() + 1e-9


def test_one_slice_is_the_papers_formula():
    W, u, v = numbers(5, 4, key="W"), numbers(5, key="u"), numbers(4, key="v")
    u_hat, v_hat = u / u.norm(), v / v.norm()
    expected = W - (u_hat @ W @ v_hat) * torch.outer(u_hat, v_hat)
    torch.testing.assert_close(project_out(W, u[:, None], v[None]), expected)
    torch.testing.assert_close(project_out(W, 7 * u[:, None].repeat(1, 3), v[None].repeat(3, 1)), expected)  # the same slice three times
    q = torch.linalg.qr(numbers(5, 5, key="q")).Q
    summed = W - sum((q[:, k] @ W @ v_hat) * torch.outer(q[:, k], v_hat) for k in (0, 3))
    torch.testing.assert_close(project_out(W, q[:, [0, 3]], v[None].repeat(2, 1)), summed)


def test_taking_all_parts_out_leaves_what_the_parts_do_not_hold(facts_run):
    C = facts_run.decomposition.C[FIRST]
    everything = suppress(facts_run, subcomponents=[(FIRST, c) for c in range(C)], method="subtraction")
    [site] = [site for site in facts_run.decomposition.sites if site.name == FIRST]
    U, V = facts_run.decomposition.U[FIRST], facts_run.decomposition.V[FIRST]
    assert_near(everything.weights[FIRST], (site.W - U @ V).detach(), C + 1, size=(U.abs() @ V.abs()).max().item())


def test_the_model_is_changed_while_applied_and_comes_back_bit_for_bit(facts_run, tmp_path: Path):
    model, tokenizer = facts_run.task.model, facts_run.task.tokenizer
    before = {key: value.clone() for key, value in model.state_dict().items()}
    done = suppress(facts_run, subcomponents=[(FIRST, 0), (FIRST, 3)])
    inputs = model_inputs(torch.tensor([encode(tokenizer, KOBE)]))
    with at_rest(model), torch.no_grad():
        plain = model(**inputs).logits
        with done.applied() as edited:
            inside = edited(**inputs).logits
        with pytest.raises(RuntimeError), done.applied():
            raise RuntimeError
        copied = done.copy().eval()(**inputs).logits
        folder = done.save(tmp_path / "edited")
        opened = AutoModelForCausalLM.from_pretrained(folder).eval()(**inputs).logits
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not torch.equal(inside, plain)
    assert torch.equal(inside, copied)
    assert_near(opened, inside, GPT)
    assert (folder / "tokenizer.json").is_file()
    with pytest.raises(ConfigError, match="edited: exists; give a new folder"):
        done.save(folder)


def test_slopes_foretell_a_small_change(facts_run):
    """∂ log p / ∂y against the change of log p when one output moves a little, prompt and answer of two tokens."""
    model, fact = facts_run.task.model, Fact("Tiger Woods plays the sport of", "golf indeed")
    with at_rest(model):
        slopes = answer_slopes(facts_run, fact)
        module = model.get_submodule(FIRST)
        shift = 0.05 * torch.randn(module.nf, generator=generator("shift"))

        def log_p(sign: float) -> float:
            def moved(_module, _args, output):
                output = output.clone()
                output[:, 1] += sign * shift
                return output

            hook = module.register_forward_hook(moved)
            try:
                return recall(model, facts_run.task.tokenizer, [fact])[1].log().item()
            finally:
                hook.remove()

        assert (log_p(1) - log_p(-1)) / 2 == pytest.approx((slopes[FIRST][1] @ shift).item(), rel=0.05)


def test_what_is_unique_is_active_in_that_sentence_alone_and_comes_by_its_score(facts_run):
    ranked = unique(facts_run, "Kobe Bryant plays the sport of", threshold=0.3)
    seen = run_sentences(facts_run, [KOBE, TIGER])
    length = len(encode(facts_run.task.tokenizer, "Kobe Bryant plays the sport of"))
    expected = {
        (site, c) for site, g in seen.g.items() for c in ((g[0, :length] > 0.3).any(0) & ~(g[1] > 0.3).any(0)).nonzero()[:, 0].tolist()
    }
    assert {(each.site, each.subcomponent) for each in ranked} == expected
    assert len(expected) > 1
    scores = [each.importance * each.contribution for each in ranked]
    assert scores == sorted(scores, reverse=True)
    at_name = unique(facts_run, KOBE, tokens="Bryant", threshold=0.3)
    assert {each.position for each in at_name} == {1}
    assert {each.token for each in at_name} == {" Bryant"}
    one = unique(facts_run, KOBE, sites=["transformer.h.1.mlp.*"], threshold=0.3)
    assert {each.site for each in one} <= {"transformer.h.1.mlp.c_fc", "transformer.h.1.mlp.c_proj"}
    best = suppress(facts_run, unique_to=KOBE, top=2, threshold=0.3).selected
    assert list(best) == ranked[:2]
    each_token = suppress(facts_run, unique_to=KOBE, per_token=1, threshold=0.3).selected
    assert len({chosen.position for chosen in each_token}) == len(each_token) > 1
    for chosen in each_token:
        assert chosen == next(other for other in ranked if other.position == chosen.position)


def test_the_contribution_is_what_the_slice_writes_along_the_answers_slope(facts_run):
    first = unique(facts_run, KOBE, threshold=0.3)[0]
    with at_rest(facts_run.task.model):
        slope = answer_slopes(facts_run, fact_of(KOBE, shipped_facts()))[first.site][first.position]
    x = run_sentences(facts_run, [KOBE]).inputs[first.site][0, first.position]
    u, v = facts_run.decomposition.U[first.site][:, first.subcomponent], facts_run.decomposition.V[first.site][first.subcomponent]
    assert first.contribution == near(((x @ u) * (v @ slope)).item(), GPT, size=((x @ u).abs() * (v.abs() @ slope.abs())).item())


def test_the_effect_is_measured_fact_by_fact(facts_run):
    model, tokenizer = facts_run.task.model, facts_run.task.tokenizer
    facts = [fact_of(KOBE, shipped_facts()), fact_of(TIGER, shipped_facts()), *shipped_facts()[2:5], *shipped_facts()[-9:]]
    done = edit(facts_run, [Selected(FIRST, 1, 0), Selected(FIRST, 2, 1), Selected("transformer.h.1.mlp.c_proj", 5, 1)])
    result = evaluate_edit(facts_run, done, KOBE, facts=facts, texts=["Snow is cold and white"])
    with at_rest(model):
        _, before = recall(model, tokenizer, facts)
        with done.applied():
            _, after = recall(model, tokenizer, facts)
            lost = perplexity(model, tokenizer, ["Snow is cold and white"])
    for mine, other in zip(result.facts, zip(before.tolist(), after.tolist(), strict=True), strict=True):
        assert (mine.before, mine.after) == tuple(near(p, GPT) for p in other)
    assert result.effect.perplexity == near(lost, GPT)
    assert result.perplexity_before != near(lost, GPT)
    for kind, (known, count) in result.known.items():
        own = [each for each in result.facts if each.kind == kind]
        ratios = [each.after / each.before for each in own if each.right_before]
        assert (known, count) == (len(ratios), len(own))
        assert result.effect.kept[kind] == (pytest.approx(statistics.median(ratios)) if ratios else None)
    assert {each.kind for each in result.facts} >= {"target", "other-target", "same-sport", "general", "reverse"}
    assert set(result.controls) == {"random directions", "top singular directions", "random subcomponents", "activation read"}
    assert json.loads(json.dumps(result.to_json()))["selected"][0]["site"] == FIRST


def test_controls_take_as_many_slices_at_the_same_sites(facts_run):
    chosen = [Selected(FIRST, 1, 0), Selected(FIRST, 2, 1), Selected("transformer.h.1.mlp.c_proj", 5, 1)]
    done = edit(facts_run, chosen)
    ranks = {FIRST: 2, "transformer.h.1.mlp.c_proj": 1}
    weights = {site.name: site.W for site in facts_run.decomposition.sites}
    with at_rest(facts_run.task.model):
        found = controls(facts_run, done, fact_of(KOBE, shipped_facts()), CONTROLS)
    made = {name: each.draws for name, each in found.items()}
    assert {each.slices for each in found.values()} == {3}
    assert {name: len(draws) for name, draws in made.items()}["random directions"] == 5
    for draws in made.values():
        for draw in draws:
            assert draw.keys() == ranks.keys()
            for site, W in draw.items():
                sizes = torch.linalg.svdvals((weights[site] - W).double())
                rounding = bound(64, W.abs().max().item())  # of the weight, and of sums over its longer side
                assert sizes[ranks[site]] < rounding < sizes[ranks[site] - 1]
    first, second = made["random subcomponents"][:2]
    assert not torch.equal(first[FIRST], second[FIRST])


def test_the_activation_edit_writes_nothing_for_those_activations():
    W, x = numbers(6, 4, key="W"), numbers(2, 6, key="x")
    edited = without_activations(W, x)
    torch.testing.assert_close(x @ edited, torch.zeros(2, 4, dtype=torch.float64), atol=1e-10, rtol=0)
    other = numbers(6, key="y")
    other -= x.T @ torch.linalg.lstsq(x.T, other[:, None]).solution[:, 0]
    torch.testing.assert_close(other @ edited, other @ W)


def test_equal_activations_are_read_once():
    """A QR of three rows of which two are equal would make up a third direction, and take out what nothing reads."""
    W, x = numbers(6, 4, key="W"), numbers(2, 6, key="x")
    torch.testing.assert_close(without_activations(W, x[[0, 1, 0]]), without_activations(W, x))


def test_a_control_that_would_take_out_less_is_left_out_with_the_reason(facts_run):
    """All but two subcomponents of a site taken out; all of a site whose weight has fewer singular directions; parts that write nothing."""
    C, fact = facts_run.decomposition.C[FIRST], fact_of(KOBE, shipped_facts())
    most = edit(facts_run, [Selected(FIRST, c) for c in range(C - 2)])
    result = evaluate_edit(facts_run, most, KOBE, facts=[fact])
    reason = f"{FIRST} has 2 other subcomponents that write anything, and {C - 2} were removed"
    assert "random subcomponents" not in result.controls
    assert result.controls_left_out == {"random subcomponents": reason}
    assert f"no control by random subcomponents: {reason}" in {note.text for note in result.tables()[1].notes}
    with torch.no_grad():
        W, V = (facts_run.decomposition.sites[0].W, facts_run.decomposition.V[FIRST])
        before = V.clone()
        V[3:] = 0
        few = controls(facts_run, edit(facts_run, [Selected(FIRST, 0), Selected(FIRST, 1)]), fact, CONTROLS)
        V.copy_(before)
    assert few["random subcomponents"].why_not == f"{FIRST} has 1 other subcomponents that write anything, and 2 were removed"
    assert few["top singular directions"].why_not is None
    sites = facts_run.decomposition.sites
    wide = Importance({site.name: (site.d_seen, 20) for site in sites}, facts_run.importance.gamma)
    narrow = dataclasses.replace(facts_run, decomposition=Decomposition(facts_run.task.model, sites, C=20), importance=wide)
    initialise(narrow.decomposition, Init(kind="random"), generator=generator("narrow"))
    everything = controls(narrow, edit(narrow, [Selected(FIRST, c) for c in range(18)]), fact, CONTROLS)
    assert everything["top singular directions"].why_not == f"{FIRST} has 16 singular directions, and 18 subcomponents were removed"
    assert everything["random directions"].slices == 18
    assert W.shape[0] == 16


def test_independent_slices_are_counted():
    u, v, W = numbers(4, 3, key="u"), numbers(3, 5, key="v"), numbers(4, 5, key="W")
    assert independent_slices(u, v, of=W) == 3
    assert independent_slices(u[:, [0, 0, 1]], v[[0, 0, 1]], of=W) == 2
    assert independent_slices(u[:, [0, 0, 1]], v[[0, 2, 1]], of=W) == 3
    assert independent_slices(u, torch.cat([v[:2], torch.zeros(1, 5, dtype=torch.float64)]), of=W) == 2


def test_what_is_kept_is_of_the_facts_that_were_known():
    """0.9 → 0.45 and 0.8 → 0.8 known, 0.01 → 0.1 not: the median is of the first two; of a kind with none known there is none."""
    fact = Fact("a", "b")
    named = [(fact, "target"), (fact, "general"), (fact, "general"), (fact, "general")]
    before, after = (torch.tensor(values, dtype=torch.float64) for values in ([0.02, 0.9, 0.8, 0.01], [0.0196, 0.45, 0.8, 0.1]))
    known, right = torch.tensor([False, True, True, False]), torch.tensor([False, False, True, True])
    found = _effect(named, before, known, after, right, None)
    assert found.kept == {"target": None, "general": pytest.approx(0.75)}
    assert found.kept_mean == {"target": None, "general": pytest.approx(0.75)}
    assert found.right == {"target": None, "general": 0.5}


def test_an_edit_of_what_is_not_to_be_trusted_says_so(facts_run):
    """A model trained for four steps, decomposed for six: it knows little, and the masked model is far from it."""
    done = edit(facts_run, [Selected(FIRST, 1)])
    result = evaluate_edit(facts_run, done, KOBE, controls=())
    failed = [verdict for verdict in result.verdicts if verdict.standing == "fails"]
    assert "target" in {verdict.name for verdict in failed}
    assert done.warnings[0] == "the target had not converged when its training ended: this is an edit of a half-trained model"
    assert all(f"{verdict.name} {verdict.figure}" in done.warnings[1] for verdict in failed if verdict.name != "target")
    assert set(done.warnings) <= {note.text for note in done.tables()[0].notes}
    assert result.facts[0].right_before is False
    assert result.warnings[2].startswith("the model does not know the target: P('basketball') is ")
    notes = [note.text for table in result.tables() for note in table.notes]
    assert any(note.startswith("P('basketball') after 'Kobe Bryant plays the sport of': ") for note in notes)
    assert result.tables()[1].rows[0][1:] == (Cell("0 of 1"), Cell("-", "faint"))


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({}, ConfigError, "give a sentence whose own subcomponents go, or a site"),
        ({"unique_to": KOBE, "subcomponents": [(FIRST, 0)]}, ConfigError, "one of the two"),
        ({"subcomponents": [(FIRST, 16)]}, SiteError, "c_fc: no subcomponent 16; there are 16, 0 to 15"),
        ({"subcomponents": [("nowhere", 0)]}, SiteError, "site nowhere: not of this run; its sites: transformer.h.0.attn.c_attn"),
        ({"unique_to": KOBE, "top": 0}, ConfigError, "top 0: give 1 or more"),
        ({"unique_to": KOBE, "tokens": "Tiger"}, ConfigError, "'Tiger': not in"),
        ({"unique_to": KOBE, "threshold": 1.0}, ConfigError, "threshold 1.0: importances lie"),
        ({"unique_to": "Kobe"}, ConfigError, "'Kobe': one word"),
        ({"unique_to": KOBE, "sites": ["nowhere"]}, SiteError, "sites 'nowhere' matches no weight matrix"),
    ],
)
def test_what_does_not_exist_is_refused(facts_run, wrong: dict, error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        suppress(facts_run, **wrong)


def test_a_run_without_a_tokenizer_has_no_sentences(tiny_run):
    with pytest.raises(ConfigError, match="no language model with a tokenizer"):
        suppress(tiny_run, unique_to=KOBE)
    with pytest.raises(ConfigError, match="inspect: give a prompt"):
        inspect_prompt(tiny_run)


def test_inspection_counts_what_is_active(facts_run):
    found = inspect_prompt(facts_run, TIGER, threshold=0.3)
    g = run_sentences(facts_run, [TIGER]).g
    assert "".join(found.tokens) == TIGER
    assert len(found.active) == sum(int((value > 0.3).sum()) for value in g.values())
    assert found.by_site[FIRST] == (g[FIRST][0] > 0.3).sum(1).tolist()
    one = found.active[0]
    assert one.importance == pytest.approx(g[one.site][0, one.position, one.subcomponent].item(), abs=bound(GPT, 1))
    assert {(site, c) for site, c in found.unique} <= {(each.site, each.subcomponent) for each in found.active}
    assert inspect_prompt(facts_run).prompt == KOBE


def test_what_a_subcomponent_reads_goes_through_its_norm(facts_run):
    """By hand at a first layer: the embedding through ln_2, along u; at the last layer of an MLP what v does to the logits."""
    model, tokenizer = facts_run.task.model, facts_run.task.tokenizer
    found = inspect_subcomponent(facts_run, FIRST, 2, top=3)
    block, u = model.transformer.h[0], facts_run.decomposition.U[FIRST][:, 2]
    with torch.no_grad():
        read = block.ln_2(model.transformer.wte.weight) @ u
        at = block.ln_2(model.transformer.wpe.weight) @ u
    best = read.abs().topk(3).indices.tolist()
    assert [each.value for each in found.reads] == near(read[best].tolist(), 64)
    assert found.reads[0].what.strip() == tokenizer.decode([best[0]]).strip()
    assert found.positions[0].what == str(at.abs().argmax().item())
    assert found.writes == []
    assert len(found.inner) == 2
    assert len(found.importance[0]) == len(encode(tokenizer, KOBE))
    out = inspect_subcomponent(facts_run, "transformer.h.1.mlp.c_proj", 1, top=2)
    v = facts_run.decomposition.V["transformer.h.1.mlp.c_proj"][1]
    logits = model.lm_head.weight @ ((v - v.mean()) * model.transformer.ln_f.weight)
    assert out.reads == []
    assert [each.value for each in out.writes] == near(logits.topk(2).values.tolist(), 64)
    assert out.suppresses[0].value == near(logits.min().item(), 64)
    with pytest.raises(SiteError, match="no subcomponent 99"):
        inspect_subcomponent(facts_run, FIRST, 99)


def test_the_page_shows_edits_and_what_is_active(facts_run, tmp_path: Path):
    import shutil

    shutil.copytree(facts_run.path, tmp_path / "run")
    run = dataclasses.replace(facts_run, path=tmp_path / "run")
    done = suppress(run, unique_to=KOBE, top=2, threshold=0.3)
    facts = [*shipped_facts()[:3], Fact("A <script>alert(1)</script> is", "bad")]
    for _ in range(2):  # the second replaces the first
        document = evaluate_edit(run, done, KOBE, facts=facts).to_json()
        run.keep_analysis("suppress", "edits", document, same=("target", "method", "selected"))
    html = report(run).read_text(encoding="utf-8")
    assert html.count('class="suppression-table"') == 1
    assert html.count('class="inspection-table"') == 2
    assert "plot-suppress-0" in html
    assert "<script>alert(1)" not in html
    assert "&lt;script&gt;alert(1)" in html


def test_an_edit_of_nothing_is_the_model(facts_run):
    nothing = Edit(facts_run.task.model, facts_run.task.tokenizer, (), "projection", {})
    with nothing.applied() as model:
        assert model is facts_run.task.model
