"""Cuts held against trying every cut; the rule held against each of its readers."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from partitioner import measures, thresholds
from partitioner.measures import Floats
from partitioner.thresholds import BOUNDARIES, Impossible, Objective, Requirement, Values, cumulative, fit, tiers

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


def brute_force(
    c: Floats, weights: Floats, rule: str, objective: Objective, requirements: tuple[Requirement, ...]
) -> float:
    """The best objective over every cut, each tried by the rule itself."""
    taus = every_cut(c)
    triples = [(t, t, t) for t in taus] if rule == "one" else itertools.combinations_with_replacement(taus[::-1], 3)
    gold, best = weights.sum(0), -np.inf
    for triple in triples:
        confusion = measures.confusions(weights, tiers(c, triple))
        shown = [confusion[:, : b + 1].sum(1) for b in range(3)]
        if all(r.met(shown[BOUNDARIES.index(r.label)], gold) for r in requirements):
            best = max(best, float(objective.value(confusion)))
    return best


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


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10**6),
    st.integers(1, 7),
    st.integers(2, 4),
    st.integers(1, 4),
    st.sampled_from(OBJECTIVES),
    st.sampled_from(REQUIREMENTS),
    st.sampled_from(["one", "boundary"]),
)
def test_the_fit_is_as_good_as_trying_every_cut(
    seed: int, n: int, values: int, labels: int, objective: Objective, requirements: tuple[Requirement, ...], rule: str
) -> None:
    p, weights = rows_of(seed, n, values, labels)
    c = cumulative(p)
    best = brute_force(c, weights, rule, objective, requirements)
    if best == -np.inf:
        with pytest.raises(Impossible, match="the best alone is"):
            fit(Values(c).cuts(weights), rule, objective, requirements)
        return
    found = fit(Values(c).cuts(weights), rule, objective, requirements)
    assert found.value == pytest.approx(best, abs=1e-9, rel=1e-9)
    given_now = measures.confusions(weights, tiers(c, found.taus))
    assert given_now == pytest.approx(found.confusion, abs=1e-9)
    assert 1 >= found.taus[0] >= found.taus[1] >= found.taus[2] >= 0
    # All of the interval is as good, not only its middle.
    for share in (1e-9, 0.3, 1.0):
        inside = tuple(low + share * (high - low) for low, high in zip(found.lows, found.highs, strict=True))
        if all(i > low for i, low in zip(inside, found.lows, strict=True)):
            elsewhere = measures.confusions(weights, tiers(c, inside))
            assert float(objective.value(elsewhere)) == pytest.approx(found.value, abs=1e-9, rel=1e-9)


class Parts:
    """The same cuts in several pieces, as Spark's partitions hold them."""

    def __init__(self, whole: thresholds.Local, edges: list[float]) -> None:
        self.gold = whole.gold
        self.parts = []
        for low, high in itertools.pairwise([-1.0, *sorted(set(edges)), 1.0]):
            uppers, above = [], []
            for u, a in zip(whole.piece.uppers, whole.piece.above, strict=True):
                ups = np.append(u[(u > low) & (u < high)], high)
                uppers.append(ups)
                above.append(a[np.searchsorted(u, ups)])
            self.parts.append(
                thresholds.Piece(low, high, (uppers[0], uppers[1], uppers[2]), (above[0], above[1], above[2]))
            )

    def each(self, step: thresholds.Step) -> list[list[float]]:
        return [step(part) for part in self.parts]


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10**6),
    st.integers(2, 30),
    st.sampled_from(OBJECTIVES),
    st.sampled_from(REQUIREMENTS),
    st.sampled_from(["one", "boundary"]),
)
def test_cuts_do_not_depend_on_how_the_rows_lie_in_partitions(
    seed: int, n: int, objective: Objective, requirements: tuple[Requirement, ...], rule: str
) -> None:
    p, weights = rows_of(seed, n, 6)
    c = cumulative(p)
    whole = Values(c).cuts(weights)
    parts = Parts(whole, [v for v in np.random.default_rng(seed).choice(c.ravel(), 3).tolist() if 0 <= v < 1])
    order = np.random.default_rng(seed).permutation(n)
    try:
        best = fit(whole, rule, objective, requirements).value
    except Impossible:
        with pytest.raises(Impossible):
            fit(parts, rule, objective, requirements)
        return
    found = fit(parts, rule, objective, requirements, cuts=10_000)
    assert found.value == pytest.approx(best, abs=1e-12)
    again = fit(Values(c[order]).cuts(weights[order]), rule, objective, requirements)
    assert (again.taus, again.value) == (fit(whole, rule, objective, requirements).taus, best)


@pytest.mark.parametrize("rule", ["one", "boundary"])
@pytest.mark.parametrize("objective", OBJECTIVES[:4], ids=str)
def test_cuts_that_made_the_labels_lie_in_the_interval_that_is_found(rule: str, objective: Objective) -> None:
    for seed in range(20):
        random = np.random.default_rng(seed)
        p = random.dirichlet([0.7] * 4, size=400)
        truth = tuple(sorted(random.uniform(0.2, 0.9, 3), reverse=True)) if rule == "boundary" else (0.55,) * 3
        weights = np.eye(4)[4 - tiers(cumulative(p), truth)]
        found = fit(Values(cumulative(p)).cuts(weights), rule, objective)
        assert float(measures.accuracy(found.confusion)) == 1
        for tau, low, high in zip(truth, found.lows, found.highs, strict=True):
            assert low < tau <= high


def test_where_macro_f1_is_searched_it_is_as_good_as_where_every_cut_is_tried() -> None:
    gaps = []
    for seed in range(60):
        random = np.random.default_rng(seed)
        p = random.dirichlet([0.5] * 4, size=120)
        noisy = np.argsort(-(np.log(p) + random.gumbel(size=p.shape)), axis=1)[:, 0]
        cuts = Values(cumulative(p)).cuts(np.eye(4)[noisy])
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
            c = cumulative(np.array(p, dtype=float))
            for rule in ("one", "boundary"):
                found = fit(Values(c).cuts(weights), rule, Objective())
                assert found.value == brute_force(c, weights, rule, Objective(), ())


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
