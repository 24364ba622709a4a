"""The tables on real Delta: they refuse what breaks the contract, and say what does not fit it."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from datetime import UTC, datetime
from functools import reduce
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
from delta.exceptions import ConcurrentAppendException
from delta.tables import DeltaTable
from py4j.protocol import Py4JJavaError
from pyspark.errors import PySparkException
from pyspark.sql import DataFrame, Row, SparkSession
from pyspark.sql import functions as F

from schemas import delta, runs, tables
from schemas.labels import P_COLUMNS
from tests import invariants
from tests.conftest import REPO

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def judged(spark: SparkSession, **changed: Any) -> Any:
    """One valid row of label_probs with some columns changed."""
    row: dict[str, Any] = {
        "pair_id": "0" * 32, "model_id": "m", "prompt_id": "p", "query": "q", "product_id": "1", "locale": "",
        "p_excellent": 0.7, "p_related": 0.1, "p_mismatch": 0.1, "p_irrelevant": 0.1, "p_outside": 0.0,
        "outcome": "scored", "content_hash": "c", "pairs_version": 1, "wave_id": "w", "prompt_tokens": 9,
        "tokens_cut": 0, "run_id": "r", "scored_at": NOW,
    }  # fmt: skip
    return delta.rows(spark, "label_probs", [list((row | changed).values())])


@pytest.mark.parametrize(
    "broken",
    [
        pytest.param({"p_excellent": 1.7}, id="above one", marks=pytest.mark.slow),
        pytest.param({"p_excellent": 0.6}, id="sum not one"),
        pytest.param({"p_excellent": None}, id="one missing", marks=pytest.mark.slow),
        pytest.param({"p_excellent": float("nan")}, id="not a number", marks=pytest.mark.slow),
        pytest.param({"p_outside": None}, id="no outside mass", marks=pytest.mark.slow),
        pytest.param({"outcome": "too_long"}, id="refused with p"),
        pytest.param({"outcome": "guessed"} | dict.fromkeys(P_COLUMNS), id="unknown"),
        pytest.param({"pair_id": None}, id="no key"),
    ],
)
def test_no_writer_can_break_the_rules_of_label_probs(spark: SparkSession, root: str, broken: dict[str, Any]) -> None:
    with pytest.raises((PySparkException, Py4JJavaError), match=r"CHECK constraint|NOT NULL constraint"):
        delta.upsert(spark, root, "label_probs", judged(spark, **broken))
    assert delta.read(spark, root, "label_probs").isEmpty()


def test_a_row_goes_in_once_and_an_unchanged_row_is_not_rewritten(spark: SparkSession, root: str) -> None:
    newer = "new.content_hash <> old.content_hash"
    assert delta.upsert(spark, root, "label_probs", judged(spark), newer)["inserted"] == 1
    again = delta.upsert(spark, root, "label_probs", judged(spark, p_excellent=0.7, tokens_cut=5), newer)
    assert again == {"inserted": 0, "updated": 0, "deleted": 0}
    assert delta.upsert(spark, root, "label_probs", judged(spark, content_hash="d"), newer)["updated"] == 1
    assert delta.read(spark, root, "label_probs").count() == 1


def test_every_column_says_what_it_is(spark: SparkSession, root: str) -> None:
    assert set(delta.register(spark, root)) == set(tables.TABLES)
    for name, table in tables.TABLES.items():
        described = {row["col_name"]: row["comment"] for row in spark.sql(f"DESCRIBE {name}").collect()}
        assert described == {c.name: c.comment for c in table.columns}


def test_a_table_that_does_not_fit_is_an_error_that_says_what_differs(spark: SparkSession, root: str) -> None:
    where = f"delta.`{root}/gold`"
    spark.sql(f"ALTER TABLE {where} DROP CONSTRAINT label_range")
    spark.sql(f"ALTER TABLE {where} ADD COLUMN mood STRING")
    spark.sql(f"ALTER TABLE {where} ALTER COLUMN label DROP NOT NULL")
    with pytest.raises(ValueError, match="does not fit") as refused:
        delta.prepare(spark, root)
    said = str(refused.value)
    assert "column mood is not in the contract" in said
    assert "column label may be null" in said
    assert "ADD CONSTRAINT label_range CHECK (label BETWEEN 1 AND 4)" in said


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(tables.TABLES))
def test_the_sentences_that_mend_a_constraint_mend_it(spark: SparkSession, root: str, name: str) -> None:
    """Whether it is missing or another one has its name: Delta writes what is added with other blanks."""
    table, where = tables.TABLES[name], f"delta.`{root}/{name}`"
    for number, check in enumerate(table.checks):
        spark.sql(f"ALTER TABLE {where} DROP CONSTRAINT {check}")
        if number % 2:
            spark.sql(f"ALTER TABLE {where} ADD CONSTRAINT {check} CHECK (1 = 1)")
    found = delta.misfits(spark, root, table)
    assert len(found) == len(table.checks)
    anew = [sentence for sentence in found if "->" in sentence]  # Delta's ALTER TABLE cannot add these
    assert all("(move the folder of" in sentence for sentence in anew)
    for sentence in set(found) - set(anew):
        _, _, mend = sentence.partition(" (ALTER")
        for statement in f"ALTER{mend[:-1]}".split(", then "):
            spark.sql(statement)
    assert delta.misfits(spark, root, table) == anew


def test_the_sentence_that_mends_a_missing_column_mends_it(spark: SparkSession, tmp_path: Path) -> None:
    root = str(tmp_path / "older")
    columns = tuple(c for c in tables.MODELS.columns if c.name not in ("metrics", "created_at"))
    older = tables.Table("models", "older", ("model_id",), columns)
    spark.sql(delta.ddl(root, older))
    (first, second) = delta.misfits(spark, root, tables.MODELS)
    spark.sql(first[first.index("(") + 1 : -1])
    assert delta.misfits(spark, root, tables.MODELS) == [second]


def test_the_hashes_are_what_the_docs_say_for_any_language(spark: SparkSession) -> None:
    def netstring(text: str | None) -> str:
        return "-" if text is None else f"{len(text.encode())}:{text}"

    def sha(*fields: str | None) -> str:
        return hashlib.sha256("".join(map(netstring, fields)).encode()).hexdigest()

    row = Row(locale="de", query="Kessel für 5 €", product_id="k1", title="Wasserkessel", brand=None,
              description="", attributes={"farbe": "blau", "breite": "9"}, category="Küche")  # fmt: skip
    schema = "locale STRING, query STRING, product_id STRING, title STRING, brand STRING, description STRING, "
    rows = spark.createDataFrame([row], schema + "attributes MAP<STRING,STRING>, category STRING")
    product = tables.product_hash(*(F.col(c) for c in ("title", "brand", "description", "attributes", "category")))
    found = rows.select(
        tables.pair_id(F.col("locale"), F.col("query"), F.col("product_id")).alias("pair_id"),
        tables.content_hash(product, F.col("locale"), F.col("query")).alias("content_hash"),
    ).collect()[0]
    assert found["pair_id"] == sha("de", "Kessel für 5 €", "k1")[:32]
    attributes = "".join(netstring(x) for x in ("breite", "9", "farbe", "blau"))
    of_product = sha("Wasserkessel", None, "", attributes, "Küche")
    assert found["content_hash"] == sha("de", "Kessel für 5 €", of_product)


def test_a_lost_race_is_tried_again_and_at_last_given_up_with_a_sentence(
    spark: SparkSession, root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delta.time, "sleep", lambda _: None)  # type: ignore[attr-defined]
    tries = 0

    def loses_twice() -> str:
        nonlocal tries
        tries += 1
        if tries < 3:
            raise ConcurrentAppendException("another writer was faster")
        return "committed"

    assert delta._committed(spark, root, "runs", loses_twice) == "committed"

    def always_loses() -> None:
        nonlocal tries
        tries += 1
        raise ConcurrentAppendException("another writer was faster")

    tries = 0
    with pytest.raises(RuntimeError, match="gave up after 10 tries"):
        delta._committed(spark, root, "runs", always_loses)
    assert tries == 10


@pytest.mark.slow
def test_of_two_that_write_the_same_rows_at_once_the_slower_tries_again_and_no_row_is_there_twice(
    spark: SparkSession, root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the lock of local folders, as on a storage where Delta itself sees other writers."""
    monkeypatch.setattr(delta, "alone", lambda *_: nullcontext())
    lost: list[float] = []
    together = Barrier(2)

    def waited(*_: float) -> float:
        lost.append(0.1)
        return 0.1

    monkeypatch.setattr(delta.random, "uniform", waited)  # type: ignore[attr-defined]

    def write(writer: int) -> None:
        for turn in range(3):
            pairs = [judged(spark, pair_id=f"{pair:032}", wave_id=f"{writer}-{turn}") for pair in range(6)]
            rows = reduce(DataFrame.unionAll, pairs)
            together.wait()
            delta.upsert(spark, root, "label_probs", rows)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(write, range(2)))
    assert lost
    rows = invariants.table(root, "label_probs")
    assert len(rows) == 6
    assert not invariants.one_row_a_key(rows)
    assert len({row["wave_id"] for row in rows}) == 1  # of the last one, whole


def test_what_a_worker_said_is_the_line_that_is_kept_of_its_error(spark: SparkSession) -> None:
    def fails(batches: Iterator[Any]) -> Iterator[Any]:
        yield from batches
        try:
            raise KeyError("weights")
        except KeyError as error:
            raise RuntimeError("model folder /m changed: model.safetensors") from error

    with pytest.raises(PySparkException) as raised:
        spark.range(1).mapInArrow(fails, "id BIGINT").collect()
    assert runs.in_a_line(raised.value) == "RuntimeError: model folder /m changed: model.safetensors"
    assert runs.in_a_line(ValueError("one\ntwo")) == "one"
    told = "Job aborted.\n\tat Some.java\nCaused by: a.B: not written\n\tat Other.java\nCaused by: c.IOException: full"
    assert runs.in_a_line(RuntimeError(told)) == "Job aborted. (c.IOException: full)"


@pytest.mark.slow
def test_small_files_are_joined_once_in_so_many_versions_and_where_that_fails_the_commit_stands(
    spark: SparkSession, root: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(delta, "JOINED_EVERY", 4)
    for pair in range(5):
        delta.upsert(spark, root, "label_probs", judged(spark, pair_id=f"{pair:032}"))
    log = DeltaTable.forPath(spark, f"{root}/label_probs").history().orderBy("version").select("operation").collect()
    assert [row["operation"] for row in log] == ["CREATE TABLE", *["MERGE"] * 4, "OPTIMIZE", "MERGE"]
    assert len(delta.read(spark, root, "label_probs").collect()) == 5
    for file in Path(root, "label_probs").glob("*.parquet"):
        file.unlink()
    delta.append(spark, root, "label_probs", judged(spark, pair_id="f" * 32))
    delta.append(spark, root, "label_probs", judged(spark, pair_id="e" * 32))
    assert delta.version(spark, root, "label_probs") == 8
    assert "delta: the small files of label_probs were not joined" in capsys.readouterr().out


def test_a_run_is_one_row_from_start_to_end(spark: SparkSession, root: str) -> None:
    run = runs.start(spark, root, "ingest")
    assert [r["status"] for r in delta.read(spark, root, "runs").collect()] == ["running"]
    runs.finish(spark, root, run, "failed", "disk full")
    assert [(r["status"], r["message"]) for r in delta.read(spark, root, "runs").collect()] == [("failed", "disk full")]


def test_a_folder_without_pairs_is_not_filled_with_tables_by_a_job_that_reads_them(
    spark: SparkSession, tmp_path: Path
) -> None:
    with pytest.raises(
        ValueError, match=r"there is no table 'pairs' under .*/mistyped'; make it with: ingest --tables"
    ):
        delta.prepare(spark, str(tmp_path / "mistyped"))
    assert not list(tmp_path.glob("mistyped/*"))


@pytest.mark.slow
def test_what_keeps_rows_from_coming_twice_cannot_be_turned_off() -> None:
    script = (
        "from schemas import delta; s = delta.session('x'); c = s.sparkContext.getConf(); "
        "print(c.get('spark.speculation'), s.conf.get('spark.databricks.delta.commit.idempotencyCheck.enabled'))"
    )
    off = {"spark.speculation": "true", "spark.databricks.delta.commit.idempotencyCheck.enabled": "false"}
    assert off.keys() == delta.ALWAYS.keys()
    told_so = " ".join(f"--conf {key}={value}" for key, value in off.items())
    given = f"--master local[1] {told_so} --packages {delta.PACKAGE} pyspark-shell"
    environment = {**os.environ, "PYTHONPATH": str(REPO), "PYSPARK_SUBMIT_ARGS": given}
    told = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert told.stdout.split() == ["false", "true"]


def test_names_outside_the_contract_reach_no_path(spark: SparkSession, root: str) -> None:
    with pytest.raises(KeyError):
        delta.read(spark, root, "../../etc")


def test_a_path_with_a_scheme_is_no_folder_of_this_machine() -> None:
    for where in ("hdfs:/relevance", "s3a://bucket/t", "file:/t", "file:///t"):
        assert delta.root(where) == where
    assert delta.root("a:b").endswith("/a:b")
