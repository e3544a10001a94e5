import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from paramlens.errors import BatchError, SiteError
from paramlens.method.decomposition import Decomposition, call
from paramlens.method.generators import generator
from paramlens.method.losses.faithfulness import faithfulness
from paramlens.method.masks import Replacement
from paramlens.method.settings import Init
from paramlens.method.sites import find_sites
from paramlens.method.start import initialise, project, project_gradients
from paramlens.runs.decompose import decompose
from paramlens.tasks.induction.model import InductionTransformer
from rounding import TOY, TOY_STEP, assert_near, bound

PATTERN = ["blocks.*.attn.[qkv]"]


def decomposed(model: nn.Module, kind: str, C: int = 6, patterns: list[str] = PATTERN) -> Decomposition:
    decomposition = Decomposition(model, find_sites(model, patterns), C=C)
    initialise(decomposition, Init(kind=kind), generator=generator(0))
    return decomposition


def tokens(batch: int = 3, seed: int = 0) -> torch.Tensor:
    return torch.randint(7, (batch, 8), generator=generator("tokens", seed))


def test_nothing_replaced_is_bit_equal(target):
    decomposition = decomposed(target, "random")
    x = tokens()
    assert torch.equal(decomposition.target_run(x).logits, target(x))
    assert torch.equal(decomposition(x, [{}])[0], target(x))


def test_target_run_gives_each_sites_input(target):
    run = decomposed(target, "random").target_run(tokens())
    assert torch.equal(run.inputs["blocks.0.attn.v"], target.embed(tokens()))
    assert torch.equal(run.inputs["blocks.0.attn.q"], target.embed(tokens()) + target.positions)


@pytest.mark.parametrize(("kind", "C"), [("svd", 4), ("svd", 9), ("svd_rotated", 4), ("svd_rotated", 9)])
def test_svd_starts_hold_w_and_all_ones_masks_give_the_target(target, kind: str, C: int):
    decomposition = decomposed(target, kind, C)
    for site in decomposition.sites:
        assert_near(decomposition.U[site.name] @ decomposition.V[site.name], site.W, 4 * C)
    ones = {name: Replacement(torch.ones(3, 8, C)) for name in decomposition.names}
    assert_near(decomposition(tokens(), [ones])[0], target(tokens()), TOY + 8 * C)


@pytest.mark.parametrize("kind", ["svd", "svd_rotated"])
def test_too_few_subcomponents_hold_the_largest_singular_values(target, kind: str):
    decomposition = decomposed(target, kind, 2)
    for site in decomposition.sites:
        rest = torch.linalg.svdvals(site.W)[2:].norm()
        error = (site.W - decomposition.U[site.name] @ decomposition.V[site.name]).norm()
        assert_near(error, rest, 4 * 4 + 4, size=site.W.norm().item())


def test_rotated_start_favours_no_subcomponent(target):
    decomposition = decomposed(target, "svd_rotated", 12)
    norms = decomposition.U["blocks.0.attn.q"].norm(dim=0) * decomposition.V["blocks.0.attn.q"].norm(dim=1)
    assert norms.min() > 0


def test_random_start_has_the_weights_norm():
    torch.manual_seed(0)
    linear = nn.Linear(40, 60)
    decomposition = decomposed(nn.Sequential(linear), "random", 50, ["0"])
    norm = (decomposition.U["0"] @ decomposition.V["0"]).norm()
    assert 0.8 < (norm / linear.weight.norm()).item() < 1.25


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sets(st.integers(0, 5)), min_size=1, max_size=5), st.integers(0, 1000), st.booleans())
def test_stacked_plans_equal_single_runs(chosen, seed: int, scoped: bool):
    """Any mix of plans, scoped or not, gives what each gives alone; a plan that replaces nothing gives the target."""
    model = InductionTransformer(_TASK)
    decomposition = decomposed(model, "random")
    x = tokens(seed=seed)
    rng = generator("masks", seed)
    names = decomposition.names
    plans = [
        {
            names[i]: Replacement(
                torch.rand(3, 8, 6, generator=rng), where=torch.rand(3, 8, generator=rng) < 0.5 if scoped and i % 2 else None
            )
            for i in plan
        }
        for plan in chosen
    ]
    stacked = decomposition(x, plans)
    for plan, logits in zip(plans, stacked, strict=True):
        assert_near(logits, decomposition(x, [plan])[0], TOY)
    assert_near(decomposition(x, [{}, *plans])[0], model(x), TOY)


def test_scoped_replacement_mixes_by_position(target):
    """`where` everywhere is the full replacement, nowhere is the target."""
    decomposition = decomposed(target, "random")
    name, mask = "blocks.0.attn.v", torch.rand(3, 8, 6)
    full = decomposition(tokens(), [{name: Replacement(mask)}])
    everywhere = decomposition(tokens(), [{name: Replacement(mask, where=torch.ones(3, 8, dtype=torch.bool))}])
    nowhere = decomposition(tokens(), [{name: Replacement(mask, where=torch.zeros(3, 1, dtype=torch.bool))}])
    assert_near(everywhere, full, TOY)
    assert_near(nowhere[0], target(tokens()), TOY)
    assert (full[0] - target(tokens())).abs().max() > bound(100 * TOY, 1)


def test_last_logits_alone_take_the_masks_last_positions(target):
    decomposition = decomposed(target, "random")
    plans = [{name: Replacement(torch.rand(3, 8, 6)) for name in decomposition.names}, {}]
    full = decomposition(tokens(), plans)
    last = decomposition({"tokens": tokens(), "last_token_only": True}, plans)
    assert last.shape[-2] == 1
    assert_near(last[..., -1, :], full[..., -1, :], TOY)


def test_model_is_left_alone_after_an_error(target):
    decomposition = decomposed(target, "random")
    before = {name: value.clone() for name, value in target.state_dict().items()}
    with pytest.raises(BatchError, match=r"mask has leading axes \(2, 8\), the site's input \(3, 8\)"):
        decomposition(tokens(), [{"blocks.0.attn.q": Replacement(torch.ones(2, 8, 6))}])
    assert not any("forward" in module.__dict__ for module in target.modules())
    assert all(torch.equal(value, before[name]) for name, value in target.state_dict().items())


def test_plan_with_an_unknown_site(target):
    with pytest.raises(SiteError, match=r"plan names nope, which is no site"):
        decomposed(target, "random")(tokens(), [{"nope": Replacement(torch.ones(3, 8, 6))}])


def test_site_called_twice_is_refused():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x):
            return self.layer(self.layer(x))

    with pytest.raises(SiteError, match=r"site layer: the model calls it 2 times"):
        decomposed(Twice(), "random", patterns=["*"]).target_run(torch.ones(1, 2, 3))


def test_batches_of_every_form():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x, *, shift):
            return type("Output", (), {"logits": self.layer(x) + shift})()

    model = Named()
    x, shift = torch.randn(2, 4, 3), torch.randn(2, 4, 2)
    decomposition = decomposed(model, "random", patterns=["layer"])
    run = decomposition.target_run({"x": x, "shift": shift})
    assert torch.equal(run.logits, model(x, shift=shift).logits)
    stacked = decomposition({"x": x, "shift": shift}, [{}, {"layer": Replacement(torch.ones(2, 4, 6))}])
    assert_near(stacked[0], run.logits, 3 + 1)
    assert torch.equal(call(nn.Identity(), (x,)), x)

    class Nothing(nn.Module):
        def forward(self, x):
            return None

    with pytest.raises(BatchError, match="returned NoneType"):
        call(Nothing(), x)


class Residual(nn.Module):
    """Blocks as Hugging Face writes them: a tuple returned, a mask of the batch's size given by keyword."""

    def __init__(self, *, shares: bool = False):
        super().__init__()
        self.read = nn.Linear(3, 4)
        self.layers = nn.ModuleList(_Layer() for _ in range(3))
        self.write = nn.Linear(4, 5)
        self.shares = shares

    def forward(self, x):
        mask = (x[..., :1] > -1).float()
        hidden, first = self.read(x), None
        for layer in self.layers:
            hidden = layer(hidden, mask=mask, first=first)[0]
            if self.shares and first is None:
                first = self.layers[0].seen  # what a later block reads behind the chain's back
        return self.write(hidden)


class InPlace(nn.Module):
    """Blocks that add to the very tensor that the block before returned, and that a site has read."""

    def __init__(self):
        super().__init__()
        self.read = nn.Linear(3, 4)
        self.layers = nn.ModuleList(_Adding() for _ in range(3))
        self.write = nn.Linear(4, 5)

    def forward(self, x):
        hidden = self.read(x)
        for layer in self.layers:
            hidden = layer(hidden)
        return self.write(hidden)


class _Adding(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(4, 4)

    def forward(self, hidden):
        hidden += self.mix(hidden).tanh()
        return hidden[:]


def test_what_is_kept_of_a_run_is_as_it_was_when_the_model_writes_in_place():
    torch.manual_seed(3)
    model, x = InPlace(), torch.randn(2, 5, 3)
    with torch.no_grad():
        hidden, expected = model.read(x), []
        for layer in model.layers:
            expected.append(hidden)
            hidden = hidden + layer.mix(hidden).tanh()
    decomposition = decomposed(model, "svd", patterns=["layers.*", "write"])
    for _ in range(2):
        target = decomposition.target_run(x)
        for i, before in enumerate(expected):
            torch.testing.assert_close(target.inputs[f"layers.{i}.mix"], before)
        seen = decomposition.masked_inputs(x, {})
        torch.testing.assert_close(seen["layers.1.mix"], expected[1])
    decomposition.find_blocks(x)
    with torch.no_grad():
        target = decomposition.target_run(x)
        plan = {"layers.2.mix": Replacement(torch.zeros(2, 5, decomposition.C["layers.2.mix"]))}
        torch.testing.assert_close(decomposition(x, [plan, {}], target), decomposition(x, [plan, {}]))


class _Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(4, 4)
        self.rows, self.seen = [], None

    def forward(self, hidden, *, mask, first):
        self.rows.append(len(hidden))
        self.seen = self.mix(hidden).tanh()
        added = self.seen if first is None else self.seen + first
        return hidden + mask * added, None


def entered(model: nn.Module) -> tuple[Decomposition, torch.Tensor]:
    torch.manual_seed(3)
    x = torch.randn(2, 5, 3)
    decomposition = decomposed(model, "random", patterns=["layers.*", "write"])
    decomposition.find_blocks(x)
    for layer in model.layers:
        layer.rows.clear()
    return decomposition, x


def test_a_plan_enters_at_its_first_block():
    """Same logits and gradients as whole runs, in the plans' order, and no row through a block before its entry."""
    model = Residual()
    decomposition, x = entered(model)
    names = decomposition.names
    g = {name: torch.rand(2, 5, 6, requires_grad=True) for name in names}
    plans = [
        {"layers.2.mix": Replacement(g["layers.2.mix"], key=5)},
        {name: Replacement(g[name]) for name in names},
        {"write": Replacement(g["write"])},
        {"layers.1.mix": Replacement(g["layers.1.mix"]), "layers.2.mix": Replacement(g["layers.2.mix"])},
    ]
    assert [decomposition.entry(plan) for plan in plans] == [2, 0, 0, 1]
    target = decomposition.target_run(x)
    for layer in model.layers:
        layer.rows.clear()
    short = decomposition(x, plans, target)
    assert [layer.rows for layer in model.layers] == [[4], [6], [8]]
    whole = decomposition(x, plans)
    assert_near(short, whole, TOY)
    parameters = [*decomposition.parameters(), *g.values()]
    slope = torch.randn(short.shape, generator=generator("slope"))
    gradients = [torch.autograd.grad((slope * logits).sum(), parameters) for logits in (short, whole)]
    for mine, other in zip(*gradients, strict=True):
        assert_near(mine, other, TOY_STEP)
    late = decomposition(x, plans[:1], target)
    assert_near(late[0], whole[0], TOY)
    assert model.layers[0].rows[-1] == 8, "skipped: the last rows were those of the whole run"


def test_blocks_that_talk_behind_the_chain_are_run_whole():
    decomposition, x = entered(Residual(shares=True))
    assert decomposition.entry({"layers.2.mix": Replacement(torch.ones(2, 5, 6))}) == 0
    plans = [{"layers.2.mix": Replacement(torch.rand(2, 5, 6))}, {}]
    assert_near(decomposition(x, plans, decomposition.target_run(x))[1], decomposition.model(x), TOY)


def test_a_table_as_long_as_the_stack_is_not_cut(target):
    """Two plans of 4 sequences are as many rows as the toy has positions, which every block is given."""
    decomposition = decomposed(target, "random")
    x = torch.cat([tokens(), tokens(1)[:1]])
    decomposition.find_blocks(x)
    late, early = {"blocks.1.attn.v": Replacement(torch.rand(4, 8, 6))}, {"blocks.0.attn.v": Replacement(torch.rand(4, 8, 6))}
    assert decomposition.entry(late) == 1, "the chain holds, whatever the batch"
    whole = decomposition(x, [late, early])
    assert_near(decomposition(x, [late, early], decomposition.target_run(x)), whole, TOY)


def test_a_model_without_blocks_has_one_entry(target):
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    decomposition = decomposed(model, "random", patterns=["*"])
    decomposition.find_blocks(torch.randn(2, 3))
    assert decomposition.entry({"1": Replacement(torch.ones(2, 6))}) == 0
    toy = decomposed(target, "random")
    toy.find_blocks(tokens())
    assert [toy.entry({name: Replacement(torch.ones(3, 8, 6))}) for name in toy.names] == [0, 0, 0, 1, 1, 1]


def _task():
    from conftest import TINY
    from paramlens.config.file import make_config

    return make_config(TINY).task


_TASK = _task()


@pytest.mark.parametrize("C", [4, 7])
def test_project_reaches_w_by_the_smallest_change(target, C: int):
    """Once: what is left is second order, and no other change of U and V that does it to first order is smaller. Twice: rounding."""
    decomposition = Decomposition(target, find_sites(target, ["blocks.*.attn.[qkv]"]), C=C, dtype=torch.float32)
    initialise(decomposition, Init(kind="svd_rotated"), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for value in decomposition.parameters():
            value += 0.01 * torch.randn(value.shape, generator=torch.Generator().manual_seed(1))
    before, off = [value.detach().clone() for value in decomposition.parameters()], faithfulness(decomposition).item()
    project(decomposition)
    assert faithfulness(decomposition).item() < 0.01 * off
    change = torch.cat([(new.detach() - old).flatten() for new, old in zip(decomposition.parameters(), before, strict=True)]).double()
    site = decomposition.sites[0]
    (U, V), (dU, dV) = (
        [values[0].double(), values[len(decomposition.sites)].double()]
        for values in (before, [new.detach() - old for new, old in zip(decomposition.parameters(), before, strict=True)])
    )
    jacobian = torch.cat([torch.kron(torch.eye(site.d_in), V.T.contiguous()), torch.kron(U, torch.eye(site.d_out))], dim=1).double()
    smallest = torch.linalg.pinv(jacobian) @ (site.W.double() - U @ V).flatten()
    largest = max(value.abs().max().item() for value in decomposition.parameters())  # U and V are rounded, however small their change
    torch.testing.assert_close(torch.cat([dU.flatten(), dV.flatten()]), smallest, rtol=0, atol=bound(4 * C, largest))
    assert change.norm() < 0.5
    project(decomposition)
    assert faithfulness(decomposition).item() < bound(4 * C, site.W.abs().max().item()) ** 2


def test_project_leaves_what_it_cannot_reach(target):
    """With fewer subcomponents than rank it stays finite and never makes the sum worse."""
    decomposition = Decomposition(target, find_sites(target, ["blocks.0.attn.q"]), C=2, dtype=torch.float32)
    initialise(decomposition, Init(kind="svd"), generator=torch.Generator().manual_seed(0))
    off = faithfulness(decomposition).item()
    project(decomposition)
    assert faithfulness(decomposition).item() <= off * 1.001


def test_projected_gradients_leave_the_sum_alone(target):
    """No first-order change of U V is left in them, and what they lose is the smallest that achieves it: a second time changes nothing."""
    decomposition = Decomposition(target, find_sites(target, ["blocks.*.attn.[qkv]"]), C=7, dtype=torch.float32)
    initialise(decomposition, Init(kind="svd_rotated"), generator=torch.Generator().manual_seed(0))
    for value in decomposition.parameters():
        value.grad = torch.randn(value.shape, generator=torch.Generator().manual_seed(2))
    before = [value.grad.clone() for value in decomposition.parameters()]
    project_gradients(decomposition)
    for U, V in zip(decomposition._U, decomposition._V, strict=True):
        left, size = (U.grad @ V + U @ V.grad).abs().max(), U.grad.abs() @ V.abs() + U.abs() @ V.grad.abs()
        assert left < bound(40, size.max().item())  # the products, and a solution of 4 equations
    after = [value.grad.clone() for value in decomposition.parameters()]
    lost = sum(((new - old) * new).sum() for new, old in zip(after, before, strict=True))
    assert abs(lost) < bound(40, sum(old.square().sum().item() for old in before))  # what is lost stands at a right angle to what is kept
    project_gradients(decomposition)
    for value, kept in zip(decomposition.parameters(), after, strict=True):
        assert_near(value.grad, kept, 40)


def test_the_default_start_is_the_target_itself(tmp_path):
    """One step from it, at a rate that moves nothing, U V is still W where C reaches its rank."""
    torch.manual_seed(0)
    how = {"C": 3, "steps": 1, "gamma": {"kind": "vector"}, "optim": {"lr": 1e-12}}
    run = decompose(nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 4)), [torch.ones(2, 4, 3)], out=tmp_path / "run", sites="0", **how)
    assert run.metrics[-1]["evaluation"]["faithfulness"] < 1e-12


def test_sites_without_a_weight_are_refused(tmp_path):
    model = nn.Linear(3, 3)
    nn.init.zeros_(model.weight)
    with pytest.raises(SiteError, match=r"sites \*: every weight is 0, so there is nothing to decompose"):
        decompose(nn.Sequential(model), [torch.ones(2, 4, 3)], C=2, steps=1, out=tmp_path / "run", gamma={"kind": "vector"})
