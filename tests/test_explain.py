"""Reasoning for pairs chosen by SQL, on real Spark and Delta with an engine that needs no model."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from pyspark.sql import SparkSession

import jobs
from jobs.explain import explain
from schemas import delta
from schemas.labels import LABELS, P_COLUMNS
from tests import judged, pairs
from tests.engines import answer_form, written
from tests.pairs import PRODUCTS, QUERIES, put
from udfs import adapter
from udfs.answer import conclusion
from udfs.engine import Sampling
from udfs.model import Model
from udfs.prompt import Renderer
from udfs.score import Scoring

FORM = answer_form()
KETTLES = "SELECT pair_id FROM pairs WHERE product_id LIKE 'k%' ORDER BY pair_id"


@pytest.fixture
def what(tmp_path_factory: pytest.TempPathFactory) -> Scoring:
    """A model whose folder names the token that ends its answers."""
    made = pairs.scoring()
    folder = tmp_path_factory.mktemp("model")
    (folder / "generation_config.json").write_text(f'{{"eos_token_id": {FORM.end_ids[0]}}}')
    model = Model(str(folder), "0123456789abcdef", "ff", "Fake", 512, 2048, made.model.tokenizer_json, None, None, "")
    return Scoring(model, "external", made.prompt, made.settings, made.load_engine)


def explanations(spark: SparkSession, root: str) -> dict[tuple[str, str], dict[str, Any]]:
    pairs = delta.read(spark, root, "pairs").select("pair_id", "product_id", "query")
    rows = delta.read(spark, root, "explanations").join(pairs, "pair_id", how="inner").collect()
    return {(r["product_id"], r["query"]): r.asDict() for r in rows}


def score(spark: SparkSession, root: str, what: Scoring) -> None:
    """Rows of label_probs as rescore writes them, for every pair; the likeliest label differs from pair to pair."""
    named = {"model_id": what.model.model_id, "prompt_id": what.prompt.prompt_id}
    rows = []
    for row in delta.read(spark, root, "pairs").collect():
        p = np.roll([0.7, 0.1, 0.15, 0.05], int(row["pair_id"], 16) % 4).tolist()
        same = {name: row[name] for name in ("pair_id", "product_id", "locale", "content_hash")}
        rows.append(judged.scored(0, row["query"], p, **named, **same))
    delta.upsert(spark, root, "label_probs", judged.rows(spark, "label_probs", rows))


def scored_but_for_two(spark: SparkSession, root: str, what: Scoring) -> str:
    """Pairs of which one was never scored and one has another text since; SQL that selects kettles and no pair."""
    put(spark, root, PRODUCTS)
    score(spark, root, what)
    put(spark, root, [("k9", "Kettle that nobody scored", {}, None)], QUERIES[:1])
    put(spark, root, [("k2", "Plastic kettle, red", *PRODUCTS[1][2:])], QUERIES[:1])
    return f"SELECT pair_id FROM ({KETTLES}) UNION ALL SELECT 'none such'"


@pytest.mark.slow
def test_the_chosen_pairs_get_the_chain_that_follows_their_likeliest_label(
    spark: SparkSession, root: str, what: Scoring, capsys: pytest.CaptureFixture[str]
) -> None:
    selected = scored_but_for_two(spark, root, what)
    run = explain(spark, root, what, selected, max_tokens=40)
    assert run.counts == {"seen": 10, "unknown": 1, "not_scored": 1, "stale": 1, "sampled": 7, "refused": 0}
    found = explanations(spark, root)
    assert set(found) == {(p, q) for p in ("k1", "k2") for q in QUERIES} - {("k2", QUERIES[0])}
    render = Renderer(what.prompt)
    texts = {p[0]: render.product(p[1], "Hearthline", "Kitchen", *p[2:]) for p in PRODUCTS}
    probs = {r["pair_id"]: r for r in delta.read(spark, root, "label_probs").collect()}
    asked = Sampling(40, FORM.end_ids, temperature=0.0)
    for (product, query), row in found.items():
        p = [probs[row["pair_id"]][name] for name in P_COLUMNS]
        assert row["label"] == LABELS[p.index(max(p))]
        prompt = render.join(texts[product], render.query(query))
        ids = [*prompt, FORM.label_ids[LABELS.index(row["label"])]]
        own = written(ids, asked.seed_of(ids))[:40]
        read = FORM.read([ids[-1], *own])
        assert (row["chain"], row["finished"], row["tokens"]) == (read.chain, read.finished, len(own) + 1)
        assert row["conclusion"] == conclusion(read.chain)
        assert row["contradicts"] == (row["conclusion"] not in (None, row["label"]))
        assert (row["label_source"], row["run_id"]) == ("argmax", run.run_id)
    told = sum(r["contradicts"] for r in found.values())
    assert 0 < told < len(found)
    said = capsys.readouterr().out
    assert f"of 7 chains {told} contradict their label" in said
    assert "1 not explained: its text changed since it was scored" in said


@pytest.mark.slow
def test_what_is_explained_is_not_asked_again_and_what_is_scored_anew_is(
    spark: SparkSession, root: str, what: Scoring
) -> None:
    selected = scored_but_for_two(spark, root, what)
    with pytest.raises(ValueError, match=r"--max-tokens 512: .* together at most 512"):
        explain(spark, root, what, selected, max_tokens=512)
    explain(spark, root, what, selected, max_tokens=40)
    version = delta.version(spark, root, "explanations")
    again = explain(spark, root, what, selected, max_tokens=40)
    assert again.counts == {"seen": 10, "unknown": 1, "not_scored": 1, "stale": 1, "skipped": 7}
    assert delta.version(spark, root, "explanations") == version
    score(spark, root, what)
    assert explain(spark, root, what, KETTLES, limit=20, max_tokens=40).counts["sampled"] == 2


@pytest.mark.slow
def test_pairs_that_nobody_scored_are_refused_with_the_command_that_mends_it(
    spark: SparkSession, root: str, what: Scoring
) -> None:
    put(spark, root, PRODUCTS[:1], QUERIES[:2])
    with pytest.raises(ValueError, match=r"none of the 2 selected .*has not scored it.*score them first: rescore"):
        explain(spark, root, what, KETTLES)
    (run,) = delta.read(spark, root, "runs").where("job = 'explain'").collect()
    assert run["status"] == "failed"
    assert delta.read(spark, root, "explanations").isEmpty()


def test_a_model_that_answers_chain_first_has_no_scores_to_explain(
    spark: SparkSession, root: str, what: Scoring
) -> None:
    adapter.write_recipe(what.model.path, {"order": "pre"})
    with pytest.raises(ValueError, match=r"was taught --order pre.*ask it for whole answers \(sample\)"):
        explain(spark, root, what, KETTLES)


@pytest.mark.parametrize(
    "query",
    [
        "DROP VIEW pairs",
        "SELECT query FROM pairs",
        "SELECT pair_id FROM pairs; SELECT 1",
        "SELECT pair_id FROM nowhere",
        "pairs",
        "",
        "SELECT pair_id FROM pairs WHERE false",
        "SELECT pair_id FROM labels WHERE tier = 1",  # nothing is in force
    ],
)
def test_what_is_no_query_for_pairs_is_refused_and_nothing_is_done(spark: SparkSession, root: str, query: str) -> None:
    why = (
        "the query selects no pair"
        if query == "pairs" or "WHERE" in query
        else "Wanted is one query that returns a column pair_id"
    )
    with pytest.raises(ValueError, match=f"--pairs: .*{why}"):
        jobs.selected(spark, root, "explain", query, 10)
    assert spark.catalog.tableExists("pairs")


@pytest.mark.slow
def test_a_query_may_have_a_comment_at_its_end_and_no_more_than_the_limit_is_taken_in_its_order(
    spark: SparkSession, root: str, capsys: pytest.CaptureFixture[str]
) -> None:
    put(spark, root, PRODUCTS)
    ids = sorted(r["pair_id"] for r in delta.read(spark, root, "pairs").collect())
    query = "SELECT * FROM pairs ORDER BY pair_id DESC -- the last ones;"
    assert [r["pair_id"] for r in jobs.selected(spark, root, "explain", query, 3).collect()] == ids[::-1][:3]
    assert "more than 3 pairs; the first 3 are taken" in capsys.readouterr().out
