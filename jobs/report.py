"""Writes one self-contained page of what the tables hold about a version of thresholds, for people.

report --tables T --out report.html [--version V]

Without --version it is the one in force, or the newest candidate. The page needs no network; it holds aggregates and
some fifty pairs, so it stays under 5 MB however large the tables are. Each chart says what it shows and what to do.
"""

from __future__ import annotations

import html
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

import jobs
from jobs.fit_thresholds import Rows, Wanted, judged, local_rows, sampled
from jobs.promote_thresholds import last_probe, segment_column, summed, tier_changes
from jobs.publish import whole
from partitioner import measures, tiers
from partitioner.thresholds import Objective
from partitioner.tiers import BOUNDARIES, Version
from schemas import delta
from schemas.labels import LABELS, NAMES, P_COLUMNS

JOB = "report"
WORST = 50  # disagreements that are shown
SEGMENTS = 30  # the largest of them
TEXT = 300  # characters of a text that are shown
NAME = 60  # and of a segment's name
CURVE = 200  # points of a curve
SHOWN = ("macro_f1", "accuracy", "kappa")
_STYLE = """body{font:15px/1.45 system-ui,sans-serif;margin:2rem auto;max-width:62rem;padding:0 1rem;color:#222}
h1{font-size:1.5rem}h2{font-size:1.15rem;margin-top:2.2rem}p.do{color:#555}table{border-collapse:collapse;font-size:13px}
td,th{border:1px solid #ddd;padding:.25rem .5rem;text-align:left;vertical-align:top}td.n{text-align:right}
summary{cursor:pointer;color:#555}.chart{overflow-x:auto}"""


@dataclass(frozen=True)
class Section:
    """A part of the page: what it shows and what to do about it, a Vega-Lite chart or none, and its numbers."""

    name: str
    title: str
    say: str
    chart: Any
    head: Sequence[str]
    rows: Sequence[Sequence[Any]]
    open: bool = False


def flags() -> jobs.Parser:
    """The flags of this job."""
    parser = jobs.parser(JOB, __doc__)
    parser.add_argument("--out", required=True, metavar="FILE", help="the page, on this machine")
    parser.add_argument("--version", type=int, metavar="V", help="of thresholds (default: in force, or the newest)")
    return parser


def main(argv: list[str]) -> int:
    """Runs the job; returns 0."""
    args = flags().parse_args(argv)
    if not os.path.isdir(os.path.dirname(os.path.abspath(args.out))):
        raise ValueError(f"--out {args.out}: its folder does not exist")
    spark = delta.session(JOB)
    delta.prepare(spark, args.tables)
    page = report(spark, args.tables, args.version)
    with whole(args.out) as file:
        file.write(page)
    print(f"{JOB}: {args.out}, {len(page.encode()) / 2**20:.1f} MB", flush=True)
    return 0


def report(spark: SparkSession, root: str, version: int | None = None) -> str:
    """The page. Raises ValueError where there is no version."""
    stored = delta.read(spark, root, "thresholds", delta.version(spark, root, "thresholds"))
    every = {row["version"]: row for row in stored.where("segment = '' AND boundary = 4").collect()}
    in_force = next((v for v, row in every.items() if row["status"] == "active"), None)
    chosen = version if version is not None else in_force if in_force is not None else max(every, default=None)
    if chosen is None or chosen not in every:
        known = sorted(every)
        raise ValueError(f"there is no version {chosen} of thresholds (there are: {known}); fit one: fit_thresholds")
    rows = stored.where(F.col("version") == chosen).collect()
    of, told = tiers.version_of(rows), every[chosen]
    figures = delta.read(spark, root, "measures").where(F.col("run_id") == told["run_id"]).collect()

    aim = Objective.read(told["objective"].partition("; ")[0])
    wanted = Wanted(
        told["rule"], of.segment_by, aim, (), sources=tuple(told["gold_sources"]),
        allow_train=told["allow_train"], raters="median" if "median" in told["objective"] else "fractions",
    )  # fmt: skip
    frame = judged(spark, root, wanted, of.model_id, of.prompt_id).where(F.col("use").isin("fit", "test")).persist()
    try:
        sample = local_rows(sampled(frame, frame.count()))
        pairs = delta.read(spark, root, "pairs")
        tiered = tiers.labels_under(spark, chosen, stored, delta.read(spark, root, "label_probs"), pairs)
        sections = [
            tier_counts(pairs, tiered),
            *compared(figures),
            confusion(figures, wanted.name),
            *([curve(sample, of, rows, aim)] if len(sample) else []),
            *([calibration(sample, of)] if len(sample) else []),
            *shift(spark, root, stored, every, of),
            *by_segment(figures, wanted.name, of),
            *fooled(last_probe(spark, root, of)),
            by_words(frame, tiered),
            disagreements(spark, root, frame, tiered),
        ]
    finally:
        frame.unpersist()
    return page(sections, of, told)


# The sections


def tier_counts(pairs: DataFrame, tiered: DataFrame) -> Section:
    """How many pairs are in each tier; a pair that the model has no row of has none either."""
    all_pairs = pairs.select("pair_id").join(tiered, "pair_id", how="left")
    counts = {row["tier"]: row["count"] for row in all_pairs.groupBy("tier").count().collect()}
    rows = [("no tier" if k is None else NAMES[k], counts.get(k, 0)) for k in (*LABELS, None)]
    import altair as alt

    chart = alt.Chart(_data(["tier", "pairs"], rows)).mark_bar().encode(
        alt.Y("tier:N", sort=None, title=None), alt.X("pairs:Q"), tooltip=["tier:N", "pairs:Q"]
    )  # fmt: skip
    say = (
        "Pairs in each tier under this version. Many without a tier: those that are in the view labels say by their "
        "outcome why, the others were not scored (backfill)."
    )
    return Section("tiers", "Tiers", say, chart, ("tier", "pairs"), rows)


def compared(figures: Sequence[Any]) -> list[Section]:
    """The ways to cut side by side, with intervals."""
    import altair as alt

    found = []
    for split, title in (("out_of_fold", "expected of new pairs"), ("test", "on split test")):
        rows = [
            (f["cuts"], f["measure"], f["value"], f["low"], f["high"])
            for f in figures
            if f["split"] == split and not f["segment"] and f["measure"] in (*SHOWN, "cost")
        ]
        if not rows:
            continue
        base = alt.Chart(_data(["cuts", "measure", "value", "low", "high"], rows)).encode(
            alt.Y("cuts:N", sort=None, title=None)
        )
        bars = base.mark_rule(strokeWidth=2).encode(
            alt.X("low:Q", title=None, scale=alt.Scale(zero=False)), alt.X2("high:Q")
        )
        dots = base.mark_point(filled=True, size=70).encode(
            alt.X("value:Q"), tooltip=["cuts:N", "value:Q", "low:Q", "high:Q"]
        )
        chart = (
            (bars + dots)
            .properties(width=230)
            .facet(alt.Column("measure:N", title=None))
            .resolve_scale(x="independent")
        )
        say = (
            "Each way to cut, with its 95 % interval from a bootstrap by query. Which of two wins is in the "
            "table measures, as their difference with its own interval; where that holds 0, take the simpler one."
        )
        head = ("cuts", "measure", "value", "low", "high")
        found.append(Section(f"compared-{split}", f"Measures, {title}", say, chart, head, rows))
    return found


def confusion(figures: Sequence[Any], cuts: str) -> Section:
    """What was judged against what is shown."""
    import altair as alt

    cells = {
        f["measure"]: f["value"] for f in figures if (f["cuts"], f["split"], f["segment"]) == (cuts, "out_of_fold", "")
    }
    rows = []
    for y in LABELS:
        total = sum(cells.get(f"confusion_{y}_{t}") or 0.0 for t in LABELS)
        for t in LABELS:
            value = cells.get(f"confusion_{y}_{t}") or 0.0
            rows.append((NAMES[y], NAMES[t], round(value, 3), round(value / total, 4) if total else 0.0))
    base = alt.Chart(_data(["label", "tier", "weight", "share"], rows)).encode(
        alt.X("tier:N", sort=None), alt.Y("label:N", sort=None)
    )
    chart = base.mark_rect().encode(
        alt.Color("share:Q", scale=alt.Scale(scheme="blues", domain=[0, 1]), title="share of the label")
    )
    dark = alt.condition(alt.datum.share > 0.5, alt.value("white"), alt.value("#222"))
    text = base.mark_text().encode(alt.Text("share:Q", format=".0%"), color=dark)
    say = (
        "Out of fold: how the pairs of each label are spread over the tiers. Far from the diagonal is what users see: "
        "Irrelevant in the first columns calls for --require, not for another objective."
    )
    both = (chart + text).properties(width=320, height=220)
    return Section("confusion", "Labels against tiers", say, both, ("label", "tier", "weight", "share"), rows)


def curve(sample: Rows, of: Version, rows: Sequence[Any], aim: Objective) -> Section:
    """What was made best, and the measures, as one τ moves and the others stay; the cut and its intervals."""
    import altair as alt

    cut = {row["boundary"]: row for row in rows if not row["segment"]}
    taus = of.cuts[""]
    one = cut[4]["rule"] == "one"
    c = tiers.cumulative(sample.p, of.temperature)
    lines = {m: measures.named()[m] for m in SHOWN} | {aim.name: aim.shown}
    if aim.costs:  # on a scale of its own
        lines = {aim.name: aim.shown}
    points, marks = [], []
    for b, k in enumerate(BOUNDARIES[:1] if one else BOUNDARIES):
        name = "τ" if one else f"τ{k}"
        low, high = (0.0, 1.0) if one else (taus[b + 1] if b < 2 else 0.0, taus[b - 1] if b else 1.0)
        for tau in sorted({*np.linspace(low, high, CURVE).tolist(), taus[b]}):
            moved = [tau] * 3 if one else [tau if i == b else taus[i] for i in range(3)]
            found = measures.confusions(sample.weights, tiers.cut(c, moved))
            points += [(name, m, tau, round(float(of_confusion(found)), 6)) for m, of_confusion in lines.items()]
        row = cut[k]
        spread = [row["tau_low"], row["tau_high"]]
        marks.append((name, row["tau"], row["optimal_low"], row["optimal_high"], *spread))
    head = ["cut", "tau", "optimal_low", "optimal_high", "spread_low", "spread_high"]
    line = alt.Chart(_data(["cut", "measure", "tau", "value"], points)).mark_line().encode(
        alt.X("tau:Q", title="τ"), alt.Y("value:Q", scale=alt.Scale(zero=False)), alt.Color("measure:N")
    )  # fmt: skip
    at = _data(head, marks)
    rule = (
        alt.Chart(at)
        .mark_rule(color="#d62728")
        .encode(alt.X("tau:Q", title="τ"), tooltip=["cut:N", *(f"{name}:Q" for name in head[1:])])
    )
    band = (
        alt.Chart(at)
        .mark_rect(opacity=0.15, color="#d62728")
        .encode(alt.X("spread_low:Q", title="τ"), alt.X2("spread_high:Q"))
    )
    best = (
        alt.Chart(at)
        .mark_rect(opacity=0.45, color="#2ca02c")
        .encode(alt.X("optimal_low:Q", title="τ"), alt.X2("optimal_high:Q"))
    )
    charts = [
        alt.layer(
            *(layer.transform_filter(alt.datum.cut == name) for layer in (band, best, line, rule))
        ).properties(width=240, height=200, title=name)
        for name, *_ in marks
    ]  # fmt: skip
    say = (
        f"What was made best ({aim}) and other measures on all judged pairs (those of the fit too) as a cut moves and "
        "the others stay. The red line is the cut, the green band the interval that is as good, the red one the spread "
        "over refits on resampled queries. A flat top: the cut hardly matters; a wide red band: judge more."
    )
    return Section("curve", "The cuts", say, alt.hconcat(*charts), head, marks)


def calibration(sample: Rows, of: Version) -> Section:
    """What the model says against what is true."""
    import altair as alt

    rows, errors = [], []
    kinds = {"as they are": sample.p}
    if of.temperature != 1:
        kinds[f"temperature {of.temperature:.3g}"] = tiers.scaled(sample.p, of.temperature)
    for kind, p in kinds.items():
        for key, bins in measures.calibration(p, sample.weights).items():
            name = key.removeprefix("ece_").replace("_", " ")
            rows += [(kind, name, round(s, 5), round(t, 5), round(w, 3)) for s, t, w in bins]
            errors.append((kind, name, round(measures.ece(bins), 5)))
    names = [name for _, name, _ in errors[: len(errors) // len(kinds)]]
    data, unit = _data(["probabilities", "of", "said", "true", "weight"], rows), alt.Scale(domain=[0, 1])
    line = alt.Chart(data).mark_line(point=True).encode(
        alt.X("said:Q", scale=unit, title="said"), alt.Y("true:Q", scale=unit, title="true"),
        alt.Color("probabilities:N"), tooltip=["said:Q", "true:Q", "weight:Q"],
    )  # fmt: skip
    diagonal = (
        alt.Chart(_data(["x"], [(0,), (1,)]))
        .mark_line(color="#999", strokeDash=[4, 4])
        .encode(alt.X("x:Q", title="said"), alt.Y("x:Q", title="true"))
    )
    charts = [
        (diagonal + line.transform_filter(alt.datum.of == name)).properties(width=170, height=170, title=name)
        for name in names
    ]
    say = (
        "Probability that the model gives (across) against the share of judges that agree (up); on the dashed line "
        "they are the same. Far off it: fit with --temperature fit. The table has the expected calibration error."
    )
    chart = alt.concat(*charts, columns=3)
    return Section("calibration", "Calibration", say, chart, ("probabilities", "of", "ece"), errors)


def shift(spark: SparkSession, root: str, stored: DataFrame, every: dict[int, Any], of: Version) -> list[Section]:
    """Tiers that change between this version and the one in force, or the one in force before."""
    import altair as alt

    others = sorted(
        (row for v, row in every.items() if v != of.version and row["activated_at"] is not None),
        key=lambda row: (row["status"] == "active", row["activated_at"]),
    )
    if not others:
        return []
    before = tiers.version_of(stored.where(F.col("version") == others[-1]["version"]).collect())
    cells, segments = summed(tier_changes(spark, root, stored, before, of))
    names: dict[int | None, str] = {**dict(NAMES.items()), None: "no tier"}
    rows = [(names[b], names[a], n) for (b, a), n in sorted(cells.items(), key=lambda x: [-(k or 0) for k in x[0]])]
    base = alt.Chart(_data(["before", "after", "pairs"], rows)).encode(
        alt.X("after:N", sort=list(names.values())), alt.Y("before:N", sort=list(names.values()))
    )
    heat = base.mark_rect(opacity=0.6).encode(alt.Color("pairs:Q", scale=alt.Scale(scheme="blues")))
    chart = (heat + base.mark_text().encode(alt.Text("pairs:Q", format=","))).properties(width=320, height=220)
    say = (
        f"Pairs by their tier under version {before.version} and under version {of.version}. What is off the diagonal "
        "is what publish would rewrite; read some of it before a promotion."
    )
    found = [Section("shift", "Tiers that change", say, chart, ("before", "after", "pairs"), rows)]
    told = [(_cut(name or "(none)", NAME), n, m, round(m / n, 4)) for name, n, m in segments[:SEGMENTS]]
    if len(told) > 1:
        by = segment_column(before, of)
        chart = alt.Chart(_data(["segment", "pairs", "changed", "share"], told)).mark_bar().encode(
            alt.Y("segment:N", sort=None, title=by), alt.X("share:Q", axis=alt.Axis(format="%")),
            tooltip=["segment:N", "pairs:Q", "changed:Q"],
        )  # fmt: skip
        say = f"Share of the tiers that change, by {by}. One that stands out: look whether it has judgements at all."
        found.append(
            Section("shift-by", "Where they change", say, chart, ("segment", "pairs", "changed", "share"), told)
        )
    return found


def fooled(figures: Sequence[Any]) -> list[Section]:
    """How much of what the model calls Irrelevant becomes Related or better when its text is stuffed."""
    import altair as alt

    flips = [f for f in figures if f["measure"].startswith("flips_")]
    if not flips:
        return []
    rows = [
        (
            f["measure"].removeprefix("flips_"),
            _cut(f["segment"] or "all", NAME),
            f["value"],
            f["low"],
            f["high"],
            f["n"],
        )
        for f in flips
    ]
    head = ("way", "category", "share", "low", "high", "pairs")
    base = alt.Chart(_data(head, [row for row in rows if row[1] == "all"])).encode(
        alt.Y("way:N", sort=None, title=None)
    )
    bars = base.mark_rule(strokeWidth=2).encode(alt.X("low:Q", title=None), alt.X2("high:Q"))
    dots = base.mark_point(filled=True, size=70).encode(
        alt.X("share:Q", axis=alt.Axis(format="%")), tooltip=["way:N", "share:Q", "pairs:Q"]
    )
    say = (
        "Share of the pairs that the model calls Irrelevant which become Related or better when words are written into "
        "the product's text (probe --help names the ways). Where sellers can write that text, train on such pairs "
        "before the tiers are relied on."
    )
    return [Section("fooled", "How easily it is fooled", say, bars + dots, head, rows)]


def by_segment(figures: Sequence[Any], cuts: str, of: Version) -> list[Section]:
    """What to expect of each segment with cuts of its own."""
    import altair as alt

    rows = [
        (
            _cut(f["segment"], NAME),
            f["n"],
            *(None if f[x] is None else round(f[x], 4) for x in ("value", "low", "high")),
        )
        for f in sorted(figures, key=lambda f: (-f["n"], f["segment"]))
        if (f["cuts"], f["split"], f["measure"]) == (cuts, "out_of_fold", "macro_f1") and f["segment"]
    ][:SEGMENTS]
    if not rows:
        return []
    head = ("segment", "judgements", "macro_f1", "low", "high")
    base = alt.Chart(_data(head, rows)).encode(alt.Y("segment:N", sort=None, title=of.segment_by))
    bars = base.mark_rule(strokeWidth=2).encode(alt.X("low:Q", title="macro-F1"), alt.X2("high:Q"))
    dots = base.mark_point(filled=True, size=70).encode(
        alt.X("macro_f1:Q"), tooltip=["segment:N", "judgements:Q", "macro_f1:Q", "low:Q", "high:Q"]
    )
    say = (
        f"Expected of new pairs, by {of.segment_by}, where it has cuts of its own: out of fold, 95 % intervals from a "
        "bootstrap by query. A weak one with a narrow interval is where the next training data should come from."
    )
    return [Section("by-segment", f"By {of.segment_by}", say, bars + dots, head, rows)]


def by_words(frame: DataFrame, tiered: DataFrame) -> Section:
    """How often tiers are right, by length of the query."""
    import altair as alt

    both = frame.join(tiered.select("pair_id", "tier"), "pair_id", how="inner").where("tier IS NOT NULL")
    weight = sum((F.col(f"w{y}") for y in LABELS[1:]), F.col("w4"))
    right = sum(
        (F.when(F.col("tier") == y, F.col(f"w{y}")).otherwise(0.0) for y in LABELS[1:]),
        F.when(F.col("tier") == 4, F.col("w4")).otherwise(0.0),
    )
    rows = both.groupBy(F.least("words", F.lit(6)).alias("kind")).agg(
        F.count("*").alias("n"), (F.sum(right) / F.sum(weight)).alias("accuracy"),
        F.countDistinct("query").alias("queries"),
    ).orderBy("kind").collect()  # fmt: skip
    told = [
        ("6 or more" if r["kind"] == 6 else str(r["kind"]), r["n"], r["queries"], round(r["accuracy"], 4)) for r in rows
    ]
    head = ("kind", "judgements", "queries", "accuracy")
    chart = alt.Chart(_data(head, told)).mark_bar().encode(
        alt.Y("kind:N", sort=None, title="words of the query"), alt.X("accuracy:Q", scale=alt.Scale(domain=[0, 1])),
        tooltip=["kind:N", *(f"{name}:Q" for name in head[1:])],
    )  # fmt: skip
    say = (
        "Share of judgements that the tier meets, by words of the query, on all judged pairs (those of the fit too). A "
        "weak one with many judgements is where the next training data should come from."
    )
    return Section("by-words", "By words of the query", say, chart, head, told)


def disagreements(spark: SparkSession, root: str, frame: DataFrame, tiered: DataFrame) -> Section:
    """Judged pairs whose tier is furthest from their label, the surest first, with their texts."""
    texts = delta.read(spark, root, "pairs").select("pair_id", "title")
    sure = F.greatest(*P_COLUMNS)
    both = frame.select("pair_id", "source", "label").join(tiered.where("tier IS NOT NULL"), "pair_id", how="inner")
    both = both.withColumn("off", F.abs(F.col("tier") - F.col("label"))).where("off > 0")
    rows = (
        both.orderBy(F.desc("off"), F.desc(sure), "pair_id", "source").limit(WORST).join(texts, "pair_id", how="inner")
    )
    told = [
        (_cut(r["query"]), _cut(r["title"]), NAMES[r["label"]], r["tier_name"], *(round(r[p], 4) for p in P_COLUMNS))
        for r in rows.orderBy(F.desc("off"), F.desc(sure), "pair_id", "source").collect()
    ]
    say = (
        "Judged pairs that are furthest off, those of which the model is surest first. Read them: is the judgement "
        "wrong (mend gold), the text poor (mend the product), or the model (put such pairs into training)?"
    )
    head = ("query", "product", "label", "tier", *P_COLUMNS)
    return Section("disagreements", "Worst disagreements", say, None, head, told, open=True)


# The page


def page(sections: Sequence[Section], of: Version, told: Any) -> str:
    """One HTML file: the library's script once, a spec a chart, and each section's numbers as a table."""
    import altair as alt
    import vl_convert

    minor = ".".join(alt.SCHEMA_VERSION.removeprefix("v").split(".")[:2])
    version = minor if minor in vl_convert.get_vegalite_versions() else None
    script = vl_convert.javascript_bundle(None, vl_version=version)  # type: ignore[arg-type]
    facts = {
        "status": told["status"], "rule": told["rule"], "segments": told["segment_by"] or "none",
        "objective": told["objective"], "value on the rows of the fit": f"{told['value']:.4f}",
        "judgements": f"{told['n_gold']:,} of {', '.join(told['gold_sources'])}",
        "model, prompt": f"{of.model_id}, {of.prompt_id}", "engines": "; ".join(told["engines"]),
        "temperature": f"{of.temperature:.4g}", "fitted at": _utc(told["fitted_at"]),
        "in force since": f"{_utc(told['activated_at'])} {told['activated_by'] or ''} {told['reason'] or ''}",
        "fitted on judgements the model was trained on": "yes: overconfident" if told["allow_train"] else "no",
    }  # fmt: skip
    body = [f"<h1>Thresholds, version {of.version}</h1>", _table(("", ""), list(facts.items()))]
    specs = {}
    for section in sections:
        body.append(f'<section id="{section.name}"><h2>{html.escape(section.title)}</h2>')
        body.append(f'<p class="do">{html.escape(section.say)}</p>')
        if section.chart is not None:
            specs[section.name] = section.chart.to_dict()
            body.append(f'<div class="chart" id="chart-{section.name}"></div>')
        table = _table(section.head, section.rows)
        body.append(table if section.open else f"<details><summary>the numbers</summary>{table}</details>")
        body.append("</section>")
    # In a script element only "<" could end it.
    data = json.dumps(specs).replace("<", "\\u003c")
    script = script.replace("</script", "<\\/script")
    draw = (
        "for (const [name, spec] of Object.entries(specs)) { const at = document.getElementById('chart-' + name);"
        " vegaEmbed(at, spec, {renderer: 'svg', actions: false}).then(() => { at.dataset.drawn = 'yes'; })"
        ".catch(error => { at.textContent = 'This chart could not be drawn: ' + error; }); }"
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; "
        "script-src 'unsafe-inline' 'unsafe-eval'\">"
        f"<title>Thresholds, version {of.version}</title><style>{_STYLE}</style></head><body>\n"
        + "\n".join(body)
        + f"\n<script>{script}</script>\n<script>const specs = {data};\n{draw}</script></body></html>\n"
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    cells = [
        "".join(
            f'<td class="n">{x}</td>' if isinstance(x, int | float) else f"<td>{html.escape(str(x))}</td>" for x in row
        )
        for row in rows
    ]
    top = "".join(f"<th>{html.escape(h)}</th>" for h in head) if any(head) else ""
    return "<table>" + (f"<tr>{top}</tr>" if top else "") + "".join(f"<tr>{c}</tr>" for c in cells) + "</table>"


def _utc(at: datetime | None) -> str:
    # A row has this machine's time, without a zone.
    return f"{at.astimezone(UTC):%Y-%m-%d %H:%M} UTC" if at else "never"


def _cut(text: str, most: int = TEXT) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def _data(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> Any:
    import altair as alt

    return alt.InlineData(values=[dict(zip(head, row, strict=True)) for row in rows])
