"""The planner against a slow trie, and its cuts against the rows they must keep."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from partitioner import prefix

BLOCK = 4


def nodes_of_a_trie(prompts: list[list[int]]) -> int:
    """The slow obvious version: one node for each distinct prefix."""
    return len({tuple(p[:n]) for p in prompts for n in range(1, len(p) + 1)})


def floor_of_whole_blocks(prompts: list[list[int]], block: int) -> int:
    """Each distinct chain of full blocks once, and every prompt's own rest; a repeated prompt that ends on a block's
    boundary has no rest and computes its last block again, for without a token there is no answer."""
    chains = {tuple(p[: k * block]) for p in prompts for k in range(1, len(p) // block + 1)}
    whole = [tuple(p) for p in prompts if len(p) % block == 0]
    return block * (len(chains) + len(whole) - len(set(whole))) + sum(len(p) % block for p in prompts)


def a_night(products: int, pairs: int, seed: int = 7) -> list[list[int]]:
    """Prompts of a shared head, a product part of 6 to 20 tokens and a query of 1 to 4, out of five ids."""
    rng = random.Random(seed)
    parts = [[1, 2, 3] + [rng.randrange(5) for _ in range(rng.randrange(6, 20))] for _ in range(products)]
    return [part + [rng.randrange(5) for _ in range(rng.randrange(1, 5))] for part in parts for _ in range(pairs)]


def as_rows(spark: SparkSession, prompts: list[list[int]], group_tokens: list[int]) -> DataFrame:
    rows = [(i, ids, group) for i, (ids, group) in enumerate(zip(prompts, group_tokens, strict=True))]
    random.Random(1).shuffle(rows)
    return spark.createDataFrame(rows, "pair INT, ids ARRAY<INT>, group_tokens INT")


def landed(rows: DataFrame, parts: int) -> prefix.Line:
    return prefix.line(prefix.lined_up(rows, parts, BLOCK).localCheckpoint(), BLOCK)


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12), min_size=1, max_size=30))
@settings(max_examples=200, deadline=None)
def test_the_measures_of_a_sorted_line_sum_to_the_slow_trie_and_the_block_floor(prompts: list[list[int]]) -> None:
    prompts = sorted(prompts)
    batch = pa.RecordBatch.from_arrays(
        [pa.array(prompts, pa.list_(pa.int32())), pa.array([1] * len(prompts), pa.int32())], ["ids", "group_tokens"]
    )
    (measured,) = prefix._measure(BLOCK)(iter([batch]))
    assert sum(measured["new_nodes"].to_pylist()) == nodes_of_a_trie(prompts)
    assert sum(measured["new_in_blocks"].to_pylist()) == floor_of_whole_blocks(prompts, BLOCK)


def test_a_last_prompt_that_costs_nothing_is_in_the_last_wave(spark: SparkSession) -> None:
    """Two products of one text, asked alike, behind as much work as begins a new stretch."""
    prompts = [[1, 2, *range(n * 20, n * 20 + 14)] for n in range(1, 700)]
    line = landed(as_rows(spark, [*prompts, prompts[-1]], [2] * 700), 1)
    assert line.shards(0, line.length, 1).count() == 700


@pytest.mark.parametrize("parts", [1, 3])
def test_the_totals_of_a_line_do_not_depend_on_the_parts_it_was_sorted_in(spark: SparkSession, parts: int) -> None:
    prompts = a_night(12, 5)
    line = landed(as_rows(spark, prompts, [len(p) for p in prompts]), parts)
    assert line.prompts == 60
    assert line.prompt_tokens == sum(map(len, prompts))
    assert line.trie_nodes == nodes_of_a_trie(prompts)
    assert line.block_floor == floor_of_whole_blocks(prompts, BLOCK)


@pytest.mark.parametrize(("waves", "shards"), [(1, 1), (3, 2), (7, 3)])
def test_every_prompt_is_in_exactly_one_wave_and_shard(spark: SparkSession, waves: int, shards: int) -> None:
    prompts = a_night(10, 4)
    line = landed(as_rows(spark, prompts, [len(p) - 1 for p in prompts]), 3)
    bounds = [round(line.length * i / waves) for i in range(waves + 1)]
    found = [
        row["pair"]
        for begin, end in itertools.pairwise(bounds)
        for row in line.shards(begin, end, shards).select("pair").collect()
    ]
    assert sorted(found) == list(range(40))
    # What a run that ends before a wave has not asked for: all that the waves before it leave.
    for at in bounds:
        before = [prompts[row["pair"]] for row in line.shards(0, at, 1).select("pair").collect()] if at else []
        tokens, nodes, in_blocks = line.behind(at)
        assert tokens == line.prompt_tokens - sum(map(len, before))
        assert 0 <= nodes - (line.trie_nodes - nodes_of_a_trie(before)) <= 3 * 23  # a prompt at each part's seam
        assert 0 <= in_blocks - (line.block_floor - floor_of_whole_blocks(before, BLOCK)) <= 3 * 23


@pytest.mark.parametrize("shards", [1, 4])
def test_each_shard_is_a_task_of_its_own_in_the_order_of_the_token_ids(spark: SparkSession, shards: int) -> None:
    prompts = a_night(20, 3)
    line = landed(as_rows(spark, prompts, [len(p) - 1 for p in prompts]), 2)
    rows = line.shards(0, line.length, shards).withColumn("task", F.spark_partition_id()).collect()
    assert {row["shard"] for row in rows} == set(range(shards))
    assert all(row["task"] == row["shard"] for row in rows)
    for shard in range(shards):
        ids = [list(row["ids"]) for row in rows if row["shard"] == shard]
        assert ids == sorted(ids)


def test_adaptive_execution_as_a_cluster_has_it_leaves_each_shard_its_own_task(spark: SparkSession) -> None:
    prompts = a_night(20, 3)
    line = landed(as_rows(spark, prompts, [len(p) - 1 for p in prompts]), 2)
    spark.conf.set("spark.sql.adaptive.enabled", "true")
    try:
        rows = line.shards(0, line.length, 4).withColumn("task", F.spark_partition_id()).collect()
    finally:
        spark.conf.set("spark.sql.adaptive.enabled", "false")
    assert {(row["shard"], row["task"]) for row in rows} == {(n, n) for n in range(4)}


def test_a_prompt_that_is_its_neighbours_twin_in_another_group_is_in_a_wave_too(spark: SparkSession) -> None:
    """The query of the one is written at the end of the other's product."""
    prompts = [[1, 2, 3], [5, 6, 7, 8], [5, 6, 7, 8]]
    line = landed(as_rows(spark, prompts, [2, 2, 3]), 1)
    cut = range(0, line.length, 2)
    found = [line.shards(begin, min(begin + 2, line.length), 1).count() for begin in cut]
    assert sum(found) == 3


def test_shards_have_equal_work_to_within_one_product(spark: SparkSession) -> None:
    prompts = a_night(40, 3)
    line = landed(as_rows(spark, prompts, [len(p) for p in prompts]), 1)
    shards = line.shards(0, line.length, 4).groupBy("shard").agg(F.sum("new_nodes").alias("work"))
    work = [row["work"] for row in shards.collect()]
    assert len(work) == 4
    assert max(work) - min(work) <= 2 * 35  # a product's part and its pairs are at most 35 nodes here


def test_the_pairs_of_a_product_stay_together(spark: SparkSession) -> None:
    parts = [[p, *range(9)] for p in range(16)]
    prompts = [[*part, q] for part in parts for q in range(5)]
    line = landed(as_rows(spark, prompts, [10] * len(prompts)), 2)
    rows = line.shards(0, line.length, 5).selectExpr("ids[0] AS product", "shard").distinct().collect()
    assert len(rows) == 16


def test_a_very_hot_product_is_split(spark: SparkSession) -> None:
    rng = np.random.default_rng(3)
    prompts = [[7] * 10 + rng.integers(0, 500, 20).tolist() for _ in range(3000)]
    line = landed(as_rows(spark, prompts, [10] * 3000), 1)
    assert line.length > 6 * prefix.HOT_TOKENS
    shards = line.shards(0, line.length, 2).groupBy("shard").agg(F.sum("new_nodes").alias("work"))
    work = [row["work"] for row in shards.collect()]
    assert len(work) == 2
    assert abs(work[0] - work[1]) <= 2 * prefix.HOT_TOKENS


def test_nothing_to_score_is_an_empty_line(spark: SparkSession) -> None:
    line = landed(spark.createDataFrame([], "pair INT, ids ARRAY<INT>, group_tokens INT"), 2)
    assert (line.prompts, line.length, line.block_floor) == (0, 0, 0)
