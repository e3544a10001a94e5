"""Nothing about a sequence depends on what it is batched with: padding on either side counts in no loss, mean or count."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from paramlens import agreement, circuit, decompose, open_run, svd_baseline
from paramlens.analysis.catalogue import catalogue
from paramlens.analysis.components import inspect_subcomponent
from paramlens.analysis.edges import edges
from paramlens.config.model import Config
from paramlens.errors import BatchError
from paramlens.method.batch import Batch
from paramlens.method.decomposition import Decomposition
from paramlens.method.generators import generator
from paramlens.method.importance.network import Importance
from paramlens.method.importance.settings import Gamma
from paramlens.method.settings import Losses
from paramlens.method.sites import at_rest, find_sites
from paramlens.method.start import initialise
from paramlens.method.step import training_step
from paramlens.method.task import Task
from paramlens.runs.rundir import Run
from paramlens.tasks.batches import BatchForm, batch_function

LENGTHS = (7, 3, 5, 2)
SITES = ["model.layers.*.mlp.up_proj", "model.layers.*.self_attn.q_proj"]
CLOSE = {"rel": 1e-9, "abs": 1e-11}
"""Everything here is float64, whose rounding, of sums of some hundred terms of order one, is below 1e-12."""

ids = [torch.randint(1, 19, (n,), generator=generator("ids", i)) for i, n in enumerate(LENGTHS)]


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=19, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=32
    )
    model = LlamaForCausalLM(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.5, generator=generator("weights"))
    return model


def batched(rows: list[torch.Tensor], side: str, *, fill: int = 0, length: int | None = None) -> dict[str, torch.Tensor]:
    """A batch as tokenizers make it, positions numbered from each sequence's first token: a sequence is then the same to the last bit."""
    length = length or max(map(len, rows))
    tokens, mask = torch.full((len(rows), length), fill), torch.zeros(len(rows), length, dtype=torch.long)
    for row, own in enumerate(rows):
        place = slice(0, len(own)) if side == "right" else slice(length - len(own), None)
        tokens[row, place], mask[row, place] = own, 1
    return {"input_ids": tokens, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}


GAMMAS = [
    Gamma(kind="scalar", d_gate=3),
    Gamma(kind="vector", d_gate=3),
    Gamma(kind="shared", d_gate=3),
    Gamma(kind="attention", d_gate=3, relative_init="local"),
    Gamma(kind="attention", d_gate=3, relative="query"),
    Gamma(kind="attention_shared", d_gate=3),
    Gamma(kind="transformer", width=8, heads=2),
]
NAMES = ["scalar", "vector", "shared", "attention", "attention, query", "attention_shared", "transformer"]


def parts(model: LlamaForCausalLM, gamma: Gamma) -> tuple[Decomposition, Importance]:
    sites = find_sites(model, SITES)
    decomposition = Decomposition(model, sites, C=6, dtype=torch.float64)
    initialise(decomposition, Config().init.model_copy(update={"kind": "svd_rotated"}), generator=generator("start"))
    importance = Importance({site.name: (site.d_in, 6) for site in sites}, gamma, max_length=16).double()
    importance.initialise(generator("gamma"))
    with torch.no_grad():
        for name, parameter in importance.named_parameters():
            if name.endswith("b_out"):
                parameter.fill_(0.4)
    return decomposition, importance


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("gamma", GAMMAS, ids=NAMES)
def test_importances_of_a_sequence_are_its_own(model, gamma, side):
    decomposition, importance = parts(model, gamma)
    form = BatchForm(model)

    def g(rows: list[torch.Tensor], length: int | None = None) -> tuple[Batch, dict[str, torch.Tensor]]:
        batch = form(batched(rows, side, length=length), "batch")
        return batch, importance(decomposition.target_run(batch.inputs).inputs, decomposition.U, batch.present)

    with at_rest(model), torch.no_grad():
        batch, together = g(ids, length=9)
        assert batch.present is not None
        for row, own in enumerate(ids):
            _, alone = g([own])
            for site, value in together.items():
                torch.testing.assert_close(value[row][batch.present[row]], alone[site][0], rtol=1e-9, atol=1e-11)
                assert not value[row][~batch.present[row]].any()
        assert any((value[0] != value[0, :1]).any() for value in together.values())


LOSSES = {
    "recon": Losses(recon=1.0),
    "recon_layerwise": Losses(recon_layerwise=1.0),
    "stochastic": Losses(stochastic_recon=1.0, stochastic_recon_layerwise=1.0),
    "partial": Losses(recon_partial=1.0, stochastic_recon_partial=1.0),
    "partial by sequence": Losses(recon_partial=1.0, stochastic_recon_partial=1.0, partial_scope="sequence"),
    "partial by position": Losses(recon_partial=1.0, stochastic_recon_partial=1.0, partial_scope="position"),
    "minimality": Losses(minimality=1.0, p_final=0.5),
    "local": Losses(local=1.0),
}


@pytest.mark.parametrize("last_token_only", [False, True])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("losses", LOSSES.values(), ids=LOSSES)
def test_no_loss_and_no_gradient_sees_the_padding(model, losses, side, last_token_only):
    """Filled up with other tokens: the same numbers. Masks that are not random: the mean over the sequences alone."""
    decomposition, importance = parts(model, GAMMAS[3])
    config = Config(losses=losses, last_token_only=last_token_only, dtype="float64", C=6)
    task = Task(model, lambda step, stream: form({}, ""))
    form = BatchForm(model)

    def step(rows: list[torch.Tensor], fill: int = 0) -> tuple[dict[str, float], list[torch.Tensor]]:
        parameters = [*decomposition.parameters(), *importance.parameters()]
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        found = training_step(config, task, decomposition, importance, form(batched(rows, side, fill=fill), "batch"), 0)
        return {name: value.item() for name, value in found.losses.items()}, [parameter.grad for parameter in parameters]

    with at_rest(model), torch.enable_grad():
        (zeros, with_zeros), (sevens, with_sevens) = step(ids, fill=0), step(ids, fill=7)
        assert sevens == {name: pytest.approx(value, rel=1e-9) for name, value in zeros.items()}
        for a, b in zip(with_zeros, with_sevens, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-11)
        if losses in (LOSSES["recon"], LOSSES["recon_layerwise"], LOSSES["minimality"]):
            counts = [1 if last_token_only and "recon" in name else n for name in zeros for n in LENGTHS]
            alone = [step([own])[0] for own in ids]
            for name, value in zeros.items():
                mean = sum(each[name] * n for each, n in zip(alone, counts, strict=True)) / sum(counts)
                assert value == pytest.approx(mean, rel=1e-9)


def padded_both_ways() -> dict[str, list[dict[str, torch.Tensor]]]:
    """The same eight sequences as two batches filled up on either side, or one by one."""
    more = [torch.randint(1, 19, (n,), generator=generator("more", i)) for i, n in enumerate((4, 6, 2, 6))]
    both = [ids, more]
    batches = {side: [batched(rows, side, fill=3) for rows in both] for side in ("right", "left")}
    return batches | {"alone": [batched([own], "right") for rows in both for own in rows]}


@pytest.fixture(scope="module", params=[False, True], ids=["all positions", "last position"])
def runs(model, request, tmp_path_factory) -> dict[str, Run]:
    """One run, opened on the same sequences batched in three ways."""
    path = tmp_path_factory.mktemp("presence") / "run"
    batches = padded_both_ways()
    how = {"gamma": {"kind": "attention", "d_gate": 3, "output_bias": 0.3}, "init": {"kind": "svd_rotated"}, "dtype": "float64"}
    run = decompose(model, batches["right"], sites=SITES, C=6, steps=2, out=path, last_token_only=request.param, threads=1, **how)
    assert run.importance.table_length == 7
    return {name: open_run(path, model=model, batches=each) for name, each in batches.items()}


def test_table_1_is_of_sequences_not_of_batches(runs):
    """Whole metrics, counts, importances and interventions; the worst masks are chosen for a batch, and so are left out."""
    found = {name: circuit(run, batches=8 if name == "alone" else 2, adversary=0) for name, run in runs.items()}
    for name in ("left", "alone"):
        a, b = found["right"], found[name]
        assert a.sequences == b.sequences == 8
        assert {key: pytest.approx(value, **CLOSE) for key, value in a.metrics.items() if "stochastic" not in key} == {
            key: value for key, value in b.metrics.items() if "stochastic" not in key
        }
        for site in a.sites:
            assert a.sites[site].active == pytest.approx(b.sites[site].active)
            assert a.sites[site].importance == pytest.approx(b.sites[site].importance)
            assert a.sites[site].unique == b.sites[site].unique
            assert a.sites[site].unique > 0
        assert [each.kl for each in a.interventions] == pytest.approx([each.kl for each in b.interventions], rel=1e-7, abs=1e-11)
        assert a.example.tokens == b.example.tokens == [str(token) for token in ids[0].tolist()]
        assert a.example.importance == b.example.importance


@pytest.mark.slow
def test_other_analyses_are_of_sequences_too(runs):
    known = {name: 8 if name == "alone" else 2 for name in runs}
    catalogues = {name: catalogue(run, batches=known[name]) for name, run in runs.items()}
    pruned = {name: svd_baseline(run, batches=known[name], at_once=4) for name, run in runs.items()}
    linked = {name: edges(run, batches=known[name]) for name, run in runs.items()}
    agreed = {name: agreement([run, run], batches=known[name]) for name, run in runs.items()}
    positions = sum(LENGTHS) + sum((4, 6, 2, 6))
    for name in ("left", "alone"):
        assert catalogues["right"].positions == catalogues[name].positions == positions
        for site, each in catalogues["right"].sites.items():
            other = catalogues[name].sites[site]
            assert [part.what.subcomponent for part in each.parts] == [part.what.subcomponent for part in other.parts]
            assert [part.mean for part in each.parts] == pytest.approx([part.mean for part in other.parts])
            assert [part.highest for part in each.parts] == pytest.approx([part.highest for part in other.parts])
        assert [point.kl for point in pruned["right"].curve] == pytest.approx(
            [point.kl for point in pruned[name].curve], rel=1e-7, abs=1e-11
        )
        assert pruned["right"].decomposition[3].active == pytest.approx(pruned[name].decomposition[3].active)
        a, b = ({(each.source, each.target): each.inner for each in side.edges} for side in (linked["right"], linked[name]))
        assert a == pytest.approx(b)
        assert agreed["right"].sequences == agreed[name].sequences == 8
        assert {site: each.chance for site, each in agreed["right"].sites.items()} == pytest.approx(
            {site: each.chance for site, each in agreed[name].sites.items()}
        )
    shown = {name: inspect_subcomponent(runs[name], "model.layers.0.mlp.up_proj", 1) for name in ("right", "left")}
    assert shown["right"].tokens == shown["left"].tokens
    assert [len(row) for row in shown["left"].importance] == list(LENGTHS)
    for a, b in zip(shown["right"].importance, shown["left"].importance, strict=True):
        assert a == pytest.approx(b)


def test_shuffled_sequences_keep_their_own_tokens(runs):
    from paramlens.analysis.off_data import _elsewhere

    for side in ("right", "left"):
        batch = runs[side].task.batch(0, "circuit")
        found = _elsewhere(runs[side], batch)
        assert found is not None
        shuffled = found[1].token_ids
        for row, own in enumerate(ids):
            assert sorted(shuffled[row][batch.present[row]].tolist()) == sorted(own.tolist())
            assert (shuffled[row][~batch.present[row]] == 3).all()


class Bag(torch.nn.Module):
    """Not causal, and blind to the mask it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.up, self.out = torch.nn.Embedding(19, 8), torch.nn.Linear(8, 8), torch.nn.Linear(8, 19)

    def forward(self, input_ids, attention_mask, position_ids):
        hidden = self.up(self.embedding(input_ids))
        return self.out(hidden + hidden.mean(1, keepdim=True))


def test_a_model_that_looks_at_the_padding_is_refused(tmp_path):
    with pytest.raises(BatchError, match=r"sequence 3 of the first batch, filled up on the right, has other logits than alone"):
        decompose(Bag(), [batched(ids, "right")], out=tmp_path / "run", C=4, steps=1)
    assert not (tmp_path / "run").exists()


def test_positions_that_count_the_padding_are_refused_or_given(tmp_path):
    """GPT-2 numbers its positions from the first column unless it is told."""
    config = GPT2Config(vocab_size=19, n_positions=32, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    model, batch = GPT2LMHeadModel(config).eval(), batched(ids, "left")
    numbers = batch.pop("position_ids")
    with torch.no_grad():
        model.transformer.wpe.weight.normal_(generator=generator("wpe"))
    how = {"sites": ["*.c_fc"], "C": 4, "steps": 1}
    with pytest.raises(BatchError, match=r"filled up on the left, has other logits than alone.*give position_ids"):
        decompose(model, [batch], out=tmp_path / "refused", **how)
    numbered = batch | {"position_ids": numbers}
    run = decompose(model, [numbered], out=tmp_path / "run", **how)
    assert run.status == "finished"


def test_a_batch_may_say_itself_what_is_present(tmp_path, model):
    """A mask of the caller's own, for a model that takes none."""
    given = batched(ids, "right")
    explicit = Batch({name: given[name] for name in ("input_ids", "position_ids")}, present=given["attention_mask"].bool())
    how = {"sites": SITES, "C": 4, "steps": 1, "dtype": "float64", "threads": 1}
    a = decompose(model, [given], out=tmp_path / "a", **how)
    b = decompose(model, [explicit], out=tmp_path / "b", **how)
    assert [line["losses"] for line in a.metrics if "losses" in line] == [
        {name: pytest.approx(value, rel=1e-6) for name, value in line["losses"].items()} for line in b.metrics if "losses" in line
    ]


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.tensor([[1, 2, 1]]), "batch 0: attention_mask holds other numbers than 0 and 1"),
        (torch.tensor([[0, 0, 0]]), "batch 0: sequence 0 has no present position in attention_mask; leave it out"),
    ],
)
def test_masks_that_are_none(model, mask, message):
    with pytest.raises(BatchError, match=message):
        batch_function([{"input_ids": torch.tensor([[1, 2, 3]]), "attention_mask": mask}], model)(0, "train")


def test_a_mask_that_is_given_by_place(model):
    given = batched(ids, "right")
    placed = BatchForm(model)((given["input_ids"], given["attention_mask"]), "batch")
    assert torch.equal(placed.present, given["attention_mask"].bool())
    assert set(placed.inputs) == {"input_ids", "attention_mask"}
