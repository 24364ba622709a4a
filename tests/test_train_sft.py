"""The training jobs on real Spark and Delta with a tiny real model: what they take, refuse, leave and register."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pyspark.sql import SparkSession

from jobs import ingest, rescore, train_dpo, train_grpo, train_sft, write_chains
from schemas import delta
from schemas.labels import NAMES
from tests.models import tiny_model
from tests.test_ingest import jsonl, pair
from udfs import adapter
from udfs.model import inspect


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_model(tmp_path_factory.mktemp("base") / "model"))


def taught(root: str, folder: Path, **fields: Any) -> None:
    """Twelve judged pairs, eight of them of the train split, with chains for all."""
    rows = [pair(n, label=1 + n % 4, split="train" if n < 8 else "dev" if n < 10 else "test") for n in range(12)]
    ingest.main(["--tables", root, "--pairs", str(jsonl(folder / "pairs.jsonl", *rows)), "--source", "raters"])
    chains = [
        {"query": f"query {n}", "product_id": f"p{n}", "label": 1 + n % 4, "chain": f"Seen. So {NAMES[1 + n % 4]}."}
        for n in range(12)
    ]
    write_chains.main(["--tables", root, "--chains", str(jsonl(folder / "chains.jsonl", *chains))])


def models(spark: SparkSession, root: str) -> list[dict[str, Any]]:
    return [row.asDict() for row in delta.read(spark, root, "models").orderBy("created_at").collect()]


def test_sft_sees_train_pairs_alone_and_registers_an_adapter_that_rescore_takes(
    spark: SparkSession, root: str, base: str, tmp_path: Path
) -> None:
    taught(root, tmp_path)
    out = tmp_path / "sft"
    flags = ["--tables", root, "--model", base, "--out", str(out), "--epochs", "1", "--rank", "4", "--accumulate", "1"]
    assert train_sft.main(flags) == 0
    pairs = {r["pair_id"]: r["query"] for r in delta.read(spark, root, "pairs").collect()}
    import pyarrow.parquet as pq

    seen = {pairs[i] for i in pq.read_table(out / "data.parquet")["pair_id"].to_pylist()}
    assert seen == {f"query {n}" for n in range(8)}
    (row,) = models(spark, root)
    folder, _ = rescore.model_folder(str(out)) or ("", "")
    made = inspect(folder)
    assert (row["model_id"], row["stage"], row["parent_id"]) == (made.model_id, "sft", inspect(base).model_id)
    assert row["trained_on"] == ["raters"]
    assert row["data_hash"] == json.loads((out / adapter.RECIPE).read_text())["data_hash"]
    assert rescore.registered_folder(spark, root, row["model_id"])[0] == folder
    assert (out / "log.html").stat().st_size > 10_000
    assert json.loads((out / adapter.RECIPE).read_text())["merged_hash"] == made.weights_hash
    assert sum(file.stat().st_size for file in out.glob("adapter*")) < 20 << 20

    # The same command once more finds all done and makes the same model.
    assert train_sft.main(flags) == 0
    assert [row["model_id"] for row in models(spark, root)] == [made.model_id]

    # The stages after it go on with the adapter, and say what is missing.
    onward = ["--tables", root, "--model", row["model_id"]]
    with pytest.raises(ValueError, match="has not answered any train pair yet; ask it: sample"):
        train_dpo.main([*onward, "--out", str(tmp_path / "dpo")])
    grpo = ["--steps", "2", "--groups", "2", "--group", "3", "--max-tokens", "8", "--refresh", "1"]
    assert train_grpo.main([*onward, "--out", str(tmp_path / "grpo"), *grpo]) == 0
    last = models(spark, root)[-1]
    assert (last["stage"], last["parent_id"], last["trained_on"]) == ("grpo", row["model_id"], ["raters"])
    assert last["prompt_id"] == row["prompt_id"]


@pytest.mark.slow
def test_a_query_that_is_held_out_anywhere_stops_the_stage_before_it_begins(
    spark: SparkSession, root: str, base: str, tmp_path: Path
) -> None:
    taught(root, tmp_path)
    again = pair(70, label=4, split="test") | {"query": "QUERY  3", "locale": "de"}
    ingest.main(["--tables", root, "--pairs", str(jsonl(tmp_path / "more.jsonl", again))])
    with pytest.raises(ValueError, match="also in dev or test, such as 'query 3'"):
        train_sft.main(["--tables", root, "--model", base, "--out", str(tmp_path / "sft")])
    assert not (tmp_path / "sft").exists()


def test_without_chains_it_says_how_to_bring_them(spark: SparkSession, root: str, base: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="write_chains --tables"):
        train_sft.main(["--tables", root, "--model", base, "--out", str(tmp_path / "sft")])
