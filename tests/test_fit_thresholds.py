"""The fit as a job: what it takes, what it leaves out, what it stores; and the same cuts from Spark as from numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from jobs import fit_thresholds as job
from jobs.fit_thresholds import Rows, Wanted, cutter, fit_thresholds, objective, out_of_fold, requirement
from partitioner import measures, thresholds
from partitioner.thresholds import Objective, Requirement, Values, cumulative, fit
from schemas import delta
from tests import judged
from tests.judged import MODEL, PROMPT, fill, gold, pair, run, scored

QUICK = Wanted("one", None, Objective(), (), replicates=50, refits=5)


def rows(seed: int = 0, queries: int = 40, each: int = 10) -> Rows:
    random = np.random.default_rng(seed)
    p = random.dirichlet([0.6] * 4, queries * each)
    label = np.array([random.choice(4, p=x) for x in p])
    segments = np.array(["a" if i // each % 4 else "b" for i in range(len(p))], dtype=object)
    return Rows(p, np.eye(4)[label], np.arange(len(p)) // each, segments)


@pytest.mark.parametrize("objective", [Objective(), Objective("accuracy"), Objective("kappa")], ids=str)
def test_spark_finds_the_cuts_that_numpy_finds(spark: SparkSession, objective: Objective) -> None:
    random = np.random.default_rng(4)
    p = random.dirichlet([0.5] * 4, 3000)
    p[:500] = np.round(p[:500] * 4) / 4  # ties, zeros and ones
    weights = np.eye(4)[[random.choice(4, p=x / x.sum()) if x.sum() else 0 for x in p]]
    weights[::3] = weights[::3] * 2 / 3 + np.eye(4)[0] / 3
    c = cumulative(p)
    names = ["c4", "c3", "c2", "w4", "w3", "w2", "w1"]
    frame = spark.createDataFrame(np.hstack([c, weights]).tolist(), ", ".join(f"{n} DOUBLE" for n in names))
    pieces = thresholds.Spread(frame, 3)
    try:
        assert len(pieces.each(lambda piece: [0.0])) == 3
        for rule in thresholds.RULES:
            found = fit(pieces, rule, objective, (Requirement("precision", 4, 0.5),), cuts=20_000)
            expected = fit(Values(c).cuts(weights), rule, objective, (Requirement("precision", 4, 0.5),))
            assert found.value == pytest.approx(expected.value, abs=1e-12)
            assert found.confusion.sum() == expected.confusion.sum()
    finally:
        pieces.close()


def test_a_version_with_its_figures_is_stored_and_what_is_left_out_is_counted_and_named(
    spark: SparkSession, root: str, capsys: pytest.CaptureFixture[str]
) -> None:
    judged.tables(spark, root)
    more = 240
    fill(spark, root, "pairs", [pair(i, "more") for i in range(more, more + 6)])
    fill(spark, root, "label_probs", [
        scored(more, "more", None),
        scored(more + 1, "more", [0.7, 0.1, 0.1, 0.1], content_hash="older"),
        scored(more + 2, "more", [0.7, 0.1, 0.1, 0.1]),
        scored(more + 9, "gone", [0.7, 0.1, 0.1, 0.1]),
    ])  # fmt: skip
    fill(spark, root, "gold", [
        *[gold(more + i, 4) for i in (0, 1, 3, 9)],
        *[gold(i, 4 if i % 2 else 1, source="binary") for i in range(200)],
    ])  # fmt: skip
    fill(spark, root, "models", [
        {"model_id": MODEL, "path": "/m", "stage": "sft", "weights_hash": "f", "metrics": {}, "created_at": judged.NOW,
         "trained_on": ["raters"]}
    ])  # fmt: skip
    asked = (Requirement("recall", 3, 0.5),)
    wanted = Wanted("boundary", "category", Objective(), asked, min_gold=40, replicates=100, refits=10)
    version = fit_thresholds(spark, root, wanted)
    said = capsys.readouterr().out
    for line in (
        "120 judgements of raters: fit",
        "56 judgements of raters: test",
        "64 judgements of raters: model was trained on it",
        "1 judgements of raters: no probability: too_long",
        "1 judgements of raters: scored with an older text",
        "1 judgements of raters: pair not scored by this model",
        "1 judgements of raters: judged pair is not in pairs",
        "200 judgements of binary: source with another scale",
        "binary never uses one of the four labels",
        "3 pairs have no judgement",
        "1 of 2 values of category get cuts of their own",
        "CumPT boundary_by_category",
        "required: recall of Related or better at least 0.5; boundary_by_category 0.",
        "weighted score",
        "likeliest label",
        "boundary_by_category against score, macro_f1:",
        "promote_thresholds --tables",
    ):
        assert line in said, line
    stored = delta.read(spark, root, "thresholds").collect()
    assert {(r["version"], r["status"], r["segment"], r["n_gold"]) for r in stored} == {
        (version, "candidate", s, 120) for s in ("", "Kettles")
    }
    for r in stored:
        assert r["optimal_low"] <= r["tau"] <= r["optimal_high"]
        assert r["tau_low"] <= r["tau_high"]
        assert (r["engines"], r["gold_sources"], r["allow_train"]) == (["float32, fake 1"], ["raters"], False)
    figures = delta.read(spark, root, "measures").collect()
    told = {(r["cuts"], r["split"], r["segment"], r["measure"]): r for r in figures}
    own = told["boundary_by_category", "out_of_fold", "", "macro_f1"]
    assert own["low"] < own["value"] < own["high"]
    assert own["n"] == 120
    assert told["boundary_by_category", "test", "", "macro_f1"]["n"] == 56
    apart = told["boundary_by_category", "out_of_fold", "", "macro_f1_minus_argmax"]["value"]
    assert apart == pytest.approx(own["value"] - told["argmax", "out_of_fold", "", "macro_f1"]["value"])
    cells = [r["value"] for key, r in told.items() if key[:3] == ("score", "out_of_fold", "") and "confusion" in key[3]]
    assert sum(cells) == pytest.approx(120)
    assert ("raw", "fit", "", "ece_excellent") in told
    bare = Wanted("one", None, Objective("accuracy"), (), allow_train=True, refits=0, replicates=0)
    again = fit_thresholds(spark, root, bare)
    last = delta.read(spark, root, "thresholds").where(F.col("version") == again).collect()
    assert again == version + 1
    assert {(r["n_gold"], r["allow_train"], r["objective"]) for r in last} == {(184, True, "accuracy")}
    assert len({r["tau"] for r in last}) == 1
    done = delta.read(spark, root, "runs").where("job = 'fit_thresholds' AND status = 'done'").collect()
    assert sorted(r["message"] for r in done) == ["version 1", "version 2"]


def test_without_probabilities_or_judgements_the_error_names_the_way_out(spark: SparkSession, root: str) -> None:
    with pytest.raises(ValueError, match="label_probs is empty; score pairs first: rescore"):
        fit_thresholds(spark, root, QUICK)
    fill(spark, root, "pairs", [pair(0, "q")])
    fill(spark, root, "label_probs", [scored(0, "q", [0.7, 0.1, 0.1, 0.1]), scored(0, "q", [1, 0, 0, 0], model_id="b")])
    with pytest.raises(ValueError, match=f"several models fit; name one of: .*--model-id {MODEL} --prompt-id {PROMPT}"):
        fit_thresholds(spark, root, QUICK)
    with pytest.raises(ValueError, match="no model fits"):
        fit_thresholds(spark, root, QUICK, model_id="nobody")
    with pytest.raises(ValueError, match=r"no judgement is left to fit on \(pairs without a judgement: 1\)"):
        fit_thresholds(spark, root, QUICK, model_id=MODEL)


def test_a_query_is_never_cut_by_cuts_that_were_fitted_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    all_rows, seen = rows(), []
    original = job.cutter

    def watching(name: str, train: Rows, *rest: Any) -> job.Cutter:
        seen.append(set(train.queries))
        return original(name, train, *rest)

    monkeypatch.setattr(job, "cutter", watching)
    given = out_of_fold(all_rows, QUICK, ["one"], [])["one"]
    assert set(given) <= {1, 2, 3, 4}
    held = [set(range(40)) - train for train in seen]
    assert sorted(q for h in held for q in h) == list(range(40))
    assert [len(h) for h in held] == [8] * 5


def test_intervals_are_wider_where_pairs_of_a_query_go_together() -> None:
    random = np.random.default_rng(0)
    right = random.random(50) < 0.6  # whole queries are right or wrong
    tiers = np.where(np.repeat(right, 20), 4, 1)
    weights = np.tile(np.eye(4)[0], (1000, 1))
    queries = np.arange(1000) // 20
    by_query = measures.bootstrap(measures.by_query(weights, tiers, queries, 50), 500, 0)
    by_pair = measures.bootstrap(measures.by_query(weights, tiers, np.arange(1000), 1000), 500, 0)
    widths = [np.subtract(*measures.interval(measures.accuracy(b))[::-1]) for b in (by_query, by_pair)]
    assert 3 < widths[0] / widths[1] < 6  # the square root of 20


def test_a_segment_with_too_few_judgements_takes_the_cut_of_all() -> None:
    wanted = Wanted("one", "category", Objective(), (), min_gold=150)
    all_rows = rows()
    assert job.own_segments(all_rows, wanted) == ["a"]
    cut = cutter("one_by_category", all_rows, wanted, ["a"])
    assert set(cut.fits) == {"", "a"}
    here = all_rows.segments == "b"
    expected = thresholds.tiers(cumulative(all_rows.p[here]), cut.fits[""].taus)
    assert cut.tiers(all_rows)[here].tolist() == expected.tolist()


def test_a_temperature_that_was_lost_is_found_again() -> None:
    random = np.random.default_rng(1)
    p = random.dirichlet([0.8] * 4, 20_000)
    weights = np.eye(4)[(p.cumsum(1) > random.random((len(p), 1))).argmax(1)]
    sharp = p**2.5 / (p**2.5).sum(1, keepdims=True)
    assert measures.temperature(sharp, weights) == pytest.approx(2.5, rel=0.05)
    both = sharp, thresholds.scaled(sharp, 2.5)
    raw, mended = (measures.ece(measures.calibration(x, weights)["ece_excellent"]) for x in both)
    assert mended < 0.01 < raw


def test_requirements_and_objectives_are_read_from_sentences() -> None:
    assert requirement("precision of Excellent at least 0.95") == Requirement("precision", 4, 0.95)
    assert requirement("Irrelevant shown as Related or better at most 2 %") == Requirement("shown", 3, 0.02, 1)
    assert requirement("recall of related at least 90%") == Requirement("recall", 3, 0.9)
    assert objective("recall:Related") == Objective("recall", label=3)
    assert objective("cost", "[[0,1,2,3],[1,0,1,2],[2,1,0,1],[3,2,1,0]]").costs is not None
    for text in (
        "precision of Good at least 0.9",
        "Excellent shown as Related at most 2%",
        "recall of Related at least 7",
    ):
        with pytest.raises(ValueError, match="--require"):
            requirement(text)
    for text, costs in (("cost", None), ("f1", None), ("cost", "[[0]]"), ("accuracy", "[]")):
        with pytest.raises(ValueError, match=r"--objective|--costs"):
            objective(text, costs)


def test_an_impossible_requirement_says_the_best_that_can_be_had() -> None:
    wanted = Wanted("one", None, Objective("recall", label=4), (Requirement("precision", 4, 0.999),))
    p = np.array([[0.9, 0.1, 0, 0], [0.9, 0, 0.1, 0], [0.2, 0.8, 0, 0]])
    all_rows = Rows(p, np.eye(4)[[0, 1, 1]], np.arange(3), np.array([""] * 3, dtype=object))
    with pytest.raises(thresholds.Impossible, match=r"precision of Excellent at least 0.999: the best alone is 0\.5"):
        cutter("one", all_rows, wanted, relax=False)


def test_raters_count_by_their_shares_or_as_their_median(spark: SparkSession, root: str) -> None:
    fill(spark, root, "pairs", [pair(0, "q")])
    fill(spark, root, "label_probs", [scored(0, "q", [0.7, 0.1, 0.1, 0.1])])
    fill(spark, root, "gold", [gold(0, 3, rater_labels=[3, 4, 1], weight=6.0), gold(0, 2, source="single")])
    fill(spark, root, "runs", [run()])
    for raters, expected in (("fractions", [2, 2, 0, 2]), ("median", [0, 6, 0, 0])):
        frame = job.judged(spark, root, Wanted("one", None, Objective(), (), raters=raters), MODEL, PROMPT)
        got = {r["source"]: [r["w4"], r["w3"], r["w2"], r["w1"]] for r in frame.collect()}
        assert got["raters"] == pytest.approx(expected)
        assert got["single"] == [0, 0, 1, 0]
