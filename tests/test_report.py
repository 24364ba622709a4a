"""The page in a real browser: what it shows is what the tables hold, and no text of a product can become its code."""

from __future__ import annotations

import html
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from jobs.fit_thresholds import Wanted, fit_thresholds
from jobs.promote_thresholds import Gates, promote
from jobs.report import main, report
from partitioner.thresholds import Objective
from schemas import delta
from schemas.labels import NAMES
from tests import judged
from tests.judged import fill, gold, pair, scored

HOSTILE = "</script><script>document.title='taken'</script><img src=x onerror=\"document.title='taken'\">"


class Page(HTMLParser):
    """Tables by section, text of drawn charts by section, and the title."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.section, self.title, self.into = "", "", ""
        self.tables: dict[str, list[list[str]]] = {}
        self.charts: dict[str, list[str]] = {}
        self.drawn: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        if tag == "section":
            self.section = found.get("id") or ""
        if tag == "div" and found.get("data-drawn") == "yes":
            self.drawn.append((found.get("id") or "").removeprefix("chart-"))
        if tag == "tr":
            self.tables.setdefault(self.section, []).append([])
        if tag == "td":
            self.tables[self.section][-1].append("")
        if label := found.get("aria-label"):
            self.charts.setdefault(self.section, []).append(label)
        self.into = tag

    def handle_endtag(self, tag: str) -> None:
        self.into = ""

    def handle_data(self, data: str) -> None:
        if self.into == "td":
            self.tables[self.section][-1][-1] += data
        if self.into == "title" and not self.section:
            self.title += data


def in_browser(file: Path, profile: Path) -> str:
    """The page's tree after its scripts ran."""
    browser = shutil.which("chromium")
    if browser is None:
        pytest.skip("chromium is not installed (Debian: apt-get install chromium)")
    words = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", f"--user-data-dir={profile}"]
    words += ["--virtual-time-budget=20000", "--timeout=60000", "--dump-dom", f"file://{file}"]
    return subprocess.run([browser, *words], capture_output=True, text=True, timeout=180, check=True).stdout


@pytest.fixture(scope="module")
def written(spark: SparkSession, empty_tables: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """Tables with two versions, the second in force, and their page."""
    root = str(shutil.copytree(empty_tables, tmp_path_factory.mktemp("report") / "tables"))
    judged.tables(spark, root)
    fill(spark, root, "pairs", [pair(900, HOSTILE, title=HOSTILE, category=HOSTILE)])
    fill(spark, root, "label_probs", [scored(900, HOSTILE, [0.999, 0.001, 0, 0])])
    fill(spark, root, "gold", [gold(900, 1)])
    # Segments with names of a megabyte, which would come up in a table and a chart.
    fill(spark, root, "pairs", [pair(i, "long", category=f"{i}{'x' * 2**20}") for i in (901, 902)])
    fill(spark, root, "label_probs", [scored(i, "long", [0.4, 0.3, 0.2, 0.1]) for i in (901, 902)])
    fill(spark, root, "pairs", [pair(903, "not scored")])
    for rule, by in (("one", None), ("boundary", "category")):
        wanted = Wanted(rule, by, Objective("recall", label=4), (), min_gold=60, replicates=30, refits=5)
        wanted = replace(wanted, temperature=rule == "boundary")
        assert promote(spark, root, fit_thresholds(spark, root, wanted), Gates(shift=1.0, missing=0.1), "a test") == 0
    out = Path(root).parent / "report.html"
    assert main(["--tables", root, "--out", str(out)]) == 0
    return root, out


@pytest.mark.slow
def test_the_browser_shows_what_the_tables_hold(spark: SparkSession, written: tuple[str, Path]) -> None:
    root, out = written
    page = Page(in_browser(out, out.parent / "profile"))
    assert page.title == "Thresholds, version 2"
    names = {"tiers", "compared-out_of_fold", "compared-test", "confusion", "curve", "calibration", "shift", "shift-by"}
    names |= {"by-words", "by-segment"}
    assert set(page.drawn) == names
    assert set(page.tables) == {"", *names, "disagreements"}

    from partitioner import tiers

    tiers.register(spark, root)
    counts = {NAMES[r[0]]: r[1] for r in spark.sql("SELECT tier, count(*) FROM labels GROUP BY tier").collect()}
    shown = {row[0]: int(row[1]) for row in page.tables["tiers"][1:]}
    assert {k: v for k, v in shown.items() if v} == counts | {"no tier": 1}
    for name, count in counts.items():
        assert any(name in label and re.search(rf"pairs: {count}\b", label) for label in page.charts["tiers"])

    cut = delta.read(spark, root, "thresholds").where("status = 'active'").collect()
    figures = delta.read(spark, root, "measures").where(F.col("run_id") == cut[0]["run_id"])
    rows = figures.where("split = 'out_of_fold' AND segment = '' AND measure IN ('macro_f1', 'accuracy', 'kappa')")
    expected = {(r["cuts"], r["measure"]): (r["value"], r["low"], r["high"]) for r in rows.collect()}
    told = {(r[0], r[1]): tuple(map(float, r[2:])) for r in page.tables["compared-out_of_fold"][1:]}
    assert told == expected
    assert {cuts for cuts, _ in told} == {"boundary_by_category", "boundary", "one", "score", "argmax"}
    assert len([label for label in page.charts["compared-out_of_fold"] if "value" in label]) >= len(expected)

    shown_cuts = {row[0]: tuple(map(float, row[1:4])) for row in page.tables["curve"][1:]}
    assert shown_cuts == {
        f"τ{r['boundary']}": (r["tau"], r["optimal_low"], r["optimal_high"]) for r in cut if not r["segment"]
    }
    assert any("recall" in label for label in page.charts["curve"])  # what was asked for is drawn

    own = figures.where("split = 'out_of_fold' AND segment = 'Kettles' AND measure = 'macro_f1'").collect()
    assert [row[:3] for row in page.tables["by-segment"][1:]] == [
        [r["segment"], str(r["n"]), str(round(r["value"], 4))] for r in own
    ]
    cells = figures.where("split = 'out_of_fold' AND cuts = 'boundary_by_category' AND measure LIKE 'confusion%'")
    cells = cells.where("segment = ''")
    total = cells.agg(F.sum("value")).collect()[0][0]
    assert sum(float(row[2]) for row in page.tables["confusion"][1:]) == pytest.approx(total, abs=0.02)

    changed = page.tables["shift"][1:]
    assert sum(int(row[2]) for row in changed) == delta.read(spark, root, "pairs").count()
    assert page.tables["disagreements"][1][:4] == [HOSTILE, HOSTILE, "Irrelevant", "Excellent"]


@pytest.mark.slow
def test_the_page_is_one_small_file_that_needs_no_network(written: tuple[str, Path]) -> None:
    text = written[1].read_text()
    assert len(text.encode()) < 5 * 2**20
    assert "default-src 'none'" in text
    without_scripts = re.sub(r"<script>.*?</script>", "", text, flags=re.S)
    for hostile in (HOSTILE, HOSTILE[:59]):  # whole as a text, cut as the name of a segment
        without_scripts = without_scripts.replace(html.escape(hostile), "")
    assert not re.search(r"<(script|link|img|iframe)|src=|href=|url\(", without_scripts)
    assert HOSTILE not in text


def test_without_a_version_the_error_names_the_way_out(spark: SparkSession, root: str) -> None:
    with pytest.raises(ValueError, match=r"no version None of thresholds \(there are: \[\]\); fit one: fit_thresholds"):
        report(spark, root)
