"""What must hold in every version of `label_probs`, whatever was killed: read with delta-rs, raw rows counted.

Each check returns the breaches it found, in words; `audit` is all of them. Numbers are those of the list in
docs/operations.md.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from deltalake import DeltaTable

from schemas.labels import OUTCOMES, P_COLUMNS

Rows = list[dict[str, Any]]
KEY = ("pair_id", "model_id", "prompt_id")


def key(row: dict[str, Any]) -> tuple[str, ...]:
    return tuple(row[name] for name in KEY)


def table(root: str, name: str, version: int | None = None) -> Rows:
    """All rows of a table, at a version."""
    rows: Rows = DeltaTable(f"{root}/{name}", version=version).to_pyarrow_table().to_pylist()
    return rows


def versions(root: str, name: str) -> Iterator[Rows]:
    """The table at each of its versions, from 0."""
    for version in range(DeltaTable(f"{root}/{name}").version() + 1):
        yield table(root, name, version)


def one_row_a_key(rows: Rows) -> list[str]:
    """1."""
    return [f"{n} rows of {k}" for k, n in Counter(map(key, rows)).items() if n > 1]


def simplex_or_null(rows: Rows) -> list[str]:
    """2."""
    found = []
    for row in rows:
        p = [row[name] for name in P_COLUMNS]
        if row["outcome"] == "scored":
            fair = None not in (*p, row["p_outside"]) and all(0 <= x <= 1 for x in (*p, row["p_outside"]))
            if not fair or abs(sum(p) - 1) > 1e-6:
                found.append(f"{key(row)} is scored with {p}, outside {row['p_outside']}")
        elif row["outcome"] not in OUTCOMES or any(x is not None for x in (*p, row["p_outside"])):
            found.append(f"{key(row)} is {row['outcome']} with {p}")
    return found


def conserved(rows: Rows, pairs: Rows, model_id: str) -> list[str]:
    """4 and 5, at the end: each pair has one row of the model, of its present text; no row is without its pair."""
    text, found = {row["pair_id"]: row["content_hash"] for row in pairs}, []
    mine = [row for row in rows if row["model_id"] == model_id]
    for prompt in {row["prompt_id"] for row in mine} or {""}:
        judged = {row["pair_id"]: row["content_hash"] for row in mine if row["prompt_id"] == prompt}
        found += [f"pair {pair} is lost" for pair in text.keys() - judged.keys()]
        found += [f"row {pair} is of no pair" for pair in judged.keys() - text.keys()]
        found += [f"{pair} has old text" for pair in text.keys() & judged.keys() if text[pair] != judged[pair]]
    return found


def never_back(before: Rows, after: Rows) -> list[str]:
    """5, from one version to the next."""
    old = {key(row): row["pairs_version"] for row in before}
    return [
        f"{key(r)} fell back to pairs@{r['pairs_version']}" for r in after if r["pairs_version"] < old.get(key(r), 0)
    ]


def whole_waves(before: Rows, after: Rows, known: set[str]) -> list[str]:
    """6, from one version to the next: a wave that was there gets no more rows. Adds the new ones to `known`."""
    found = [f"wave {wave} came in pieces" for wave in {row["wave_id"] for row in brought(before, after)} & known]
    known |= {row["wave_id"] for row in after}
    return found


def brought(before: Rows, after: Rows) -> Rows:
    """The rows that a version inserted or wrote anew: the same key of another wave is another row."""
    was = {(key(row), row["wave_id"]) for row in before}
    return [row for row in after if (key(row), row["wave_id"]) not in was]


def accounted(runs: Rows) -> list[str]:
    """4, of what the runs tell: a pair that was seen was skipped, scored or refused."""
    found = []
    for run in runs:
        counts = dict(run["counts"])
        if run["status"] == "done" and "scored" in counts:
            became = sum(counts.get(name, 0) for name in ("skipped", "scored", "refused"))
            if run["job"] in ("rescore", "backfill") and counts.get("seen") != became:
                found.append(f"run {run['run_id']} saw {counts.get('seen')} pairs and tells of {became}")
    return found


def told_as_written(runs: Rows, written: Counter[str]) -> list[str]:
    """4, of what the log tells: a run that ended by itself wrote as many rows as it says, one that failed or was killed
    no fewer. `written`: rows by run_id that one version or another brought."""
    found = []
    for run in runs:
        told, whole = dict(run["figures"]).get("rows_written", 0.0), run["status"] in ("done", "stopped")
        if told > written[run["run_id"]] or (whole and told < written[run["run_id"]]):
            found.append(f"run {run['run_id']} tells of {told:.0f} rows and wrote {written[run['run_id']]}")
    return found


def one_regime(thresholds: Rows) -> list[str]:
    """8: at most one version of thresholds is active, with one cut a segment and boundary."""
    active = [row for row in thresholds if row["status"] == "active"]
    cuts = Counter((row["segment"], row["boundary"]) for row in active)
    found = [f"{n} active cuts of {cut}" for cut, n in cuts.items() if n > 1]
    regimes = {(row["version"], row["model_id"], row["prompt_id"]) for row in active}
    return found + ([f"{len(regimes)} versions are active"] if len(regimes) > 1 else [])


def audit(root: str, *models: str) -> list[str]:
    """Every breach of 1, 2, 5, 6 and 8 in any version, and of 4 and 5 at the end for `models`."""
    found: list[str] = []
    before: Rows = []
    waves: set[str] = set()
    written: Counter[str] = Counter()
    for number, rows in enumerate(versions(root, "label_probs")):
        breaches = one_row_a_key(rows) + simplex_or_null(rows)
        breaches += never_back(before, rows) + whole_waves(before, rows, waves)
        found += [f"version {number}: {breach}" for breach in breaches]
        written.update(row["run_id"] for row in brought(before, rows))
        before = rows
    for number, cuts in enumerate(versions(root, "thresholds")):
        found += [f"thresholds@{number}: {breach}" for breach in one_regime(cuts)]
    told = table(root, "runs")
    found += accounted(told) + told_as_written(told, written)
    pairs = table(root, "pairs")
    for model in models:
        found += conserved(before, pairs, model)
    return found


def final(root: str) -> list[tuple[Any, ...]]:
    """3: what two runs are compared by: key, text, outcome, probabilities."""
    names = (*KEY, "content_hash", "outcome", *P_COLUMNS, "p_outside")
    return sorted(tuple(row[name] for name in names) for row in table(root, "label_probs"))


def left(root: str) -> list[str]:
    """9: what a run that has ended must not leave."""
    return [str(path) for folder in ("_scratch", "_leases") for path in (Path(root) / folder).glob("[!.]*")]
