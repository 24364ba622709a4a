"""Preferences: which answers are set against each other."""

from __future__ import annotations

from argparse import Namespace
from types import SimpleNamespace
from typing import Any

import pytest
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from jobs import train_dpo, train_sft
from jobs.train_dpo import preferences
from tests import judged

Answer = tuple[int, str, bool]  # label, chain, whether it agrees


def answers(spark: SparkSession, of_pair: dict[str, tuple[int, list[Answer]]]) -> DataFrame:
    """Rows of `samples`: for each pair its gold label and its answers, numbered."""
    rows = [
        judged.sample(pair, gold, label, chain, sample=number, conclusion=label if agrees else None, agrees=agrees)
        for pair, (gold, told) in of_pair.items()
        for number, (label, chain, agrees) in enumerate(told)
    ]
    return judged.rows(spark, "samples", rows)


def made(spark: SparkSession, of_pair: dict[str, tuple[int, list[Answer]]], per_pair: int = 2) -> list[dict[str, Any]]:
    return [row.asDict() for row in preferences(answers(spark, of_pair), per_pair, seed=0).collect()]


def test_right_answers_with_chains_that_conclude_them_are_set_against_wrong_ones_of_the_same_pair(
    spark: SparkSession,
) -> None:
    found = made(
        spark,
        {
            "a": (4, [(4, "good", True), (3, "bad", True), (4, "good", True), (3, "bad", True), (4, "muddled", False)]),
            "never": (4, [(3, "bad", True), (2, "worse", True)]),
            "always": (2, [(2, "good", True), (2, "fine", True)]),
        },
    )
    assert [(r["pair_id"], r["label"], r["chosen_chain"], r["rejected_label"], r["rejected_chain"]) for r in found] == [
        ("a", 4, "good", 3, "bad")  # equal answers count once, a chain that does not conclude its label is not chosen
    ]


def test_a_pair_gives_at_most_so_many_and_the_order_of_rows_changes_nothing(spark: SparkSession) -> None:
    told: list[Answer] = [(4, f"right {n}", True) for n in range(5)] + [
        (1 + n % 3, f"wrong {n}", True) for n in range(5)
    ]
    rows = answers(spark, {"a": (4, told)})
    one, other = (
        preferences(r, 3, seed=0).drop("created_at").collect() for r in (rows, rows.orderBy("chain").repartition(2))
    )
    assert len(one) == 3
    assert sorted(one) == sorted(other)
    assert len({r["chosen_sample"] for r in one}) == len({r["rejected_sample"] for r in one}) == 3


def test_no_label_gets_more_than_an_equal_share(spark: SparkSession) -> None:
    mixed: dict[str, tuple[int, list[Answer]]] = {
        f"four {n}": (4, [(4, "good", True), (1, "bad", True)]) for n in range(9)
    }
    mixed["one"] = (1, [(1, "good", True), (2, "bad", True)])
    found = [row["label"] for row in made(spark, mixed)]
    assert (found.count(4), found.count(1)) == (5, 1)  # ten were found, of two labels


def test_answers_are_those_of_the_fullest_draw_to_what_is_judged_now(spark: SparkSession, root: str) -> None:
    draws: list[tuple[str, int, int, list[str]]] = [  # run, answers a pair, gold as it was, pairs
        ("1-full", 2, 4, ["a", "b", "c"]),
        ("2-some", 2, 4, ["a"]),
        ("3-greedy", 1, 4, ["a", "b", "c"]),
        ("4-before", 2, 3, ["a", "b", "c"]),  # the label was put right since
    ]
    rows = [
        judged.sample(pair, was, 4, "why", run_id=run_id, sample=n)
        for run_id, count, was, asked in draws
        for pair in asked
        for n in range(count)
    ]
    judged.fill(spark, root, "samples", rows)
    pairs = spark.createDataFrame([(pair, "h", 4) for pair in "abc"], "pair_id STRING, content_hash STRING, label INT")
    lesson: Any = SimpleNamespace(
        parent=SimpleNamespace(model_id=judged.MODEL), prompt=SimpleNamespace(prompt_id=judged.PROMPT)
    )
    found = train_sft.answered(spark, Namespace(tables=root), lesson, pairs).collect()
    assert sorted((r["run_id"], r["pair_id"]) for r in found) == [("1-full", p) for p in "aabbcc"]


def test_pairs_that_were_never_right_are_counted_and_listed(
    spark: SparkSession, root: str, capsys: pytest.CaptureFixture[str]
) -> None:
    never, mixed = judged.pair_key(1), judged.pair_key(2)
    judged.fill(spark, root, "pairs", [judged.pair(1, "kettle"), judged.pair(2, "towel")])
    drawn = answers(
        spark, {never: (4, [(3, "no", True), (2, "no", True)]), mixed: (3, [(3, "yes", True), (4, "no", True)])}
    )
    train_dpo.tell(spark, Namespace(tables=root), drawn, preferences(drawn, 1, seed=0))
    said = capsys.readouterr().out.splitlines()
    assert said[:3] == [
        "train_dpo:   4 Excellent: 0 preferences of 1 pairs (0 always right, 1 never)",
        "train_dpo:   3 Related: 1 preferences of 1 pairs (0 always right, 0 never)",
        "train_dpo:   never right: 4 'kettle' and 'Product 1'",
    ]
    assert said[3].startswith("train_dpo: 1 pairs were never right: a teacher's next work (write_chains ")
    drawn.createOrReplaceTempView("samples")
    assert [row[0] for row in drawn.sparkSession.sql(said[3].split('"')[1]).collect()] == [never]
    drawn.sparkSession.catalog.dropTempView("samples")


def test_without_preferences_it_is_told_whether_more_answers_would_help(spark: SparkSession) -> None:
    asked = Namespace(tables="T", model="M")
    never = answers(spark, {"a": (4, [(3, "no", True)]), "b": (4, [(4, "yes", True)])})
    assert "sample more answers (sample --tables T --model M --n 16)" in train_dpo.why_none(never, asked)
    cut_off = answers(spark, {"a": (4, [(3, "no", True), (4, "yes", True)])})
    cut_off = cut_off.withColumn("finished", F.col("label") == 4)
    assert "sample more answers" in train_dpo.why_none(cut_off, asked)
    without_chains = answers(spark, {"a": (4, [(3, "", False), (4, "", False)])})
    assert not preferences(without_chains, 1, 0).count()
    assert "has a chain that concludes its label" in train_dpo.why_none(without_chains, asked)


@pytest.mark.parametrize("column", ["label", "rejected_label"])
def test_the_table_takes_no_label_of_another_scale(spark: SparkSession, root: str, column: str) -> None:
    (row,) = preferences(answers(spark, {"a": (4, [(4, "good", True), (3, "bad", True)])}), 1, 0).collect()
    with pytest.raises(Exception, match="label_range"):
        judged.fill(spark, root, "preferences", [row.asDict() | {column: 5}])
