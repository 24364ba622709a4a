"""The fit as a job: what it takes, what it leaves out, what it stores; and the same cuts from Spark as from numpy."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from pyspark.sql import SparkSession

from jobs import fit_thresholds as job
from jobs.fit_thresholds import Rows, Wanted, cutter, fit_thresholds, objective, out_of_fold, requirement
from partitioner import measures, thresholds, tiers
from partitioner.thresholds import Objective, Requirement, Values, fit
from schemas import delta
from tests import judged
from tests.judged import MODEL, PROMPT, fill, gold, pair, scored

QUICK = Wanted("one", None, Objective(), (), replicates=50, refits=5)


def rows(seed: int = 0, queries: int = 40, each: int = 10) -> Rows:
    random = np.random.default_rng(seed)
    p = random.dirichlet([0.6] * 4, queries * each)
    label = np.array([random.choice(4, p=x) for x in p])
    segments = np.array(["a" if i // each % 4 else "b" for i in range(len(p))], dtype=object)
    return Rows(p, np.eye(4)[label], np.arange(len(p)) // each, segments)


FITS = (
    ("boundary", Objective("kappa"), 4096),
    ("one", Objective(), 4096),
    ("one", Objective("kappa"), 4096),
    ("boundary", Objective(), 20_000),
    ("boundary", Objective(), 64),
    ("boundary", Objective("recall", label=4), 4096),
)


@pytest.mark.parametrize("some", [FITS[:1], pytest.param(FITS[1:], marks=pytest.mark.slow)], ids=["one", "others"])
def test_spark_finds_the_cuts_that_numpy_finds(spark: SparkSession, some: list[tuple[Any, Objective, int]]) -> None:
    random = np.random.default_rng(4)
    p = random.dirichlet([0.5] * 4, 3000)
    p[:500] = np.round(p[:500] * 4) / 4  # ties, zeros and ones
    weights = np.eye(4)[[random.choice(4, p=x / x.sum()) if x.sum() else 0 for x in p]]
    weights[::3] = weights[::3] * 2 / 3 + np.eye(4)[0] / 3
    c = tiers.cumulative(p)
    names = ["c4", "c3", "c2", "w4", "w3", "w2", "w1"]
    frame = spark.createDataFrame(np.hstack([c, weights]).tolist(), ", ".join(f"{n} DOUBLE" for n in names))
    here = Values(c).cuts(weights)
    with closing(thresholds.Spread(frame, 3)) as pieces:
        assert len(pieces.each(lambda piece: [0.0])) == 3
        for rule, objective, cuts in some:
            required = (Requirement("precision", 4, 0.5),)
            found, expected = (fit(each, rule, objective, required, cuts) for each in (pieces, here))
            same = (expected.taus, expected.lows, expected.highs, expected.value)
            assert (found.taus, found.lows, found.highs, found.value) == same
            assert found.confusion.tolist() == expected.confusion.tolist()


WANTED = Wanted(
    "boundary", "category", Objective(), (Requirement("recall", 3, 0.5),), min_gold=40, replicates=100, refits=10
)


def filled(spark: SparkSession, root: str) -> None:
    """Judged pairs of which some are left out, each for another reason."""
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


def test_a_version_with_its_figures_is_stored_and_what_is_left_out_is_counted_and_named(
    spark: SparkSession, root: str, capsys: pytest.CaptureFixture[str]
) -> None:
    filled(spark, root)
    version = fit_thresholds(spark, root, WANTED)
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
        "binary uses only labels 4, 1 of 4, 3, 2, 1; left out as another scale; name it with --gold-source",
        "3 pairs have no judgement",
        "1 of 2 values of category get cuts of their own",
        "these take the cuts of all: Towels (",
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
        (version, "candidate", "", 120), (version, "candidate", "Kettles", 88)
    }  # fmt: skip
    values = {r["segment"]: r["value"] for r in stored}
    assert f"version {version} is a candidate: macro_f1 {values['']:.4f} on 120 judgements of" in said
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


@pytest.mark.slow
def test_flags_are_kept_with_a_version_and_more_judgements_than_the_driver_takes_give_the_same_cuts_from_the_workers(
    spark: SparkSession, root: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    filled(spark, root)
    assert fit_thresholds(spark, root, WANTED) == 1
    stored = delta.read(spark, root, "thresholds").collect()
    flags = ["--objective", "accuracy", "--allow-train", "--refits", "0", "--replicates", "0"]
    assert job.main(["--tables", root, *flags, "--gold-source", "raters"]) == 0
    last = delta.read(spark, root, "thresholds").where("version = 2").collect()
    assert {(r["n_gold"], r["allow_train"], r["objective"]) for r in last} == {(184, True, "accuracy")}
    assert len({r["tau"] for r in last}) == 1
    monkeypatch.setattr(job, "LOCAL_ROWS", 100)
    assert fit_thresholds(spark, root, replace(WANTED, replicates=0, refits=0)) == 3
    said = capsys.readouterr().out
    assert "cuts are fitted on all 120 judgements" in said
    assert "these take the cuts of all: Towels (" in said
    names = ("segment", "boundary", "tau", "optimal_low", "optimal_high", "value", "n_gold")
    rows_of = delta.read(spark, root, "thresholds").where("version = 3").collect()
    assert {tuple(r[n] for n in names) for r in rows_of} == {tuple(r[n] for n in names) for r in stored}
    done = delta.read(spark, root, "runs").where("job = 'fit_thresholds' AND status = 'done'").collect()
    told_of = sorted(r["message"] for r in done)
    assert told_of[0] == (
        f"version 1: --model-id {MODEL} --prompt-id {PROMPT} --rule boundary --by category --objective macro_f1 "
        "--require 'recall of Related or better at least 0.5' --raters fractions --min-gold 40 --folds 5 "
        "--replicates 100 --refits 10 --seed 0"
    )
    assert told_of[1].startswith(f"version 2: --model-id {MODEL} --prompt-id {PROMPT} --rule one --objective acc")
    assert "--raters fractions --gold-source raters" in told_of[1]


@pytest.mark.slow
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
    given = np.where(np.repeat(right, 20), 4, 1)
    weights = np.tile(np.eye(4)[0], (1000, 1))
    queries = np.arange(1000) // 20
    by_query = measures.bootstrap(measures.by_query(weights, given, queries, 50), 500, 0)
    by_pair = measures.bootstrap(measures.by_query(weights, given, np.arange(1000), 1000), 500, 0)
    widths = [np.subtract(*measures.interval(measures.accuracy(b))[::-1]) for b in (by_query, by_pair)]
    assert 3 < widths[0] / widths[1] < 6  # the square root of 20


def test_a_segment_with_too_few_judgements_takes_the_cut_of_all() -> None:
    wanted = Wanted("one", "category", Objective(), (), min_gold=150)
    assert job.own_segments({"a": (300, 30), "b": (100, 10), "c": (200, 9), "": (900, 90)}, wanted) == ["a"]
    all_rows = rows()
    cut = cutter("one_by_category", all_rows, wanted, ["a"])
    assert set(cut.fits) == {"", "a"}
    here = all_rows.segments == "b"
    expected = tiers.cut(tiers.cumulative(all_rows.p[here]), cut.fits[""].taus)
    assert cut.tiers(all_rows)[here].tolist() == expected.tolist()
    # One of which no row is among those that were drawn.
    assert cutter("one_by_category", all_rows, wanted, ["a", "z"]).fits.keys() == {"", "a"}
    assert job.spread(all_rows, replace(wanted, refits=2), ["a", "z"], 1.0).keys() == {"", "a"}


def test_what_is_required_holds_for_all_segments_together_or_the_fit_fails_and_what_fell_back_is_named(
    capsys: pytest.CaptureFixture[str],
) -> None:
    all_rows = rows()
    # In b the model is wrong: what it is sure of is Irrelevant. Over all rows the requirement can still be met.
    spoilt = all_rows.segments == "b"
    weights = np.where(spoilt[:, None], np.eye(4)[3], all_rows.weights)
    all_rows = Rows(all_rows.p, weights, all_rows.queries, all_rows.segments)
    wanted = Wanted("boundary", "category", Objective("recall", label=4), (Requirement("precision", 4, 0.6),))
    for segments in (["a", "b"], ["a"]):
        cut = cutter(wanted.name, all_rows, wanted, segments, relax=False)
        assert set(cut.fits) == {"", "a"}  # in b it cannot be had
        job._told_segments({"a": (300, 30), "b": (100, 10), "": (7, 2)}, segments, wanted, cut)
    said = capsys.readouterr().out
    assert "1 of 3 values of category get cuts of their own" in said
    assert "b (what is required cannot be had there), (none) (7 judgements of 2 queries)" in said
    assert "b (100 judgements of 10 queries), (none) (7 judgements of 2 queries)" in said
    confusion = measures.confusions(all_rows.weights, cut.tiers(all_rows))
    with pytest.raises(
        thresholds.Impossible, match=r"come to 0\.\d+, not to precision of Excellent at least 0\.6: the"
    ):
        job._must_hold(confusion, wanted)
    job._must_hold(confusion, replace(wanted, requirements=()))


def test_the_comparison_shows_the_recall_that_was_asked_for() -> None:
    wanted = replace(QUICK, objective=Objective("recall", label=3))
    all_rows, names = rows(), ["one", "argmax"]
    given = out_of_fold(all_rows, wanted, names, [])
    found = job._figures(wanted, names, "out_of_fold", all_rows, given, [])
    assert "recall_related_or_better" in job._table(wanted, names, "out_of_fold", found)
    assert "one against argmax, recall_related_or_better: " in job._verdicts(wanted, names, found)


def test_without_replicates_there_are_no_intervals_and_nothing_wins() -> None:
    wanted, all_rows, names = replace(QUICK, replicates=0), rows(), ["one", "argmax"]
    found = job._figures(wanted, names, "test", all_rows, out_of_fold(all_rows, wanted, names, []), [])
    assert all(np.isnan([low, high]).all() for *_, low, high, _ in found)
    assert not np.isnan([f[4] for f in found if f[3] == "accuracy"]).any()
    assert "interval" not in (told := job._table(wanted, names, "test", found))
    assert "nan" not in told
    out = job._figures(wanted, names, "out_of_fold", all_rows, out_of_fold(all_rows, wanted, names, []), [])
    assert "wins" not in (said := job._verdicts(wanted, names, out))
    assert "cannot be told apart" in said


def test_a_temperature_that_was_lost_is_found_again() -> None:
    random = np.random.default_rng(1)
    p = random.dirichlet([0.8] * 4, 20_000)
    weights = np.eye(4)[(p.cumsum(1) > random.random((len(p), 1))).argmax(1)]
    sharp = p**2.5 / (p**2.5).sum(1, keepdims=True)
    assert measures.temperature(sharp, weights) == pytest.approx(2.5, rel=0.05)
    both = sharp, tiers.scaled(sharp, 2.5)
    raw, mended = (measures.ece(measures.calibration(x, weights)["ece_excellent"]) for x in both)
    assert mended < 0.01 < raw
    # What is told of it comes from temperatures that were fitted without the row's query.
    few = Rows(sharp[:400], weights[:400], np.arange(400) // 10, np.array([""] * 400, dtype=object))
    told = {(f[0], f[1], f[3]): f[4] for f in job._calibration(few, replace(QUICK, temperature=True))}
    scaled = tiers.scaled(few.p, measures.temperature(few.p, few.weights))
    assert told["scaled", "out_of_fold", "log_loss"] > measures.likelihood_loss(scaled, few.weights)
    assert told["scaled", "out_of_fold", "log_loss"] < told["raw", "fit", "log_loss"]
    assert not any(f[0] == "scaled" for f in job._calibration(few, QUICK))


def test_requirements_and_objectives_are_read_from_sentences() -> None:
    assert requirement("precision of Excellent at least 0.95") == Requirement("precision", 4, 0.95)
    assert requirement("Irrelevant shown as Related or better at most 2 %") == Requirement("shown", 3, 0.02, 1)
    assert requirement("recall of related at least 90%") == Requirement("recall", 3, 0.9)
    assert objective("recall:Related") == Objective("recall", label=3)
    assert objective("cost", "[[0,1,2,3],[1,0,1,2],[2,1,0,1],[3,2,1,0]]").costs is not None
    for bound in (0.95, 1.0, 0.00002, 0.9999999):
        asked = Requirement("shown", 3, bound, 1)
        assert requirement(str(asked)) == asked
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


@pytest.mark.slow
def test_who_judged_what_was_learnt_or_held_out_and_what_is_one_query_is_known_of_each_judgement(
    spark: SparkSession, root: str
) -> None:
    asked = ["q", "Straße  A", "STRASSE\u00a0a", "ﬁlter", "filter"]
    fill(spark, root, "pairs", [pair(i, query, locale=f"l{i}") for i, query in enumerate(asked)])
    fill(spark, root, "label_probs", [scored(i, query, [0.7, 0.1, 0.1, 0.1]) for i, query in enumerate(asked)])
    fill(spark, root, "models", [
        {"model_id": MODEL, "path": "/m", "stage": "sft", "weights_hash": "f", "metrics": {}, "created_at": judged.NOW,
         "trained_on": ["raters"]}
    ])  # fmt: skip
    fill(spark, root, "gold", [
        gold(0, 4, rater_labels=[3, 4, 1], weight=6.0), gold(0, 2, source="single"),
        gold(1, 4, "train"), gold(1, 1, "test", source="second"), gold(1, 1, "dev", source="third"),
        gold(2, 4, "test"), gold(2, 1, "dev", source="second"),
        gold(3, 4, "train", source="second"), gold(4, 4, rater_labels=[1, 2, 3, 4]),
    ])  # fmt: skip

    def found(**more: Any) -> dict[tuple[str, str], Any]:
        frame = job.judged(spark, root, replace(QUICK, **more), MODEL, PROMPT)
        return {(r["pair_id"].lstrip("0") or "0", r["source"]): r for r in frame.collect()}

    rows = found()
    of = {key: row["use"] for key, row in rows.items()}
    # A second source's judgement of a pair that was learnt, or is held out, does not let it in.
    assert {of["1", name] for name in ("raters", "second", "third")} == {"model was trained on it"}
    assert (of["2", "raters"], of["2", "second"]) == ("test", "kept for test by another source")
    assert of["3", "second"] == of["0", "raters"] == "fit"
    allowed = found(allow_train=True)
    assert [allowed["1", name]["use"] for name in ("second", "third")] == ["test", "kept for test by another source"]
    assert found(sources=("second",))["0", "raters"]["use"] == "source not asked for"
    with pytest.raises(
        ValueError, match=r"--gold-source nobody: gold has no such source \(there are: raters, second, "
    ):
        found(sources=("nobody",))
    # One query is what the split takes for one, whatever its locale.
    query = {key: row["query"] for key, row in rows.items()}
    assert query["1", "raters"] == query["2", "raters"] != query["3", "second"] == query["4", "raters"]
    # Raters count by their shares, or as their lower median, whatever single label stands beside them.
    weights = {key: [row[f"w{y}"] for y in (4, 3, 2, 1)] for key, row in rows.items()}
    assert weights["0", "raters"] == pytest.approx([2, 2, 0, 2])
    assert weights["0", "single"] == [0, 0, 1, 0]
    medians = found(raters="median")
    assert [medians["0", "raters"][f"w{y}"] for y in (4, 3, 2, 1)] == [0, 6, 0, 0]
    assert [medians[key]["label"] for key in (("0", "raters"), ("0", "single"), ("4", "raters"))] == [3, 2, 2]


def test_a_source_that_uses_few_labels_is_named_however_few_judgements_it_has(
    spark: SparkSession, root: str, capsys: pytest.CaptureFixture[str]
) -> None:
    frame = spark.createDataFrame(
        [("p", "binary", "fit", y) for y in (4, 1)] + [("p", "raters", "test", y) for y in (4, 3, 2, 1)],
        "pair_id STRING, source STRING, use STRING, label INT",
    )
    assert job._told(spark, root, frame) == {"fit": 2, "test": 4, "pairs without a judgement": 0}
    said = capsys.readouterr().out
    assert "binary uses only labels 4, 1 of 4, 3, 2, 1; fitted on all the same: under 200 judgements do not" in said
    assert "raters uses" not in said
