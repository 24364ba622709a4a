"""`spark-submit.sh` splits its words rightly and starts a job anywhere; a plain spark-submit runs the same job."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from schemas.delta import CONF, LOCAL_CONF, PACKAGE
from tests.commands import a_file_of_pairs, table
from tests.conftest import QUICK
from tests.models import tiny_model

REPO = Path(__file__).resolve().parent.parent
ROOMS = ("schemas", "udfs", "partitioner", "jobs", "demo")

# A job that needs no Spark: says what it was given.
ECHO = '''"""Says what it was given."""
import json, os, shlex, sys

def main(argv):
    print("to stderr", file=sys.stderr)
    given = shlex.split(os.environ["PYSPARK_SUBMIT_ARGS"])
    print(json.dumps({"argv": argv, "spark": given, "stdin": sys.stdin.read(), "python": os.environ["PYSPARK_PYTHON"]}))
    return int(argv[0]) if argv else 0
'''
# A job that asks Spark and a worker.
LOOK = '''"""Says where it ran."""
import json
from schemas import delta

def where(batches):
    import pyarrow, udfs
    for batch in batches:
        yield pyarrow.RecordBatch.from_pydict({"file": [udfs.__file__]})

def main(argv):
    spark = delta.session("look")
    worker = spark.range(1).mapInArrow(where, "file string").collect()[0].file
    spark.range(3).write.format("delta").save(argv[0])
    rows = spark.read.format("delta").load(argv[0]).count()
    conf = dict(spark.sparkContext.getConf().getAll())
    print(json.dumps({"worker": worker, "master": spark.sparkContext.master, "rows": rows, "conf": conf}))
    return 3
'''


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the project in a folder with spaces, without .venv, with two jobs more."""
    copy = tmp_path / "a check out"
    for room in ROOMS:
        (copy / room).mkdir(parents=True)
        for file in (REPO / room).glob("*.py"):
            shutil.copy(file, copy / room)
    for name in ("spark-submit.sh", "log4j2.properties", "demo/prompt.json"):
        shutil.copy(REPO / name, copy / name)
    (copy / "jobs" / "echo.py").write_text(ECHO)
    (copy / "jobs" / "look.py").write_text(LOOK)
    return copy


def run(checkout: Path, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Runs the script from another folder, with the python3 of these tests on PATH and the real cache of jars."""
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
    cache = os.environ.get("TAOSR1_CACHE", str(REPO / ".cache"))
    named = {"PATH": path, "TAOSR1_CACHE": cache, **env}
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYSPARK_PYTHON", "SPARK_HOME")}
    return subprocess.run(
        [checkout / "spark-submit.sh", *words],
        cwd="/",
        env={**clean, **named},
        input="typed",
        capture_output=True,
        text=True,
        timeout=180,
    )


def echoed(checkout: Path, *words: str) -> dict[str, Any]:
    """What the echo job was given."""
    done = run(checkout, *words)
    assert done.returncode == 0, done.stderr
    said: dict[str, Any] = json.loads(done.stdout.splitlines()[0])
    return said


def after(words: list[str], option: str) -> list[str]:
    """The values that follow each `option`."""
    return [words[i + 1] for i, word in enumerate(words) if word == option]


def test_words_before_the_job_go_to_spark_and_words_after_it_to_the_job(checkout: Path) -> None:
    # `echo` is a value of an option twice before it is the job.
    options = ["--name", "echo", "--verbose", "--conf", 'spark.x=it\'s $HOME "*"', "--driver-memory=2g", "--queue=echo"]
    flags = ["0", "--where", "locale = 'de' and \"x\" <> '$y'", "--conf", "", "tab\tnewline\n*", "--driver-memory=1g"]
    said = echoed(checkout, *options, "echo", *flags)
    assert said["argv"] == flags
    assert said["spark"][-1] == "pyspark-shell"
    assert after(said["spark"], "--name") == ["echo"]
    assert after(said["spark"], "--driver-memory") == ["2g"]
    assert after(said["spark"], "--queue") == ["echo"]
    assert after(said["spark"], "--conf")[-1] == 'spark.x=it\'s $HOME "*"'
    assert said["spark"].count("--verbose") == 1


def test_a_job_has_its_standard_input_and_its_errors_apart_from_its_output(checkout: Path) -> None:
    done = run(checkout, "echo")
    said, told = map(json.loads, done.stdout.splitlines())
    assert said["stdin"] == "typed"
    assert told == {"job": "echo", "exit": 0}
    assert done.stderr == "to stderr\n"


def test_without_a_master_the_job_runs_here_and_may_try_a_task_four_times(checkout: Path) -> None:
    said = echoed(checkout, "echo")
    assert after(said["spark"], "--master") == ["local[*,4]"]
    given = after(said["spark"], "--conf")
    assert {f"{k}={v}" for k, v in {**CONF, **LOCAL_CONF}.items()} <= set(given)
    assert said["python"] == str(Path(sys.executable).parent / "python3")


@pytest.mark.parametrize(
    "options",
    [
        ["--master", "spark://h:1"],
        ["--conf=spark.master=yarn"],
        *(
            pytest.param(more, marks=pytest.mark.slow)
            for more in (
                ["--master=yarn"],
                ["--conf", "spark.master=yarn"],
                ["-c", "spark.master=yarn"],
                ["--properties-file", "f"],
            )
        ),
    ],
)
def test_with_a_master_no_setting_for_one_machine_is_given(checkout: Path, options: list[str]) -> None:
    said = echoed(checkout, *options, "echo")
    assert "local[*,4]" not in said["spark"]
    given = after(said["spark"], "--conf")
    assert {f"{k}={v}" for k, v in CONF.items()} <= set(given)
    assert not {f"{k}={v}" for k, v in LOCAL_CONF.items()} & set(given)


def test_the_callers_jars_and_files_come_beside_the_projects(checkout: Path) -> None:
    said = echoed(checkout, "--jars", "mine.jar", "--py-files=a.py,b.zip", "--jars=yours.jar", "echo")
    (jars,) = after(said["spark"], "--jars")
    assert jars.endswith(",mine.jar,yours.jar")
    assert "delta-spark" in jars
    assert ",," not in jars
    (files,) = after(said["spark"], "--py-files")
    assert files.split(",")[1:] == ["a.py", "b.zip"]
    assert Path(files.split(",")[0]).is_file()


@pytest.mark.parametrize("code", [0, 2, 3])
def test_the_jobs_exit_code_is_the_scripts(checkout: Path, code: int) -> None:
    assert run(checkout, "echo", str(code)).returncode == code


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "which job?"),
        (["--name", "x"], "which job?"),
        (["nope", "echo"], "there is no job 'nope'"),
        (["main"], "there is no job 'main'"),
        (["__init__"], "there is no job '__init__'"),
        (["../jobs/echo"], "there is no job '../jobs/echo'"),
        (["--master"], "--master needs a value"),
    ],
)
def test_without_a_job_the_script_lists_them_and_ends_with_2(checkout: Path, words: list[str], sentence: str) -> None:
    done = run(checkout, *words)
    assert done.returncode == 2
    assert done.stderr.startswith(f"spark-submit.sh: {sentence}\n")
    assert "\n  echo                 Says what it was given.\n" in done.stderr
    assert "__init__.py" not in done.stderr
    assert done.stdout == ""


def test_help_before_the_job_lists_the_jobs_and_help_after_it_is_the_jobs(checkout: Path) -> None:
    done = run(checkout, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert "Says where it ran." in done.stdout
    assert echoed(checkout, "echo", "0", "--help")["argv"] == ["0", "--help"]


def test_without_pyspark_the_script_says_how_to_install_it(checkout: Path, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python3").symlink_to("/bin/false")
    done = run(checkout, "echo", PATH=f"{tmp_path / 'bin'}:/usr/bin:/bin")
    assert done.returncode == 2
    assert f"make -C '{checkout}' setup" in done.stderr


def test_the_archive_holds_the_code_alone_and_equal_code_makes_equal_bytes(checkout: Path, tmp_path: Path) -> None:
    archives = [tmp_path / "one.zip", tmp_path / "dist" / "two.zip"]
    for archive in archives:
        done = run(checkout, "--archive", str(archive))
        assert done.stdout == f"{archive}\n", done.stderr
        os.utime(checkout / "jobs" / "echo.py", (1, 1_000_000_000))
    assert archives[0].read_bytes() == archives[1].read_bytes()
    names = zipfile.ZipFile(archives[0]).namelist()
    assert {"schemas/delta.py", "jobs/main.py", "jobs/echo.py", "demo/prompt.json", "demo/model.py"} <= set(names)
    assert {name.split("/")[0] for name in names} == set(ROOMS)


@pytest.mark.slow
@pytest.mark.parametrize("master", ["local[*,4]", "local[2,4]"])
def test_a_job_runs_on_spark_with_delta_and_its_workers_have_the_code(
    checkout: Path, tmp_path: Path, master: str
) -> None:
    named = [] if master == "local[*,4]" else ["--master", master]
    done = run(checkout, *named, "--conf", "spark.sql.shuffle.partitions=3", "look", str(tmp_path / "table of three"))
    assert done.returncode == 3, done.stderr
    said = json.loads(done.stdout.splitlines()[0])
    assert said["master"] == master
    assert (said["conf"]["spark.driver.bindAddress"], said["conf"]["spark.ui.enabled"]) == ("127.0.0.1", "false")
    assert said["rows"] == 3
    assert ".zip/udfs/__init__.py" in said["worker"]
    assert said["conf"]["spark.sql.shuffle.partitions"] == "3"
    # One line is the JVM's own (its vector module) and cannot be had away.
    assert [line for line in done.stderr.splitlines() if "incubator" not in line] == []


@pytest.mark.slow
def test_a_plain_spark_submit_ingests_and_scores_from_one_file_and_one_archive_and_tells_no_secret(
    checkout: Path, tmp_path: Path
) -> None:
    archive, alone = tmp_path / "taosr1.zip", tmp_path / "alone" / "main.py"
    run(checkout, "--archive", str(archive))
    alone.parent.mkdir()
    shutil.copy(REPO / "jobs" / "main.py", alone)
    find = [sys.executable, "-m", "pyspark.find_spark_home"]
    home = subprocess.run(find, check=True, capture_output=True, text=True).stdout.strip()
    (events := tmp_path / "events").mkdir()
    conf = {
        **QUICK,
        "spark.hadoop.fs.s3a.secret.key": "planted-in-a-conf",
        "spark.hadoop.fs.azure.account.key.store": "planted-in-another",
        "spark.eventLog.enabled": "true",
        "spark.eventLog.compress": "false",
        "spark.eventLog.dir": events.as_uri(),
    }
    given = [word for key, value in conf.items() for word in ("--conf", f"{key}={value}")]
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "SPARK_HOME")}
    tables, model = tmp_path / "tables", tiny_model(tmp_path / "model")

    ingest: list[str | Path] = [
        "ingest",
        "--tables",
        tables,
        "--pairs",
        a_file_of_pairs(tmp_path, products=2, queries=2),
    ]
    command = [f"{home}/bin/spark-submit", "--master", "local[2,4]", *given, "--packages", PACKAGE]
    done = subprocess.run(
        [*command, "--py-files", archive, alone, *ingest, "then", "rescore", "--tables", tables, "--model", model],
        cwd="/",
        env={**clean, "PYSPARK_PYTHON": sys.executable, "AWS_SECRET_ACCESS_KEY": "planted-in-the-environment"},
        capture_output=True,
        text=True,
        timeout=400,
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert '"status": "done", "counts": {"seen": 4, "skipped": 0, "scored": 4, "refused": 0' in said
    told = said + "".join(str(table(tables, name)) for name in ("runs", "models", "gates", "label_probs"))
    logged = "".join(file.read_text() for file in events.rglob("events_*"))
    assert '"spark.hadoop.fs.azure.account.key.store":"*********(redacted)"' in logged
    assert "planted" not in told + logged
    assert "Steel kettle no." not in logged


@pytest.mark.slow
def test_deploy_mode_cluster_is_left_to_spark_submit_with_all_that_a_driver_without_a_checkout_needs(
    checkout: Path, tmp_path: Path
) -> None:
    (checkout / "demo" / "adapter").mkdir()
    (checkout / "demo" / "adapter" / "adapter_model.safetensors").write_text("weights")
    (cache := tmp_path / "cache").mkdir()
    (cache / "jars").symlink_to(Path(os.environ.get("TAOSR1_CACHE", REPO / ".cache")) / "jars")
    words = ["--master", "spark://127.0.0.1:1", "--deploy-mode", "cluster", "echo"]
    done = run(checkout, *words, TAOSR1_CACHE=str(cache))
    (archive,) = (cache / "archives").glob("*.zip")
    assert "demo/adapter/adapter_model.safetensors" in zipfile.ZipFile(archive).namelist()
    assert done.returncode != 0
    assert "Cluster deploy mode is currently not supported for python applications" in done.stdout + done.stderr


@pytest.mark.slow
def test_a_jar_that_cannot_be_fetched_is_told_with_the_way_out(checkout: Path, tmp_path: Path) -> None:
    nowhere = f"spark.jars.ivySettings={tmp_path / 'no-such.xml'}"
    done = run(checkout, "--conf", nowhere, "echo", TAOSR1_CACHE=str(tmp_path / "cache"))
    assert done.returncode == 1
    assert done.stderr.endswith("with --repositories URL before the job\n")
    assert "no-such.xml" in done.stderr
    # Nothing half done stays behind.
    assert [f.name for f in (tmp_path / "cache").rglob("*") if f.name not in ("jars", "archives")] == []
