"""How good tiers and probabilities are: measures of a confusion matrix, intervals by query, calibration.

A confusion matrix is an array [..., label, tier], both in the order 4, 3, 2, 1, of weights. A pair with raters enters
with the fraction of its raters at each label, so a cell may hold parts of a pair. Pairs of one query are not
independent (they share its difficulty), so intervals come from a bootstrap that draws queries, not pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from schemas.labels import LABELS, NAMES

Floats = NDArray[np.float64]
BINS = 15  # of a reliability diagram, as Guo et al. 2017 (arXiv 1706.04599) has it
TEMPERATURES = (0.05, 20.0)
_NONE = 1e-9  # of the total weight: less than this is no pair at all, only the noise of a difference
QUADRATIC = np.array([[float((a - b) ** 2) for b in LABELS] for a in LABELS]) / 9


def f1(confusion: Floats) -> Floats:
    """F1 of each label [..., 4]; NaN for a label that is neither in gold nor given."""
    gold, given = confusion.sum(-1), confusion.sum(-2)
    both = gold + given
    there = both > _NONE * np.maximum(confusion.sum((-1, -2)), 1e-300)[..., None]
    return np.where(there, 2 * np.diagonal(confusion, axis1=-2, axis2=-1) / np.where(there, both, 1.0), np.nan)


def macro_f1(confusion: Floats) -> Floats:
    """Mean F1 over the labels that are in gold or given; 0 where there are none."""
    each = f1(confusion)
    there = ~np.isnan(each)
    found: Floats = np.where(there, each, 0.0).sum(-1) / np.maximum(there.sum(-1), 1)
    return found


def accuracy(confusion: Floats) -> Floats:
    """Share of the weight on the diagonal."""
    found: Floats = np.trace(confusion, axis1=-2, axis2=-1) / np.maximum(confusion.sum((-1, -2)), 1e-300)
    return found


def kappa(confusion: Floats) -> Floats:
    """Quadratic-weighted kappa (Cohen 1968); where all is of one label and found so it is 1, else, undefined, 0."""
    total = np.maximum(confusion.sum((-1, -2)), 1e-300)
    off = (confusion * QUADRATIC).sum((-1, -2))
    gold, given = confusion.sum(-1), confusion.sum(-2)
    chance = ((gold @ QUADRATIC) * given).sum(-1) / total
    defined = chance > _NONE * total
    perfect = np.where(off <= _NONE * total, 1.0, 0.0)
    found: Floats = np.where(defined, 1 - off / np.where(defined, chance, 1.0), perfect)
    return found


def cost(confusion: Floats, costs: Floats) -> Floats:
    """Mean cost of a pair; costs: [label, tier]."""
    found: Floats = (confusion * costs).sum((-1, -2)) / np.maximum(confusion.sum((-1, -2)), 1e-300)
    return found


def precision(confusion: Floats, label: int) -> Floats:
    """Of what is shown as `label` or better, the share that is; NaN where nothing is shown so."""
    k = LABELS.index(label) + 1
    shown = confusion[..., :, :k].sum((-1, -2))
    return np.where(shown > 0, confusion[..., :k, :k].sum((-1, -2)) / np.where(shown > 0, shown, 1), np.nan)


def recall(confusion: Floats, label: int) -> Floats:
    """Of what is `label` or better, the share that is shown so; NaN where there is none."""
    k = LABELS.index(label) + 1
    gold = confusion[..., :k, :].sum((-1, -2))
    return np.where(gold > 0, confusion[..., :k, :k].sum((-1, -2)) / np.where(gold > 0, gold, 1), np.nan)


def confusions(weights: Floats, tiers: NDArray[np.int64]) -> Floats:
    """Confusion matrix of rows with weights [n, 4] by label and the tier they were given."""
    found = np.zeros((4, 4))
    for t, label in enumerate(LABELS):
        found[:, t] = weights[tiers == label].sum(0)
    return found


def by_query(weights: Floats, tiers: NDArray[np.int64], queries: NDArray[np.int64], count: int) -> Floats:
    """Confusion matrices [query, label, tier]; queries: [n], numbers below `count`."""
    found = np.zeros((count, 4, 4))
    for y in range(4):
        found[:, y] = np.bincount(queries * 4 + 4 - tiers, weights[:, y], count * 4).reshape(count, 4)
    return found


def draws(count: int, replicates: int, random: np.random.Generator) -> Floats:
    """How often each of `count` queries is drawn in each resample: [replicates, count], rows sum to count."""
    return random.multinomial(count, np.full(count, 1 / max(count, 1)), size=replicates).astype(np.float64)


def bootstrap(each: Floats, replicates: int, seed: int) -> Floats:
    """Confusion matrices of resamples of the queries: [query, …, 4, 4] -> [replicates, …, 4, 4]."""
    random = np.random.default_rng(seed)
    flat, found = each.reshape(len(each), -1), []
    for begin in range(0, replicates, 100):
        found.append(draws(len(each), min(100, replicates - begin), random) @ flat)
    return np.concatenate(found).reshape(-1, *each.shape[1:])


def interval(values: Floats) -> tuple[float, float]:
    """2.5 and 97.5 percentiles, NaN left out; NaN where nothing is left."""
    there = values[~np.isnan(values)]
    if not there.size:
        return float("nan"), float("nan")
    low, high = np.percentile(there, [2.5, 97.5])
    return float(low), float(high)


def named(costs: Floats | None = None) -> dict[str, Callable[[Floats], Floats]]:
    """Every measure of a confusion matrix by its name in `measures`."""
    found: dict[str, Callable[[Floats], Floats]] = {"macro_f1": macro_f1, "accuracy": accuracy, "kappa": kappa}
    if costs is not None:
        found["cost"] = lambda c: cost(c, costs)
    for k, label in enumerate(LABELS):
        found[f"f1_{NAMES[label].lower()}"] = _one(f1, k)
    for label in LABELS[:3]:
        found[f"precision_{NAMES[label].lower()}_or_better"] = _bound(precision, label)
        found[f"recall_{NAMES[label].lower()}_or_better"] = _bound(recall, label)
    return found


def _one(measure: Callable[[Floats], Floats], k: int) -> Callable[[Floats], Floats]:
    return lambda c: measure(c)[..., k]


def _bound(measure: Callable[[Floats, int], Floats], label: int) -> Callable[[Floats], Floats]:
    return lambda c: measure(c, label)


# Calibration


def reliability(p: Floats, truth: Floats, weight: Floats, bins: int = BINS) -> list[tuple[float, float, float]]:
    """Bins of equal width in [0, 1]: mean probability, share of truth, weight; empty bins are left out.

    p: [n]; truth: [n], the weight of the rows for which the statement is true, at most `weight`.
    """
    place = np.minimum((np.clip(p, 0, 1) * bins).astype(np.int64), bins - 1)
    total = np.bincount(place, weight, bins)
    said, true = np.bincount(place, weight * p, bins), np.bincount(place, truth, bins)
    bins_of = zip(said.tolist(), true.tolist(), total.tolist(), strict=True)
    return [(s / t, y / t, t) for s, y, t in bins_of if t > 0]


def ece(bins: Sequence[tuple[float, float, float]]) -> float:
    """Expected calibration error: the mean distance of bins from the diagonal, by weight (Guo et al. 2017, eq. 3)."""
    total = sum(weight for *_, weight in bins)
    return sum(weight * abs(said - true) for said, true, weight in bins) / total if total else float("nan")


def calibration(p: Floats, weights: Floats) -> dict[str, list[tuple[float, float, float]]]:
    """Reliability bins of each label's probability and of the cumulative ones; p, weights: [n, 4] by label."""
    total = weights.sum(1)
    found = {f"ece_{NAMES[y].lower()}": reliability(p[:, k], weights[:, k], total) for k, y in enumerate(LABELS)}
    for k, label in enumerate(LABELS[1:3], start=2):
        better = reliability(p[:, :k].sum(1), weights[:, :k].sum(1), total)
        found[f"ece_{NAMES[label].lower()}_or_better"] = better
    return found


def likelihood_loss(p: Floats, weights: Floats) -> float:
    """Mean negative log-likelihood of the labels, in nats; a probability of 0 counts as 1e-12."""
    return float(-(weights * np.log(np.maximum(p, 1e-12))).sum() / weights.sum())


def temperature(p: Floats, weights: Floats) -> float:
    """The temperature with the least negative log-likelihood (Guo et al. 2017, section 4.2), within `TEMPERATURES`.

    The loss is convex in 1/T, so its slope is bisected. p, weights: [n, 4].
    """
    logs = np.log(np.maximum(p, 1e-12))
    total = weights.sum(1, keepdims=True)

    def slope(inverse: float) -> float:
        scaled = np.exp(inverse * (logs - logs.max(1, keepdims=True)))
        expected = (scaled * logs).sum(1, keepdims=True) / scaled.sum(1, keepdims=True)
        return float((total * expected).sum() - (weights * logs).sum())

    low, high = 1 / TEMPERATURES[1], 1 / TEMPERATURES[0]
    if slope(low) >= 0:
        return TEMPERATURES[1]
    if slope(high) <= 0:
        return TEMPERATURES[0]
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if slope(middle) > 0 else (middle, high)
    return float(2 / (low + high))
