"""What gradients come to: against plain SVDs in float64, on planted subspaces, and where too little is known."""

import pytest
import torch

from galore_torch.projection import overlap
from galore_torch.training.inspection.config import RecommendConfig, configure
from galore_torch.training.inspection.figures import ModuleGroup, group_by_module, module_names, recommend
from galore_torch.training.inspection.history import GradientHistory

CLOSE = {"atol": 2e-6, "rtol": 2e-6}


def drifting(shape, count, seed=0):
    """Gradients that change from one to the next, and keep something of each other."""
    generator = torch.Generator().manual_seed(seed)
    grad = torch.randn(shape, dtype=torch.float64, generator=generator)
    for _ in range(count):
        yield grad
        grad = grad + 0.5 * torch.randn(shape, dtype=torch.float64, generator=generator)


def history_of(grads, *, rank=3, ages=3, every=2, name="layers.0.q_proj.weight"):
    grads = list(grads)
    history = GradientHistory(name, tuple(next(grad.shape for grad in grads if grad is not None)), rank, ages)
    for place, grad in enumerate(grads, 1):
        history.add(place * every, grad)
    return history


def summary(*histories, every=2):
    (own,) = group_by_module(histories).values()
    return ModuleGroup(own, every)


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (6, 6)], ids=str)
def test_figures_are_those_of_plain_svds(shape):
    grads, rank, ages, side = list(drifting(shape, 5)), 3, 3, min(shape)
    history = history_of(grads, rank=rank, ages=ages)
    tall = shape[0] > shape[1]
    svds = [torch.linalg.svd(grad, full_matrices=False) for grad in grads]
    bases = [right.mT if tall else left for left, _, right in svds]

    def share(grad, basis):
        image = grad @ basis if tall else basis.mT @ grad
        return float(image.square().sum() / grad.square().sum())

    assert [snapshot.step for snapshot in history.snapshots] == [2, 4, 6, 8, 10]
    for snapshot, (_, values, _) in zip(history.snapshots, svds, strict=True):
        energies = values.square()
        assert snapshot.stable_rank == pytest.approx(float(energies.sum() / energies[0]))
        held = energies.cumsum(0) / energies.sum()
        assert snapshot.own == pytest.approx(float(held[rank - 1]))
        assert snapshot.ranks == tuple(int((held < wanted).sum()) + 1 for wanted in (0.5, 0.9, 0.99))
    group = summary(history)
    for age in range(1, ages + 1):
        pairs = [(old, old + age) for old in range(len(grads) - age)]
        assert group.pairs[2 * age] == len(pairs)
        for at in range(1, side + 1):
            told = sum(share(grads[new], bases[old][:, :at]) for old, new in pairs) / len(pairs)
            young = sum(share(grads[new], bases[new - 1][:, :at]) for _, new in pairs) / len(pairs)
            torch.testing.assert_close(float(group.captured[2 * age][at - 1]), told, **CLOSE)
            torch.testing.assert_close(float(group.kept[2 * age][at - 1]), told / young, **CLOSE)
        both = [overlap({"left": bases[new][:, :rank]}, {"left": bases[old][:, :rank]}) for old, new in pairs]
        assert group.overlap[2 * age] == pytest.approx(float(sum(both)) / len(both), abs=2e-6)
    first = share(grads[3], bases[2][:, :rank])
    assert history.snapshots[3].captured == pytest.approx(first, abs=2e-6)
    assert history.snapshots[0].captured is history.snapshots[0].overlap is None


def test_a_stack_is_told_by_the_energy_of_all_and_an_expert_without_tokens_does_not_count():
    grads = list(drifting((3, 5, 8), 3))
    for grad in grads:
        grad[1] = 0
        grad[2] *= 2
    alone = [history_of([grad[place] for grad in grads]) for place in (0, 2)]
    history = history_of(grads)
    energies = torch.stack([torch.linalg.svdvals(grad).square().sum(0) for grad in grads])
    held = (energies.cumsum(-1) / energies.sum(-1, keepdim=True)).sum(0)
    torch.testing.assert_close(history.held, held, **CLOSE)
    assert history.snapshots[1].stable_rank == pytest.approx(sum(one.snapshots[1].stable_rank for one in alone) / 2)
    assert history.snapshots[1].overlap == pytest.approx(sum(one.snapshots[1].overlap for one in alone) / 2, abs=1e-6)


def test_a_planted_rank_is_found():
    torch.manual_seed(0)
    left = torch.linalg.qr(torch.randn(32, 5, dtype=torch.float64)).Q
    grads = [left @ torch.randn(5, 48, dtype=torch.float64) + 1e-4 * torch.randn(32, 48) for _ in range(6)]
    group = summary(history_of(grads, rank=5))
    assert group.ranks[2] <= 5
    assert float(group.held[4]) > 1 - 1e-5
    assert all(float(curve[4]) > 1 - 1e-5 for curve in group.captured.values())
    assert all(value > 1 - 1e-5 for value in group.overlap.values())
    recommended = recommend(group, RecommendConfig(capture_share=0.99, rank_multiple=1))
    assert (recommended.rank, recommended.gap, recommended.at_least, recommended.why_not) == (5, 6, True, "")
    assert recommend(group, RecommendConfig(capture_share=0.99)).rank == 8


def turning(count, rank=6, side=20):
    """At each look the first of `rank` equal directions is left for a new one."""
    for start in range(count):
        grad = torch.zeros(side, 30, dtype=torch.float64)
        for direction in range(start, start + rank):
            grad[direction, direction] = 1
        yield grad


def test_a_turning_subspace_is_left_by_one_direction_a_look():
    group = summary(history_of(turning(8), rank=6, ages=5, every=4), every=4)
    for age in range(1, 6):
        assert float(group.captured[4 * age][5]) == pytest.approx(1 - age / 6, abs=1e-6)
        assert group.overlap[4 * age] == pytest.approx((1 - age / 6 - 0.3) / 0.7, abs=1e-6)
    # Of what the young hold, 5 of 6 directions, four fifths are left after two looks and three fifths after three.
    rule = RecommendConfig(rank_multiple=6, capture_share=0.8, keep_share=0.79)
    assert recommend(group, rule).gap == 8
    assert not recommend(group, rule).at_least
    assert recommend(group, RecommendConfig(rank_multiple=6, capture_share=0.8, keep_share=0.59)).gap == 12
    assert recommend(group, RecommendConfig(rank_multiple=6, capture_share=0.9)).rank in (12, 18, 20)
    assert recommend(group, RecommendConfig(rank_multiple=32, capture_share=0.9)).rank == 20


def test_young_and_old_bases_are_compared_on_the_same_gradients():
    """Gradients whose noise dies away: old bases meet only the late ones, and seem better than young ones."""
    torch.manual_seed(0)
    fixed = torch.zeros(12, 16, dtype=torch.float64)
    fixed[:2, :2] = 10 * torch.eye(2)
    grads = [fixed + 0.8 * 0.6**place * torch.randn(12, 16, dtype=torch.float64) for place in range(6)]
    group = summary(history_of(grads, rank=2, ages=4))
    assert float(group.captured[8][1]) > float(group.captured[2][1])
    assert 0.8 < float(group.kept[8][1]) < 1


@pytest.mark.parametrize(
    "bad", [None, torch.zeros(5, 8), torch.full((5, 8), torch.nan), torch.full((5, 8), torch.inf)], ids=str
)
def test_a_gradient_that_tells_nothing_is_left_out_and_its_ages_with_it(bad):
    grads = [*drifting((5, 8), 5)]
    history = history_of([*grads[:2], bad, *grads[3:]])
    assert history.skipped == [6]
    assert [snapshot.step for snapshot in history.snapshots] == [2, 4, 8, 10]
    assert [snapshot.captured is None for snapshot in history.snapshots] == [True, False, True, False]
    # The pairs (2, 4) and (8, 10); gradient 10 has a young basis, and so judges that of age 6.
    assert summary(history).pairs == {2: 2, 6: 1}
    assert all(torch.isfinite(curve).all() for curve in summary(history).captured.values())


def test_the_gradient_is_neither_changed_nor_kept():
    grad = next(drifting((5, 8), 1)).to(torch.bfloat16)
    before = grad.clone()
    history = history_of([grad])
    assert torch.equal(grad, before)
    assert all(basis[0].shape == (1, 5, 5) for basis in history._bases)


def test_bases_that_are_too_old_are_dropped():
    history = history_of(drifting((5, 8), 9), ages=2)
    assert len(history._bases) == 2


@pytest.mark.parametrize(("looks", "rank", "gap"), [(2, None, None), (3, 8, None), (4, 8, 4)])
def test_too_few_looks_are_said_and_no_figure_is_made_up(looks, rank, gap):
    group = summary(history_of(drifting((16, 24), looks), ages=max(1, looks - 1)))
    recommended = recommend(group, RecommendConfig(capture_share=0.1, keep_share=0.01))
    assert (recommended.rank, recommended.gap) == (rank, gap)
    assert bool(recommended.why_not) == (gap is None)


def test_kinds_are_told_apart_by_name_and_shape():
    names = [f"model.layers.{layer}.mlp.{part}.weight" for layer in (0, 11) for part in ("experts.7.up", "shared.up")]
    assert set(module_names(names).values()) == {"experts.up", "shared.up"}
    assert module_names(["score.weight"]) == {"score.weight": "score"}
    histories = [
        GradientHistory(f"h.{place}.c.weight", shape, 2, 1) for place, shape in enumerate([(4, 6), (4, 6), (6, 4)])
    ]
    assert {name: len(own) for name, own in group_by_module(histories).items()} == {"c 4x6": 2, "c 6x4": 1}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"steps": 1}, "steps = 1 is out of range"),
        ({"steps": 9, "every": 5}, "steps = 9 gives 1 snapshots at every = 5.* at least 10"),
        ({"oldest": 7}, "oldest = 7, .*multiples of every = 5; give one of them up to 55"),
        ({"oldest": 60}, "oldest = 60, and in steps = 60 .*every = 5; give one of them up to 55, or more steps"),
        ({"capture_share": 1.0}, "capture_share = 1.0 is out of range"),
        ({"keep_share": 0}, "keep_share = 0 is out of range"),
        ({"rank_multiple": 0}, "rank_multiple = 0 is out of range"),
        ({"state_budget": "lots"}, "state_budget = 'lots' is no size; give .* such as 200MB"),
        ({"lr": -1.0}, "lr = -1.0 is out of range"),
        ({"task": "sstt"}, "task = 'sstt' is not known.*did you mean 'sst2'"),
        ({"task": "classify", "cache": "x"}, "cache = 'x' has no effect with task = 'classify'"),
        ({"label_column": "stars"}, "label_column = 'stars' has no effect with task = 'text'"),
        ({"tanks": 4}, "tanks = 4 is no setting of an inspection; did you mean"),
    ],
)
def test_settings_that_do_not_fit_are_told(given, words):
    with pytest.raises(ValueError, match=words):
        configure(**given)


def test_ages_leave_two_gradients_for_the_oldest_basis():
    assert configure().snapshots.ages == tuple(range(5, 51, 5))
    assert configure(steps=10).snapshots.ages == (5,)
    assert configure(steps=20, oldest=15).snapshots.ages == (5, 10, 15)
