"""The main file: which job a line means, several in one line, and how the end of each is told."""

from __future__ import annotations

import argparse
import json
import signal
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from pyspark.errors import SparkRuntimeException as SparkException
from pyspark.sql import SparkSession

import jobs
from jobs import main as dispatcher
from jobs import maintain, publish, rescore, sql
from partitioner import waves
from partitioner.waves import TooManyRefused
from schemas import delta, runs


def test_an_unknown_job_lists_the_jobs(capsys: pytest.CaptureFixture[str]) -> None:
    assert dispatcher.main(["rescrore"]) == 2
    said = capsys.readouterr().err
    assert "there is no job 'rescrore'" in said
    assert "rescore" in said
    assert "ingest" in said


def test_an_unknown_flag_stops_the_job_before_any_work(capsys: pytest.CaptureFixture[str]) -> None:
    assert dispatcher.main(["sql", "--tabels", "x"]) == 2
    assert "--tables" in capsys.readouterr().err


@pytest.mark.parametrize("job", ["sample", "write_chains", "fit_thresholds", "train_sft"])
def test_a_seed_that_draws_nothing_stops_the_job_before_any_work(job: str, capsys: pytest.CaptureFixture[str]) -> None:
    for seed in ("-1", "x", str(2**31)):
        assert dispatcher.main([job, "--seed", seed]) == 2
        assert f"argument --seed: '{seed}'" in capsys.readouterr().err


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
        (KeyboardInterrupt(), "failed", 130),
        (SparkException("Job aborted due to stage failure"), "failed", 4),
    ],
    ids=str,
)
def test_how_a_job_failed_stands_in_its_exit_code_and_its_last_line(
    error: BaseException,
    status: str | None,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
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


def test_jobs_with_then_between_them_run_in_one_spark_and_each_tells_its_end(
    spark: SparkSession, root: str, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["maintain", "--tables", root, "--table", "pairs", "then", "sql", "--tables", root, "SELECT 41 + 1 AS sum"]
    assert dispatcher.main(line) == 0
    read = capsys.readouterr()
    said, took = read.out.splitlines(), read.err.splitlines()
    assert {"job": "maintain", "exit": 0}.items() <= json.loads(next(s for s in said if s.startswith("{"))).items()
    assert "| 42|" in said
    heads = [place for place, text in enumerate(said) if text.startswith("== ")]
    assert [said[place].split()[1] for place in heads] == ["maintain", "sql"]
    assert [text.split()[1:] for text in took[took.index("Each job took:") + 1 :]] == [["s", "maintain"], ["s", "sql"]]
    assert not spark.sparkContext._jsc.sc().isStopped()


@pytest.mark.parametrize(
    ("second", "sentence"),
    [
        (["publish", "--tables", "t", "--formt", "qrels"], "publish: unrecognized arguments: --formt qrels"),
        (["publsh", "--tables", "t"], "there is no job 'publsh'"),
        ([], "a job is missing"),
        (
            ["rescore", "--tables", "t", "--model", "/no/such/model"],
            "rescore: there is no model folder '/no/such/model'",
        ),
        (
            ["rescore", "--tables", "t", "--also", "/no/such/model"],
            "rescore: there is no model folder '/no/such/model'",
        ),
        (
            ["train_sft", "--tables", "t", "--model", "/no/such/model", "--out", "o"],
            "there is no model folder '/no/such/model'",
        ),
    ],
)
def test_a_wrong_word_of_a_later_job_stops_all_before_the_first_begins(
    second: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert dispatcher.main(["maintain", "--tables", str(tmp_path / "tables"), "then", *second]) == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "tables").exists()


def test_a_model_that_an_earlier_job_makes_need_not_be_there_yet(tmp_path: Path) -> None:
    args = argparse.Namespace(model=str(tmp_path / "sft"))
    jobs.look_ahead(args, made=[str(tmp_path / "sft")])
    jobs.look_ahead(argparse.Namespace(model=f"{tmp_path}/../{tmp_path.name}/sft"), made=[str(tmp_path / "sft")])
    with pytest.raises(ValueError, match="sft"):
        jobs.look_ahead(args)


def test_a_candidate_that_is_not_there_is_told_before_the_tables_are_touched(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert dispatcher.main(["rescore", "--tables", str(tmp_path / "tables"), "--also", "/no/such/model"]) == 2
    assert "there is no model folder '/no/such/model'" in capsys.readouterr().err
    assert not (tmp_path / "tables").exists()


def ends_with(code: int, called: list[str], name: str) -> Callable[[list[str]], int]:
    def job(_: list[str]) -> int:
        called.append(f"{name} {signal.getsignal(signal.SIGTERM) == signal.SIG_DFL}")
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as rescore takes it for itself
        return code

    return job


def test_a_job_begins_only_where_the_one_before_ended_with_0_and_its_signals_are_its_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    called: list[str] = []
    for module, code in ((maintain, 0), (publish, 5), (sql, 0)):
        monkeypatch.setattr(module, "main", ends_with(code, called, module.__name__))
    before = signal.getsignal(signal.SIGTERM)
    try:
        line = ["maintain", "--tables", "t", "then", "publish", "--tables", "t", "then", "sql", "--tables", "t"]
        assert dispatcher.main(line) == 5
    finally:
        signal.signal(signal.SIGTERM, before)
    assert called == ["jobs.maintain True", "jobs.publish True"]
    read = capsys.readouterr()
    assert read.err.splitlines()[-1].strip() == "sql: not begun"
    assert json.loads(read.out.splitlines()[-1]) == {"job": "publish", "exit": 5}


def test_no_job_begins_behind_one_that_was_told_to_end_and_a_deadline_is_of_the_day_they_began(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    told = datetime(2026, 1, 1, 6, 0)

    def long_night(_: list[str]) -> int:
        assert jobs.began is not None
        assert rescore.next_time(jobs.began.strftime("%H:%M")) > jobs.began
        monkeypatch.setattr(jobs, "began", told - timedelta(minutes=1))  # more than a minute ago, that is
        assert rescore.next_time("06:00") == told
        waves.stop_asked.set()
        return 0

    monkeypatch.setattr(maintain, "main", long_night)
    try:
        assert dispatcher.main(["maintain", "--tables", "t", "then", "sql", "--tables", "t", "SELECT 1"]) == 5
    finally:
        waves.stop_asked.clear()
    read = capsys.readouterr()
    assert "sql: not begun" in read.err
    last = {"job": "sql", "exit": 5, "error": "not begun: asked to end (SIGTERM)"}
    assert json.loads(read.out.splitlines()[-1]) == last


@pytest.mark.parametrize("words", [["--model", ""], ["--model", "m", "--prompt", " "]])
def test_a_name_that_is_empty_as_a_variable_that_is_not_set_is_refused(words: list[str]) -> None:
    with pytest.raises(ValueError, match="it is empty; name one"):
        rescore.flags().parse_args(["--tables", "t", *words])


def test_a_task_that_fails_four_times_of_what_its_worker_says_is_given_up(
    spark: SparkSession, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(batches: Iterator[Any]) -> Iterator[Any]:
        yield from batches
        raise ValueError("model folder /m changed")

    def job(_: list[str]) -> int:
        return int(spark.range(1).mapInArrow(fails, "id BIGINT").count())

    monkeypatch.setattr(maintain, "main", job)
    assert dispatcher.main(["maintain", "--tables", "t"]) == 4
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["error"] == "ValueError: model folder /m changed"
