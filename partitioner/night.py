"""A night: one run of one model over `pairs`, which keeps `label_probs` as they are. The nightly stream and the
backfill are both one; they differ in which pairs they look at.

A pair is known by (content_hash, model, prompt): what is judged is never asked again, whoever judged it.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np
from pyspark.sql import Column, DataFrame, Row, SparkSession
from pyspark.sql import functions as F

from partitioner import engines, models, prefix, tiers, waves
from partitioner.waves import Stopped, Waves
from schemas import delta, runs
from schemas.crash import crash
from schemas.labels import LABELS, P_COLUMNS
from udfs import selfcheck
from udfs.render import rendered
from udfs.score import Scoring

NOISE_SAMPLE = 64  # pairs of a run that are asked again in another order
NOISE_TOGETHER = 8  # of them, that share a prefix: a product's text is dear, its queries are not
ASKED = "noise_pairs"  # figure: how many
FEW = 500  # changes in a batch that are named one by one: no table is then joined as a whole
PORTIONS = 8  # of a line, by how much they are wanted
MIX_PAIRS = 100  # of a run: with fewer, its mix of labels says nothing
GATES_SECONDS = 3600.0  # between two looks at the gates in a stream that stays
# Whether an answer takes a row's place: a writer that slept must not put old text over new, and what another run scored
# meanwhile stays.
NEWER = (
    "new.pairs_version >= old.pairs_version AND (new.content_hash <> old.content_hash "
    "OR old.outcome <> 'scored' AND new.outcome <> old.outcome)"
)


class Night(Waves):
    """One run over `pairs`: scores those whose present text this model has not judged, forgets pairs that are gone."""

    rides = True

    def __init__(self, spark: SparkSession, root: str, what: Scoring, run: runs.Run) -> None:
        super().__init__(spark, root, what, run)
        self.also: list[Night] = []  # other models that are kept current
        self.error: BaseException | None = None
        self._version = 0  # of pairs, at which the batch was read
        self.between = threading.Lock()  # held while a batch is worked on
        self.ending = False  # no batch begins any more
        self._written = 0  # rows of label_probs that this run's commits inserted or changed
        self._looked = time.monotonic()  # when the gates were last looked at
        self._gates_told = False
        self._failed = 0  # of them, at most at one look

    def forget_removed_pairs(self) -> None:
        """Removes label_probs rows, of all models, whose pair is gone."""
        pairs = delta.read(self.spark, self.root, "pairs").select("pair_id")
        judged = delta.read(self.spark, self.root, "label_probs").select("pair_id")
        orphans = judged.join(pairs, "pair_id", how="left_anti")
        if not orphans.isEmpty():
            if pairs.isEmpty():
                raise runs.Unmet(
                    f"table pairs is empty, and label_probs is not: all that was judged would be removed, so nothing "
                    f"was done. Bring the pairs back (ingest --tables {self.root} --pairs FILE); or, where they are to "
                    f"go for good, remove the rows model by model (maintain --tables {self.root} --drop-model ID --yes)"
                )
            gone = delta.delete(self.spark, self.root, "label_probs", orphans, ("pair_id",))
            self._count(removed=gone)
            print(f"{self.run.job}: removed {gone:,} rows of pairs that are gone", flush=True)

    def follow_pairs(self) -> None:
        """Where `pairs` was made anew its versions begin again, and rows that name a later one than there is would pass
        for newer than any text to come: they name the first one from now on."""
        highest = delta.read(self.spark, self.root, "label_probs").agg(F.max("pairs_version")).collect()[0][0]
        present = delta.version(self.spark, self.root, "pairs")  # read after it: versions only grow
        if highest is not None and highest > present:
            named = F.col("pairs_version") > present
            delta.update(self.spark, self.root, "label_probs", named, {"pairs_version": F.lit(0).cast("bigint")})
            delta.drop(self.spark, delta.checkpoint(self.root))  # they point behind the feed's new end
            print(f"{self.run.job}: pairs is at version {present:,}, rows named up to {highest:,}: it was made anew")

    def batch(self, changes: DataFrame, batch_id: int) -> None:
        """One micro-batch of the change feed (foreachBatch)."""
        with self.between:
            if self.ending:  # it is not done, so the checkpoint stays before it
                raise Stopped("the stream ends")
            try:
                self._batch(changes, f"{batch_id:04d}")
            except BaseException as error:
                self.error = error  # Spark wraps it in a page of Java
                raise
        crash("batch")

    def _batch(self, changes: DataFrame, name: str) -> None:
        first = changes.select("_change_type", "pair_id", "product_id").limit(FEW + 1).collect()
        few = len(first) <= FEW
        kinds = {row["_change_type"] for row in (first if few else changes.select("_change_type").distinct().collect())}
        if "delete" in kinds:
            self.forget_removed_pairs()
        if kinds & {"insert", "update_postimage"}:
            changed = changes.where(F.col("_change_type").isin("insert", "update_postimage"))
            changed = changed.select("pair_id").distinct()
            landed = f"{name}-changed"
            if not few:  # each look at the feed reads its files whole
                changed = delta.land(self.spark, self.root, self.run.run_id, landed, changed)

            def score(night: Night) -> None:
                if few:
                    night.score_named(first, name)
                else:
                    night.score_changed(changed, name)
                if night.stays and time.monotonic() - night._looked > GATES_SECONDS:
                    if night is self:  # a candidate need not have judged all pairs
                        night.score_left(f"{name}-left")
                    night.look_at_gates()
                    night._refused_before = night.run.counts.get("refused", 0)
                    night.run = replace(night.run, figures={k: v for k, v in night.run.figures.items() if k != ASKED})

            self.with_candidates(score)
            if not few:
                delta.drop_scratch(self.spark, self.root, self.run.run_id, landed)

    def with_candidates(self, work: Callable[[Night], None]) -> None:
        """Does work for this night, then for the models beside it: a fault of one of those ends its run alone, and
        fails a gate of this one."""
        work(self)
        for other in list(self.also):
            try:
                work(other)
            except Stopped:
                raise
            except Exception as error:
                if self.left:  # it was cancelled, and is not at fault
                    raise
                print(
                    f"{self.run.job}: --also {other.what.model.model_id}: {runs.in_a_line(error)}; goes on without it",
                    flush=True,
                )
                self.also.remove(other)
                self._count(candidates_failed=1)
                other.fail(error)
                delta.drop_scratch(self.spark, self.root, other.run.run_id)

    def pairs(self) -> DataFrame:
        """`pairs` as they are at this moment, which is the version that the next rows will name."""
        self._version = delta.version(self.spark, self.root, "pairs")
        return delta.read(self.spark, self.root, "pairs", self._version)

    def chosen_pairs(self) -> DataFrame:
        """Those of `pairs` that this run may score."""
        return self.pairs()

    def retry_failed(self) -> None:
        """Asks again for the pairs that have no probabilities: an engine died on them, or they were too long for it."""
        failed = F.col("outcome") != self.done
        judged = self.judged()
        seen = self.chosen_pairs().join(judged.where(failed).select("pair_id"), "pair_id", how="left_semi")
        self.score(seen, "retried", judged.where(~failed))

    def score_changed(self, changed: DataFrame, name: str) -> None:
        """Scores those of the changed pairs (column pair_id) whose present text this model has not judged yet."""
        self.score(self.pairs().join(changed, "pair_id", how="left_semi"), name, self.judged())

    def score_named(self, changed: Sequence[Row], name: str) -> None:
        """As `score_changed`, for so few pairs (pair_id, product_id) that each can be named."""
        pair, product = (F.col(c).isin(sorted({row[c] for row in changed})) for c in ("pair_id", "product_id"))
        self.score(self.pairs().where(product & pair), name, self.judged().where(product & pair))

    def score_left(self, name: str = "left") -> None:
        """Scores what the feed goes without: where rows of label_probs are lost, or an older version of a table was
        put back, its changes do not tell."""
        left = unjudged(self.pairs(), self.judged())
        if not left.isEmpty():
            print(
                f"{self.run.job}: the feed of changes is worked off, and some pairs are not judged as they are",
                flush=True,
            )
            self.score(left, name, self.judged())

    def score(self, seen: DataFrame, name: str, judged: DataFrame) -> prefix.Line:
        """Scores those of `seen` (of `pairs`) whose text is not in `judged`, most wanted first; returns their line."""
        started = time.monotonic()
        held = Waves._held == self.what.settings and not engines.may_have_ended()
        why = self.asked_to_stop()
        if (why or not held) and not unjudged(seen, judged).isEmpty():
            if why:
                raise Stopped(why)
            self.begin_loading()
        line, total = self.plan(seen, name, judged)
        self._count(seen=total, skipped=total - line.prompts)
        if line.prompts:
            self.planned(line, total, time.monotonic() - started)
            crash("planned")
            try:
                if not self.asked_to_stop():  # else the line's run ends at once, and says how much is left
                    self.check_first_use(line)
                self.run_line(line, name)
            except Stopped:
                if not self.run.counts.get("engine_deaths"):  # one would be loaded for it
                    self.ask_again(line)
                raise
            self.ask_again(line)
        delta.drop_scratch(self.spark, self.root, self.run.run_id, self.line_name(name))
        return line

    def plan(
        self, seen: DataFrame, name: str, judged: DataFrame, wanted: Column | None = None
    ) -> tuple[prefix.Line, int]:
        """The line of the pairs that are to be scored, and how many were looked at.

        `wanted`: what comes first, highest first (default: the pairs' weight, where they bear one).
        """
        by = (F.col("weight") if wanted is None else wanted).cast("double")
        told = seen.agg(F.count("*"), F.min(by), F.max(by), F.count_if(by.isNull())).collect()[0]
        total, low, high, without = tuple(told)
        todo = unjudged(seen, judged)
        if low is not None and (low < high or without):
            todo = in_portions(
                todo, by, ("locale", "product_id") if self.what.prompt.first == "product" else ("query",)
            )
        return self.land_line(rendered(todo, self.what.prompt), name), total

    def planned(self, line: prefix.Line, total: int, seconds: float) -> None:
        """Tells also what the other order inside the prompt would have cost: roughly, the other part of each pair."""
        super().planned(line, total, seconds)
        second = F.size("ids") - F.col("group_tokens")
        by = ("query",) if self.what.prompt.first == "product" else ("locale", "product_id")
        groups = line.rows.groupBy(*by).agg(F.max(second).alias("once"), F.sum("group_tokens").alias("each"))
        other = groups.agg(F.sum("once") + F.sum("each")).collect()[0][0]
        other -= self.what.prompt.head * (line.prompts - 1)  # which all share
        self._measure(other_order_tokens=self.run.figures.get("other_order_tokens", 0.0) + other)
        print(
            f"{self.run.job}: {self.what.prompt.first} first computes {line.trie_nodes:,} tokens with a perfect cache; "
            f"the other order would compute about {other:,}",
            flush=True,
        )

    def write(self, answered: DataFrame, wave_id: str) -> None:
        """Merges the wave into `label_probs`."""
        what = self.what
        if delta.version(self.spark, self.root, "pairs") != self._version:
            # An answer to a text that is no longer the pair's, or to a pair that is gone, is dropped: another run may
            # have judged the present text, or taken it from an earlier row with the same text, and never comes back.
            present = delta.read(self.spark, self.root, "pairs").select("pair_id", "content_hash")
            answered = answered.join(present, ["pair_id", "content_hash"], how="left_semi")
        new = answered.select(
            "pair_id",
            F.lit(what.model.model_id).alias("model_id"),
            F.lit(what.prompt.prompt_id).alias("prompt_id"),
            "query",
            "product_id",
            "locale",
            *P_COLUMNS,
            "p_outside",
            "outcome",
            "content_hash",
            F.lit(self._version).cast("bigint").alias("pairs_version"),
            F.lit(wave_id).alias("wave_id"),
            "prompt_tokens",
            "tokens_cut",
            F.lit(self.run.run_id).alias("run_id"),
            F.current_timestamp().alias("scored_at"),
        )
        written = delta.upsert(self.spark, self.root, "label_probs", new, NEWER, self.same)
        self._written += written["inserted"] + written["updated"]

    def _tally(self, figures: dict[str, Any]) -> None:
        self._measure(rows_written=self._written)
        super()._tally(figures)

    def ask_again(self, line: prefix.Line) -> None:
        """Once a run, some of its pairs in another order and other company: how far their probabilities move is the
        noise under every figure and every cut."""
        if ASKED in self.run.figures:
            return
        scored = self.judged().where((F.col("run_id") == self.run.run_id) & (F.col("outcome") == "scored"))
        here = line.rows.select("pair_id", "content_hash")  # a stream's run has many lines
        scored = scored.join(here, ["pair_id", "content_hash"], how="left_semi")
        count = min(NOISE_SAMPLE, max(4, int(line.prompts * waves.CANARY_SHARE)))
        by = ("locale", "product_id") if self.what.prompt.first == "product" else ("query",)
        near = scored.orderBy(F.xxhash64(*by), *by, F.xxhash64("pair_id")).limit(count * NOISE_TOGETHER).collect()
        drawn = {row["pair_id"]: row for row in drawn_in_groups(near, by, count)}
        if not drawn:
            return
        some = line.rows.where(F.col("pair_id").isin(list(drawn)))
        with self.timed("check"), self.cancellable("noise"), engines.own_workers(self.spark, beside=True):
            again = self.ask(some.repartition(1).sortWithinPartitions(F.xxhash64("pair_id"))).collect()
        both = [(drawn[b["pair_id"]], b) for b in again if b["outcome"] == "scored"]
        computed = sum(b["prompt_tokens"] - (b["cached_tokens"] or 0) for _, b in both)
        self._measure(noise_tokens=self.run.figures.get("noise_tokens", 0.0) + computed)
        both = [(a, b) for a, b in both if a["content_hash"] == b["content_hash"]]
        moved = selfcheck.differences(*([[pair[side][p] for p in P_COLUMNS] for pair in both] for side in (0, 1)))
        if moved:
            mean, flips = sum(moved) / len(moved), self._flips(both)
            self._measure(**{ASKED: len(both)}, noise_max_dp=max(moved), noise_mean_dp=mean, noise_flips=flips)

    def _flips(self, both: Sequence[tuple[Row, Row]]) -> int:
        """How many of pairs that were answered twice have two tiers; where no thresholds of this model and prompt are
        in force, two likeliest labels."""
        before, after = (np.array([[pair[side][name] for name in P_COLUMNS] for pair in both]) for side in (0, 1))
        if (version := self._cuts()) is None:
            return int((tiers.argmax(before) != tiers.argmax(after)).sum())
        segments: dict[str, str] = {}
        if version.segment_by:
            probs, *others = (
                delta.read(self.spark, self.root, name) for name in ("label_probs", "pairs", "thresholds")
            )
            asked = probs.where(F.col("pair_id").isin([row["pair_id"] for row, _ in both]))
            told = tiers.labels(self.spark, asked, *others).select("pair_id", "segment").collect()
            segments = {row["pair_id"]: row["segment"] for row in told}
        cuts = np.array([version.cuts.get(segments.get(row["pair_id"], ""), version.cuts[""]) for row, _ in both])
        old, new = (tiers.cut(tiers.cumulative(p, version.temperature), cuts) for p in (before, after))
        return int((old != new).sum())

    def _cuts(self) -> tiers.Version | None:
        """The thresholds in force, where they are of this model and prompt."""
        version = tiers.active(self.spark, self.root)
        return version if version and (version.model_id, version.prompt_id) == self.what.regime else None

    def close(self, status: str = "done", message: str | None = None) -> runs.Run:
        """Writes the run's gates and its end; returns its row."""
        self._split()
        self.look_at_gates()
        self.run = runs.finish(self.spark, self.root, self.run, status, message)
        print(summary(self.run), flush=True)
        return self.run

    def fail(self, error: BaseException) -> None:
        """Writes that the run ended by an error, if it has not ended; its gates too, if the tables still take them."""
        if self.run.finished_at:
            return
        with suppress(Exception):
            self._split()
            self.look_at_gates()
        super().fail(error)

    def look_at_gates(self) -> None:
        """Writes the run's gates as they are now, and tells those that are not in order."""
        told = self.gates()
        if told:
            write = delta.upsert if self._gates_told else delta.append
            self._gates_told = True
            write(self.spark, self.root, "gates", delta.rows(self.spark, "gates", told))
        for _, name, level, found, allowed, note in told:
            if level != "ok":
                print(
                    f"{self.run.job}: gate {name}: {level}, found {found:.3g}, allowed {allowed:.3g}: {note}",
                    flush=True,
                )
        self._looked = time.monotonic()
        if failed := sum(level == "fail" for _, _, level, *_ in told):
            self._count(gates_failed=max(0, failed - self._failed))  # a stream that stays looks at the same ones again
            self._failed = max(failed, self._failed)

    def gates(self) -> list[tuple[str, str, str, float | None, float, str]]:
        """What was looked at, as rows of `gates`; also keeps the mixes of labels and tiers for the next run to compare
        with."""
        counts, run_id = self.run.counts, self.run.run_id
        scored, refused = counts.get("scored", 0), counts.get("refused", 0)
        present = delta.read(self.spark, self.root, "pairs").select("pair_id", F.col("content_hash").alias("text"))
        mine = (F.col("run_id") == run_id) & (F.col("outcome") == "scored")
        by_label = (
            present.join(self.judged(), "pair_id", how="left")
            .groupBy(F.when(mine, tiers.likeliest()).alias("label"))
            .agg(F.count("*").alias("pairs"), F.count_if(~F.col("content_hash").eqNullSafe(F.col("text"))).alias("old"))
            .collect()
        )
        mix_shift = self._shift("mix", {row["label"]: row["pairs"] for row in by_label if row["label"]})
        tier_shift = None
        if scored >= MIX_PAIRS and (version := self._cuts()):
            others = (delta.read(self.spark, self.root, name) for name in ("pairs", "thresholds"))
            tiered = tiers.labels(self.spark, self.judged().where(mine), *others).groupBy("tier").count().collect()
            tier_shift = self._shift(f"tiers_v{version.version}", {row["tier"]: row["count"] for row in tiered})
        pairs, old = (sum(row[name] for row in by_label) for name in ("pairs", "old"))
        noise = selfcheck.NOISE.get(self.run.dtype or "", 0.0)
        looked = [
            (
                "refused_share",
                refused / max(1, scored + refused),
                0.05,
                "warn",
                "of this run's rows have no label",
            ),
            (
                "refused",
                float(refused),
                float(self.max_refused + self._refused_before),
                "fail",
                "rows without a label (--max-refused)",
            ),
            (
                "candidates",
                float(counts.get("candidates_failed", 0)),
                0.0,
                "fail",
                "models of --also whose runs failed",
            ),
            ("outside_mass", self.run.p_outside, 0.2, "warn", "mean mass on anything but the four labels"),
            ("mix_shift", mix_shift, 0.2, "warn", "of the likeliest labels moved against the run before"),
            ("tier_shift", tier_shift, 0.2, "warn", "of the tiers moved against the run before, by the cuts in force"),
            ("freshness", old / max(1, pairs), 0.0, "warn", "of the pairs are not judged as they are now (backfill)"),
            (
                "canaries",
                self.run.figures.get("canaries_max_dp"),
                noise,
                "fail" if counts.get("waves_failed") else "warn",
                "canaries against themselves, max |Δp|; the waves in which one was off were dropped and asked again",
            ),
            (
                "noise",
                self.run.figures.get("noise_max_dp"),
                noise,
                "fail",
                "pairs asked again in another order, max |Δp|",
            ),
            (
                "noise_mean",
                self.run.figures.get("noise_mean_dp"),
                selfcheck.MEAN_NOISE.get(self.run.dtype or "", 0.0),
                "fail",
                "pairs asked again in another order, mean of their max |Δp|",
            ),
        ]
        return [
            (run_id, name, "ok" if found is None or found <= allowed else level, found, allowed, note)
            for name, found, allowed, level, note in looked
        ]

    def _shift(self, name: str, mix: dict[int, int]) -> float | None:
        """How much of this run's mix (pairs by label or tier) is elsewhere than in that of the run before (half the sum
        of |Δ|); None where one of the two has too few pairs to say. Keeps it as the run's figures `name`_4 to _1."""
        if not mix:
            return None
        shares = {f"{name}_{label}": mix.get(label, 0) / sum(mix.values()) for label in LABELS}
        self._measure(**shares)
        if self.run.counts.get("scored", 0) < MIX_PAIRS:
            return None
        figures, mine = F.col("figures"), models.of(self.run.model_id, self.run.prompt_id)
        enough = (F.col("counts")["scored"] >= MIX_PAIRS) & figures[f"{name}_4"].isNotNull()
        before = runs.table(self.spark, self.root).where(mine & enough & (F.col("run_id") != self.run.run_id))
        last = before.orderBy(F.desc("started_at")).select("figures").head()
        return sum(abs(share - last["figures"][key]) for key, share in shares.items()) / 2 if last else None


def unjudged(seen: DataFrame, judged: DataFrame) -> DataFrame:
    """Those of `seen` whose present text is not in `judged`."""
    return seen.join(judged.select("pair_id", "content_hash"), ["pair_id", "content_hash"], how="left_anti")


def drawn_in_groups(rows: Sequence[Row], by: Sequence[str], count: int) -> list[Row]:
    """`count` of the rows, at most `NOISE_TOGETHER` of a group (columns `by`), or where that is too few also of the
    others."""
    so_far: Counter[tuple[object, ...]] = Counter()
    first: list[Row] = []
    others: list[Row] = []
    for row in rows:
        group = tuple(row[name] for name in by)
        so_far[group] += 1
        (first if so_far[group] <= NOISE_TOGETHER else others).append(row)
    return (first + others)[:count]


def in_portions(pairs: DataFrame, wanted: Column, group: Sequence[str]) -> DataFrame:
    """Adds `portion`, 0 first: what shares a prefix (`group`) stays together, and comes with its most wanted pair.

    Cut at equal shares of the groups; where nearly all are wanted alike, as with one weight for most, what is wanted
    more than those is cut in its turn.
    """
    best = pairs.groupBy(*group).agg(F.max(wanted).alias("best"))
    cuts: set[float] = set()
    above = best
    while found := set(above.approxQuantile("best", [n / PORTIONS for n in range(1, PORTIONS)], 0.01)):
        cuts |= found
        if len(found) > 1:
            break
        above = above.where(F.col("best") > max(found))
    portion = F.lit(0)
    for cut in sorted(cuts):
        portion = portion + F.when(F.col("best") >= cut, 0).otherwise(1)  # null: last
    keyed = best.select(*(F.col(c).alias(f"group_{c}") for c in group), portion.alias("portion"))
    same = [F.col(c).eqNullSafe(F.col(f"group_{c}")) for c in group]
    return pairs.join(keyed, same, how="inner").drop(*(f"group_{c}" for c in group))


def summary(run: runs.Run) -> str:
    """What the run did, for people."""
    counts = run.counts
    text = (
        f"{run.job}: {run.status} · {counts.get('seen', 0):,} seen, {counts.get('skipped', 0):,} skipped, "
        f"{counts.get('scored', 0):,} scored, {counts.get('refused', 0):,} refused"
    )
    if not counts.get("scored"):
        return text
    return text + (
        f" · {run.prompt_tokens:,} prompt tokens, {run.computed_tokens:,} computed (block floor {run.block_floor:,}, "
        f"trie {run.trie_nodes:,}), {run.tokens_cut:,} cut · engine {run.engine_seconds:,.0f} s, {run.engine_loads} "
        f"load(s), {run.dtype} · mean mass outside the labels {run.p_outside:.4f}"
    )
