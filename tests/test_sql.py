"""The sql job and the dispatcher, as an analyst meets them."""

from __future__ import annotations

import io
import json
from datetime import UTC, datetime

import pytest
from pyspark.errors import SparkRuntimeException as SparkException
from pyspark.sql import SparkSession

from jobs import main as dispatcher
from jobs import maintain, sql
from partitioner.waves import TooManyRefused
from schemas import delta, runs
from tests.pairs import PRODUCTS, put


def test_a_statement_prints_its_rows(spark: SparkSession, root: str, capsys: pytest.CaptureFixture[str]) -> None:
    put(spark, root, PRODUCTS)
    assert (
        sql.main(["--tables", root, "SELECT title, count(*) AS pairs FROM pairs GROUP BY title ORDER BY title;"]) == 0
    )
    assert "|        Blue towel|    4|" in capsys.readouterr().out


def test_wrong_sql_is_one_line_and_exit_code_2(root: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert sql.main(["--tables", root, "SELECT nothing FROM pairs"]) == 2
    said = capsys.readouterr().err
    assert "nothing" in said
    assert len(said.strip().splitlines()) == 1


def test_without_a_statement_it_reads_them_one_a_line(
    root: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("SELEC 1\nSELECT 40 + 2 AS answer\n\n"))
    assert sql.main(["--tables", root]) == 0
    said = capsys.readouterr()
    assert "|    42|" in said.out
    assert "label_probs" in said.out
    assert "SELEC" in said.err


def test_a_folder_without_tables_is_an_error_that_names_the_next_command(
    spark: SparkSession, tmp_path: object, capsys: pytest.CaptureFixture[str]
) -> None:
    assert dispatcher.main(["sql", "--tables", str(tmp_path), "SELECT 1"]) == 2
    assert "ingest --tables" in capsys.readouterr().err


def test_an_unknown_job_lists_the_jobs(capsys: pytest.CaptureFixture[str]) -> None:
    assert dispatcher.main(["rescrore"]) == 2
    said = capsys.readouterr().err
    assert "there is no job 'rescrore'" in said
    assert "rescore" in said
    assert "ingest" in said


def test_an_unknown_flag_stops_the_job_before_any_work(capsys: pytest.CaptureFixture[str]) -> None:
    assert dispatcher.main(["sql", "--tabels", "x"]) == 2
    assert "--tables" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (ValueError("no such flag"), None, 2),
        (ValueError("the folder of the next model is gone"), "done", 1),
        (ValueError("of a batch"), "failed", 1),
        (RuntimeError("broken"), "failed", 1),
        (TooManyRefused("1,001 pairs"), "failed", 3),
        (delta.GaveUp("tried ten times"), "failed", 4),
        (OSError(28, "No space left on device"), "failed", 1),
        (SparkException("Job aborted due to stage failure"), "failed", 4),
    ],
    ids=str,
)
def test_how_a_job_failed_stands_in_its_exit_code_and_its_last_line(
    error: Exception, status: str | None, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = runs.Run("r1", "maintain", status, datetime(2026, 1, 1, tzinfo=UTC), "why") if status else None

    def fails(_: list[str]) -> int:
        runs.last = run
        raise error

    monkeypatch.setattr(maintain, "main", fails)
    monkeypatch.setattr(runs, "last", None)
    assert dispatcher.main(["maintain"]) == code
    said = capsys.readouterr()
    last = json.loads(said.out.splitlines()[-1])
    assert (last["job"], last["exit"], last.get("run_id")) == ("maintain", code, run and "r1")
    assert str(error) in last["error"]
    assert str(error) in said.err
