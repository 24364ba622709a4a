"""Cuts held against trying every cut; the rule held against each of its readers."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from partitioner import measures, thresholds, tiers
from partitioner.measures import Floats
from partitioner.thresholds import Impossible, Objective, Requirement, Values, fit

COSTS = ((0.0, 1.0, 2.0, 5.0), (0.5, 0.0, 1.0, 3.0), (4.0, 1.5, 0.0, 1.0), (9.0, 4.0, 0.5, 0.0))
OBJECTIVES = [
    Objective("macro_f1"),
    Objective("accuracy"),
    Objective("kappa"),
    Objective("cost", costs=COSTS),
    Objective("recall", label=4),
    Objective("recall", label=3),
]
REQUIREMENTS = [
    (),
    (Requirement("precision", 4, 0.8),),
    (Requirement("shown", 3, 0.3, of=1),),
    (Requirement("precision", 4, 0.6), Requirement("recall", 3, 0.5)),
]


def every_cut(c: Floats) -> list[float]:
    """One τ for each way to cut: all values, what lies between them, and both ends."""
    values = sorted({0.0, 1.0, *np.minimum(c, 1.0).ravel().tolist()})
    return sorted({*values, *((a + b) / 2 for a, b in itertools.pairwise(values))})


def reached(objective: Objective, confusion: Floats) -> Floats:
    """What is made best [..., 2]: the objective, and where that is recall, accuracy after it."""
    second = measures.accuracy(confusion) if objective.name == "recall" else np.zeros(confusion.shape[:-2])
    return np.stack([objective.value(confusion), second], axis=-1)


def brute_force(
    c: Floats, weights: Floats, rule: str, objective: Objective, requirements: tuple[Requirement, ...]
) -> Floats | None:
    """The best that is `reached` over every cut, each tried by the rule itself; None where none may be."""
    taus = every_cut(c)
    tried = [(t, t, t) for t in taus] if rule == "one" else itertools.combinations_with_replacement(taus[::-1], 3)
    triples = np.array(list(tried))
    given_now = tiers.cut(c, triples[:, None, :])  # [triple, row]
    confusion = np.stack([np.where((given_now == k)[..., None], weights, 0.0).sum(1) for k in (4, 3, 2, 1)], axis=-1)
    allowed = np.ones(len(triples), dtype=bool)
    for r in requirements:
        allowed &= r.met(confusion[:, :, : tiers.BOUNDARIES.index(r.label) + 1].sum(-1), weights.sum(0))
    if not allowed.any():
        return None
    found = reached(objective, confusion[allowed])
    first = found[:, 0].max()
    return np.array([first, found[found[:, 0] >= first - 1e-12, 1].max()])


def rows_of(seed: int, n: int, values: int, labels: int = 4) -> tuple[Floats, Floats]:
    """Probabilities from few values, so that they tie, 0 and 1 among them; every third row has raters."""
    random = np.random.default_rng(seed)
    parts = random.integers(0, values, size=(n, 4)).astype(float)
    parts[parts.sum(1) == 0, 0] = 1
    p = parts / parts.sum(1, keepdims=True)
    raters = random.integers(4 - labels, 4, size=(n, 3))
    raters[np.arange(n) % 3 > 0, 1:] = raters[np.arange(n) % 3 > 0, :1]
    weights = np.stack([(raters == y).mean(1) for y in range(4)], axis=1)
    return p, thresholds.rounded(weights * random.choice([1.0, 1.0, 2.5], size=(n, 1)))


@pytest.mark.parametrize("values_of", [tiers.cumulative, tiers.weighted_score], ids=["cumulative", "score"])
@pytest.mark.parametrize("rule", ["one", "boundary"])
@pytest.mark.parametrize("requirements", REQUIREMENTS, ids=lambda r: " and ".join(map(str, r)) or "free")
@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_the_fit_is_as_good_as_trying_every_cut(
    objective: Objective, requirements: tuple[Requirement, ...], rule: str, values_of: Callable[[Floats], Floats]
) -> None:
    for seed in range(8):
        p, weights = rows_of(seed, n=1 + seed % 8, values=2 + seed % 3, labels=1 + (seed // 2) % 4)
        c = values_of(p)
        cuts = Values(c).cuts(weights)
        best = brute_force(c, weights, rule, objective, requirements)
        if best is None:
            with pytest.raises(Impossible, match=r"the best alone is|no judgement is"):
                fit(cuts, rule, objective, requirements)
            continue
        found = fit(cuts, rule, objective, requirements)
        assert reached(objective, found.confusion) == pytest.approx(best, abs=1e-9, rel=1e-9)
        assert measures.confusions(weights, tiers.cut(c, found.taus)) == pytest.approx(found.confusion, abs=1e-9)
        assert 1 >= found.taus[0] >= found.taus[1] >= found.taus[2] >= 0
        # All of the interval is as good, not only its middle.
        for share in (1e-9, 0.3, 1.0):
            inside = tuple(low + share * (high - low) for low, high in zip(found.lows, found.highs, strict=True))
            if all(i > low for i, low in zip(inside, found.lows, strict=True)):
                elsewhere = measures.confusions(weights, tiers.cut(c, inside))
                assert reached(objective, elsewhere) == pytest.approx(best, abs=1e-9, rel=1e-9)


def test_of_requirements_that_cannot_hold_together_the_last_ones_are_given_up() -> None:
    p, weights = rows_of(5, n=60, values=5)
    cuts = Values(tiers.cumulative(p)).cuts(weights)
    first, last = Requirement("recall", 3, 0.9), Requirement("shown", 3, 0.1, 1)
    alone = fit(cuts, "boundary", Objective(), (first,))
    fit(cuts, "boundary", Objective(), (last,))  # it can be had alone too
    with pytest.raises(Impossible, match="they must hold together"):
        fit(cuts, "boundary", Objective(), (first, last))
    relaxed = fit(cuts, "boundary", Objective(), (first, last), relax=True)
    assert relaxed.taus == alone.taus
    assert alone.taus != fit(cuts, "boundary", Objective()).taus
    # What cannot be had at all is had as nearly as can be.
    asked = Requirement("precision", 4, 1.0)
    nearest = thresholds._nearest(cuts, asked)
    assert nearest < 1
    nearly = fit(cuts, "boundary", Objective(), (asked,), relax=True)
    assert asked.of_confusion(nearly.confusion) == pytest.approx(nearest)


class Parts:
    """The same cuts in several pieces, as Spark's partitions hold them."""

    def __init__(self, whole: thresholds.Local, edges: list[float]) -> None:
        self.gold = whole.gold
        self.parts: list[thresholds.Piece] = []
        begins = [-1.0] * 3
        for low, high in itertools.pairwise([-1.0, *sorted(set(edges)), 1.0]):
            uppers, above = [], []
            for u, a in zip(whole.piece.uppers, whole.piece.above, strict=True):
                ups = np.unique([*u[(u > low) & (u <= high)], high])
                uppers.append(ups)
                above.append(a[np.searchsorted(u, ups)])
            goes_on = tuple(high not in u for u in whole.piece.uppers)
            self.parts.append(thresholds.Piece(low, high, tuple(uppers), tuple(above), tuple(begins), goes_on))
            begins = [max([b, *u[u <= high]]) for b, u in zip(begins, whole.piece.uppers, strict=True)]

    def each(self, step: thresholds.Step) -> list[list[float]]:
        return [step(part) for part in self.parts]


@pytest.mark.parametrize("cuts", [10_000, 6], ids=["every cut", "a grid"])
@pytest.mark.parametrize("rule", ["one", "boundary"])
@pytest.mark.parametrize("requirements", REQUIREMENTS, ids=lambda r: " and ".join(map(str, r)) or "free")
@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_cuts_do_not_depend_on_how_the_rows_lie_in_partitions(
    objective: Objective, requirements: tuple[Requirement, ...], rule: str, cuts: int
) -> None:
    for seed in range(12):
        random = np.random.default_rng(seed)
        p, weights = rows_of(seed, 2 + 4 * seed, 3 + seed % 5)
        c = tiers.cumulative(p)
        whole, order = Values(c).cuts(weights), random.permutation(len(c))
        edges = [v for v in random.choice(c.ravel(), 4).tolist() if 0 <= v < 1]
        others: list[thresholds.Pieces] = [Parts(whole, edges), Values(c[order]).cuts(weights[order])]
        try:
            expected = fit(whole, rule, objective, requirements, cuts)
        except Impossible:
            for pieces in others:
                with pytest.raises(Impossible):
                    fit(pieces, rule, objective, requirements, cuts)
            continue
        for pieces in others:
            found = fit(pieces, rule, objective, requirements, cuts)
            same = (found.taus, found.lows, found.highs, found.value)
            assert same == (expected.taus, expected.lows, expected.highs, expected.value)


def test_of_cuts_that_are_as_good_the_widest_interval_is_taken_whole_over_the_borders_of_pieces() -> None:
    c = np.array([[x, x, x] for x in (0.1, 0.2, 0.5, 0.55, 0.9, 0.15)])
    # Between 0.1 and 0.2, and between 0.5 and 0.55, one is wrong; 0.15 has no weight and so cuts nothing.
    weights = np.vstack([np.eye(4)[[3, 0, 3, 0, 0]], np.zeros((1, 4))])
    whole = Values(c).cuts(weights)
    expected = fit(whole, "one", Objective("accuracy"))
    assert (expected.lows[0], expected.highs[0]) == (0.1, 0.2)
    for edges in ([0.15], [0.1, 0.15], [0.2, 0.5], [0.1, 0.15, 0.2, 0.5, 0.55]):
        found = fit(Parts(whole, edges), "one", Objective("accuracy"))
        assert (found.lows, found.highs, found.taus) == (expected.lows, expected.highs, expected.taus)


def test_recall_comes_before_accuracy_however_large_the_weights() -> None:
    c = np.array([[0.9] * 3, [0.5] * 3, [0.3] * 3])
    weights = np.array([[1.0, 0, 0, 0], [0, 0, 0, 5e6], [1.0, 0, 0, 0]])
    found = fit(Values(c).cuts(weights), "boundary", Objective("recall", label=4))
    assert (found.value, found.taus[0] <= 0.3) == (1.0, True)
    # Without anything to recall, accuracy is what is left.
    found = fit(Values(c).cuts(weights[:, [3, 2, 1, 0]] * [0, 1, 1, 1]), "boundary", Objective("recall", label=4))
    assert (found.value, float(measures.accuracy(found.confusion))) == (0.0, 1.0)


@pytest.mark.parametrize("rule", ["one", "boundary"])
@pytest.mark.parametrize("objective", OBJECTIVES[:4], ids=str)
def test_cuts_that_made_the_labels_lie_in_the_interval_that_is_found(rule: str, objective: Objective) -> None:
    for seed in range(20):
        random = np.random.default_rng(seed)
        p = random.dirichlet([0.7] * 4, size=400)
        truth = tuple(sorted(random.uniform(0.2, 0.9, 3), reverse=True)) if rule == "boundary" else (0.55,) * 3
        weights = np.eye(4)[4 - tiers.cut(tiers.cumulative(p), truth)]
        found = fit(Values(tiers.cumulative(p)).cuts(weights), rule, objective)
        assert float(measures.accuracy(found.confusion)) == 1
        for tau, low, high in zip(truth, found.lows, found.highs, strict=True):
            assert low < tau <= high


def test_where_macro_f1_is_searched_it_is_as_good_as_where_every_cut_is_tried() -> None:
    gaps = []
    for seed in range(60):
        random = np.random.default_rng(seed)
        p = random.dirichlet([0.5] * 4, size=120)
        noisy = np.argsort(-(np.log(p) + random.gumbel(size=p.shape)), axis=1)[:, 0]
        cuts = Values(tiers.cumulative(p)).cuts(np.eye(4)[noisy])
        exact, searched = (fit(cuts, "boundary", Objective(), cuts=n).value for n in (4096, 24))
        assert searched <= exact + 1e-12
        gaps.append(exact - searched)
    # A grid of 24 of 120 cuts, and on from there.
    assert max(gaps) < 0.03
    assert sum(gap < 1e-12 for gap in gaps) >= 40


def test_a_single_row_all_one_label_and_certain_probabilities_are_fitted() -> None:
    for p in ([[1.0, 0, 0, 0]], [[0, 0, 0, 1.0]], [[0.25] * 4] * 5, [[0, 1.0, 0, 0]] * 3):
        for label in range(4):
            weights = np.eye(4)[[label] * len(p)]
            c = tiers.cumulative(np.array(p, dtype=float))
            for rule in ("one", "boundary"):
                found = fit(Values(c).cuts(weights), rule, Objective())
                best = brute_force(c, weights, rule, Objective(), ())
                assert best is not None
                assert found.value == best[0]


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_an_objective_is_read_back_from_the_text_that_is_stored(objective: Objective) -> None:
    assert Objective.read(str(objective)) == objective


def test_no_rows_are_an_error() -> None:
    with pytest.raises(ValueError, match="no judged rows"):
        fit(Values(np.zeros((0, 3))).cuts(np.zeros((0, 4))), "one", Objective())


def test_a_label_that_is_neither_in_gold_nor_given_is_left_out_of_the_macro_mean() -> None:
    confusion = np.diag([3.0, 2.0, 0.0, 1.0])
    assert float(measures.macro_f1(confusion)) == 1
    confusion[0, 2] = 1  # given once, wrongly: it counts, with F1 0
    assert float(measures.macro_f1(confusion)) == pytest.approx((6 / 7 + 1 + 0 + 1) / 4)


def test_kappa_is_what_scikit_learn_computes() -> None:
    sklearn = pytest.importorskip("sklearn.metrics")
    random = np.random.default_rng(3)
    gold, given_now = random.integers(1, 5, 300), random.integers(1, 5, 300)
    confusion = measures.confusions(np.eye(4)[4 - gold], given_now)
    expected = sklearn.cohen_kappa_score(gold, given_now, weights="quadratic")
    assert float(measures.kappa(confusion)) == pytest.approx(expected)
    assert float(measures.macro_f1(confusion)) == pytest.approx(sklearn.f1_score(gold, given_now, average="macro"))


def test_the_best_that_can_be_had_is_told_so_that_it_can_be_asked_for() -> None:
    p, weights = rows_of(5, 40, 7)
    cuts = Values(tiers.cumulative(p)).cuts(weights)
    for asked in (Requirement("precision", 4, 0.99999), Requirement("shown", 3, 0.00001, of=1)):
        with pytest.raises(Impossible) as impossible:
            fit(cuts, "boundary", Objective(), (asked, Requirement("recall", 4, 1.0), Requirement("recall", 3, 1.0)))
        told = re.search(rf"{re.escape(str(asked))}: the best alone is ([0-9.e-]+)", str(impossible.value))
        assert told is not None
        fit(cuts, "boundary", Objective(), (replace(asked, bound=float(told[1])),))
    assert Requirement("precision", 4, 0.9).best(0.66666).endswith("at least 0.9: the best alone is 0.6666")
    assert Requirement("shown", 3, 0.0, of=1).best(1 / 3).endswith("the best alone is 0.3334")
    with pytest.raises(Impossible, match=r"recall of Excellent at least 0\.5: no judgement is Excellent"):
        fit(Values(np.full((1, 3), 0.5)).cuts(np.eye(4)[[3]]), "one", Objective(), (Requirement("recall", 4, 0.5),))
