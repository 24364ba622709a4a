"""The tables: columns with their comments, keys, constraints, and how the two hashes of a pair are made.

The rules live in Delta itself (NOT NULL and CHECK), not only in code, so that no writer can break them, and every
column carries its comment, so that `DESCRIBE TABLE` is the documentation. Readers come first: whatever would make a
table unreadable for delta-rs, DuckDB or Polars is set off in its properties.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from pyspark.sql import Column
from pyspark.sql import functions as F

from schemas.labels import DROPPED, OUTCOMES, P_COLUMNS

# Reader protocol 1 for all: these three are what delta-rs and Polars stumble over.
_READABLE = {
    "delta.enableDeletionVectors": "false",
    "delta.columnMapping.mode": "none",
    "delta.checkpointPolicy": "classic",
}


@dataclass(frozen=True)
class Col:
    """One column: name, SQL type, comment; `required` makes it NOT NULL."""

    name: str
    type: str
    comment: str
    required: bool = False


@dataclass(frozen=True)
class Table:
    """One Delta table of the contract; it lies at `ROOT/name`."""

    name: str
    comment: str
    key: tuple[str, ...]
    columns: tuple[Col, ...]
    checks: dict[str, str] = field(default_factory=dict)
    cluster_by: tuple[str, ...] = ()
    change_feed: bool = False

    @property
    def names(self) -> list[str]:
        """Column names in order."""
        return [column.name for column in self.columns]

    @property
    def properties(self) -> dict[str, str]:
        """Every table property that the contract fixes, constraints among them."""
        checks = {f"delta.constraints.{name}": sql for name, sql in self.checks.items()}
        return _READABLE | ({"delta.enableChangeDataFeed": "true"} if self.change_feed else {}) | checks


PAIRS = Table(
    "pairs",
    "A query and a product whose relevance is wanted, with the product's text",
    ("pair_id",),
    (
        Col("pair_id", "STRING", "Key: 32 hex digits, a hash of locale, query and product_id", True),
        Col("query", "STRING", "What was searched for, as typed", True),
        Col("product_id", "STRING", "The product's id in its catalogue; with locale it names one product", True),
        Col("locale", "STRING", "Market or language of query and product; empty where there is one only", True),
        Col("title", "STRING", "The product's title", True),
        Col("brand", "STRING", "The product's brand"),
        Col("description", "STRING", "The product's description"),
        Col("attributes", "MAP<STRING,STRING>", "The product's attributes by name"),
        Col("category", "STRING", "The product's category"),
        Col("weight", "DOUBLE", "Impressions, or whatever tells which pairs matter most; more is scored first"),
        Col("content_hash", "STRING", "Hash of all text above; a model judges a pair anew only when it changes", True),
        Col("updated_at", "TIMESTAMP", "When this row was last written", True),
    ),
    {
        "pair_id_form": "pair_id RLIKE '^[0-9a-f]{32}$'",
        "query_present": "trim(query) <> ''",
        "title_present": "trim(title) <> ''",
        "weight_positive": "weight IS NULL OR weight >= 0",
    },
    cluster_by=("locale", "product_id"),
    change_feed=True,
)

GOLD = Table(
    "gold",
    "A human judgement of a pair",
    ("pair_id", "source"),
    (
        Col("pair_id", "STRING", "The judged pair", True),
        Col("source", "STRING", "Where the judgement comes from, as named at ingest", True),
        Col("label", "INT", "4 Excellent, 3 Related, 2 Mismatch, 1 Irrelevant; of raters alone, their median", True),
        Col("rater_labels", "ARRAY<INT>", "The labels of the single raters, where known"),
        Col("weight", "DOUBLE", "How much this judgement counts; 1 where nothing was said", True),
        Col("split", "STRING", "train, dev or test; the same for all pairs of a query", True),
        Col("judged_at", "TIMESTAMP", "When it was ingested", True),
    ),
    {
        "label_range": "label BETWEEN 1 AND 4",
        "rater_range": "rater_labels IS NULL OR forall(rater_labels, x -> x BETWEEN 1 AND 4)",
        "split_named": "split IN ('train', 'dev', 'test')",
        "weight_positive": "weight > 0",
    },
)

_SUM = " + ".join(P_COLUMNS)
_ALL_NULL = " AND ".join(f"{p} IS NULL" for p in (*P_COLUMNS, "p_outside"))
_ALL_IN_RANGE = " AND ".join(f"{p} IS NOT NULL AND {p} BETWEEN 0 AND 1" for p in (*P_COLUMNS, "p_outside"))

LABEL_PROBS = Table(
    "label_probs",
    "A pair judged by one model with one prompt",
    ("pair_id", "model_id", "prompt_id"),
    (
        Col("pair_id", "STRING", "The judged pair", True),
        Col("model_id", "STRING", "The model: a hash of its weights and configuration", True),
        Col("prompt_id", "STRING", "The prompt: a hash of its template, labels and tokenizer", True),
        Col("query", "STRING", "The pair's query when it was scored", True),
        Col("product_id", "STRING", "The pair's product", True),
        Col("locale", "STRING", "The pair's locale", True),
        Col(P_COLUMNS[0], "DOUBLE", "Probability of label 4, given that the answer is a label; null unless scored"),
        Col(P_COLUMNS[1], "DOUBLE", "Probability of label 3, given that the answer is a label; null unless scored"),
        Col(P_COLUMNS[2], "DOUBLE", "Probability of label 2, given that the answer is a label; null unless scored"),
        Col(P_COLUMNS[3], "DOUBLE", "Probability of label 1, given that the answer is a label; null unless scored"),
        Col("p_outside", "DOUBLE", "Mass that the model gave to anything but the four labels, before renormalising"),
        Col("outcome", "STRING", "; ".join(f"{k}: {v}" for k, v in OUTCOMES.items()), True),
        Col("content_hash", "STRING", "content_hash of the pairs row that was scored; older text if it differs", True),
        Col("pairs_version", "BIGINT", "Delta version of pairs at which the row was read", True),
        Col("wave_id", "STRING", "The wave (one commit) that brought the row", True),
        Col("prompt_tokens", "INT", "Tokens of the prompt after the cuts", True),
        Col("tokens_cut", "INT", "Tokens of the pair's text that did not fit and were left out", True),
        Col("run_id", "STRING", "The run that scored it, in runs", True),
        Col("scored_at", "TIMESTAMP", "When the wave was merged", True),
    ),
    {
        "outcome_named": "outcome IN (" + ", ".join(f"'{o}'" for o in OUTCOMES) + ")",
        "p_iff_scored": f"(outcome = 'scored' AND {_ALL_IN_RANGE}) OR (outcome <> 'scored' AND {_ALL_NULL})",
        "p_sum": f"outcome <> 'scored' OR abs({_SUM} - 1) <= 1e-6",
    },
    # By product, as they change: by pair_id, a hash, the pairs of twenty products would lie in every file.
    cluster_by=("model_id", "locale", "product_id"),
)

CHAINS = Table(
    "chains",
    "A chain of reasoning for a judged pair of the train split, as a teacher wrote it",
    ("pair_id", "teacher"),
    (
        Col("pair_id", "STRING", "The judged pair", True),
        Col("teacher", "STRING", "model_id of the model that wrote it, or file", True),
        Col("label", "INT", "The human label, 4..1", True),
        Col("chain", "STRING", "The reasoning as it came, the closing statement included", True),
        Col("kept", "BOOLEAN", "Whether it may be taught: its own conclusion is the human label", True),
        Col("reason", "STRING", "; ".join(f"{k}: {v}" for k, v in DROPPED.items()) + "; null where it was kept"),
        Col("content_hash", "STRING", "content_hash of the pairs row that it is about; older text if it differs", True),
        Col("run_id", "STRING", "The run that brought it, in runs", True),
        Col("created_at", "TIMESTAMP", "When it was written", True),
    ),
    {
        "label_range": "label BETWEEN 1 AND 4",
        "reason_named": "reason IS NULL OR reason IN (" + ", ".join(f"'{r}'" for r in DROPPED) + ")",
        "kept_or_why": "kept = (reason IS NULL)",
    },
)

SAMPLES = Table(
    "samples",
    "One of the answers that a model was asked for, for a judged pair",
    ("pair_id", "model_id", "prompt_id", "run_id", "sample"),
    (
        Col("pair_id", "STRING", "The judged pair", True),
        Col("model_id", "STRING", "The model that answered", True),
        Col("prompt_id", "STRING", "The prompt it was asked with", True),
        Col("run_id", "STRING", "The run that drew it, in runs; a run that is continued keeps its id", True),
        Col("sample", "INT", "Number of the sample, from 0; the same number and seed draw the same answer", True),
        Col("label", "INT", "The answer's label, 4..1; null where the answer does not have the form of one"),
        Col("chain", "STRING", "The answer's reasoning", True),
        Col("gold", "INT", "The human label, 4..1", True),
        Col("correct", "BOOLEAN", "Whether label is the human label; an answer without a label is wrong", True),
        Col("conclusion", "INT", "The label that the chain concludes, its label and echoes masked; null: none"),
        Col("agrees", "BOOLEAN", "Whether the chain concludes the answer's own label", True),
        Col("entailed", "INT", "The label that the model gives to the chain's findings alone; null: not asked"),
        Col("tokens", "INT", "Tokens of the answer, its end included", True),
        Col("finished", "BOOLEAN", "Whether the answer ended by itself; else it was cut at the token limit", True),
        Col("split", "STRING", "The pair's part of gold: train, dev or test", True),
        Col("temperature", "DOUBLE", "How it was drawn; 1: from the model's own probabilities", True),
        Col("seed", "BIGINT", "Seed of the run", True),
        Col("content_hash", "STRING", "content_hash of the pairs row that was asked; older text if it differs", True),
        Col("created_at", "TIMESTAMP", "When the wave was written", True),
    ),
    {
        "label_range": "label IS NULL OR label BETWEEN 1 AND 4",
        "gold_range": "gold BETWEEN 1 AND 4",
        "correct_is_gold": "correct = (label IS NOT NULL AND label <=> gold)",
        "entailed_range": "entailed IS NULL OR entailed BETWEEN 1 AND 4",
        "agrees_is_conclusion": "agrees = (label IS NOT NULL AND label <=> conclusion)",
        "split_named": "split IN ('train', 'dev', 'test')",
    },
    cluster_by=("model_id", "pair_id"),
)

EXPLANATIONS = Table(
    "explanations",
    "The reasoning behind one label, written on request by the model that gave the label",
    ("pair_id", "model_id", "prompt_id"),
    (
        Col("pair_id", "STRING", "The judged pair", True),
        Col("model_id", "STRING", "The model", True),
        Col("prompt_id", "STRING", "The prompt it was asked with", True),
        Col("label", "INT", "The label that the scores chose, 4..1; the chain was continued from it", True),
        Col("label_source", "STRING", "How it was chosen: argmax, the likeliest label in label_probs", True),
        Col("chain", "STRING", "The reasoning", True),
        Col("conclusion", "INT", "The label that the chain concludes, its label and echoes masked; null: none"),
        Col(
            "contradicts",
            "BOOLEAN",
            "Whether the chain concludes another label than its own: do not trust either",
            True,
        ),
        Col("tokens", "INT", "Tokens of label and chain", True),
        Col("finished", "BOOLEAN", "Whether the chain ended by itself; else it was cut at the token limit", True),
        Col(
            "content_hash", "STRING", "content_hash of the pairs row that was explained; older text if it differs", True
        ),
        Col("run_id", "STRING", "The run that wrote it, in runs", True),
        Col("created_at", "TIMESTAMP", "When the wave was written", True),
    ),
    {
        "label_range": "label BETWEEN 1 AND 4",
        "contradicts_is_conclusion": "contradicts = (conclusion IS NOT NULL AND conclusion <> label)",
        "source_named": "label_source IN ('argmax')",
    },
)

MODELS = Table(
    "models",
    "A model that may score",
    ("model_id",),
    (
        Col("model_id", "STRING", "Hash of weights and configuration", True),
        Col("path", "STRING", "Folder it was last loaded from", True),
        Col("base", "STRING", "Architecture or base model"),
        Col("stage", "STRING", "base, sft, dpo, grpo, or external for a folder brought by the operator", True),
        Col("prompt_id", "STRING", "The prompt it was trained with; null: none, so any prompt may be tried"),
        Col("weights_hash", "STRING", "SHA-256 over the names and contents of the weight files", True),
        Col("parent_id", "STRING", "The model that it was trained from"),
        Col("metrics", "MAP<STRING,DOUBLE>", "What was measured of it, the first-use self check among them"),
        Col("created_at", "TIMESTAMP", "When it was registered", True),
        Col("data_hash", "STRING", "Hash of the rows that its stage was trained on; null: not trained here"),
        Col("config", "MAP<STRING,STRING>", "The stage's settings"),
        Col("trained_on", "ARRAY<STRING>", "Sources of gold whose train split it or a parent saw; null: none known"),
    ),
)

PREFERENCES = Table(
    "preferences",
    "A right answer of a model set against a wrong one, to the same judged pair of the train split",
    ("pair_id", "model_id", "prompt_id", "run_id", "chosen_sample", "rejected_sample"),
    (
        Col("pair_id", "STRING", "The judged pair", True),
        Col("model_id", "STRING", "The model that gave both answers", True),
        Col("prompt_id", "STRING", "The prompt it was asked with", True),
        Col("run_id", "STRING", "The run of sample that drew them", True),
        Col("chosen_sample", "INT", "Number of the right answer in samples", True),
        Col("rejected_sample", "INT", "Number of the wrong answer in samples", True),
        Col("label", "INT", "The human label, which is the right answer's, 4..1", True),
        Col("chosen_chain", "STRING", "The right answer's reasoning; it concludes the label", True),
        Col("rejected_label", "INT", "The wrong answer's label, 4..1", True),
        Col("rejected_chain", "STRING", "The wrong answer's reasoning", True),
        Col("created_at", "TIMESTAMP", "When it was built", True),
    ),
    {
        "label_range": "label BETWEEN 1 AND 4 AND rejected_label BETWEEN 1 AND 4",
        "right_against_wrong": "label <> rejected_label",
    },
)

QUARANTINE = Table(
    "quarantine",
    "An input row that was refused",
    ("source", "row_hash"),
    (
        Col("source", "STRING", "The source as named at ingest", True),
        Col("row_hash", "STRING", "SHA-256 of the row as it came and of its reason", True),
        Col("row", "STRING", "The row as it came; bytes that are not UTF-8 as \\xNN; cut where it is very long", True),
        Col("reason", "STRING", "Why it was refused, in a sentence", True),
        Col("file", "STRING", "The file it came from"),
        Col("line", "BIGINT", "Its line (or record) number in that file, from 1; null where the format has none"),
        Col("stage", "STRING", "The step that refused it", True),
        Col("seen_at", "TIMESTAMP", "When it was last seen", True),
    ),
)

RUNS = Table(
    "runs",
    "One run of one job",
    ("run_id",),
    (
        Col("run_id", "STRING", "Key: start time and a random part", True),
        Col("job", "STRING", "The command", True),
        Col(
            "status",
            "STRING",
            "running; done; stopped: ended early as asked (deadline, SIGTERM); failed; lost: killed without a word",
            True,
        ),
        Col("message", "STRING", "What it did, or why it failed, stopped or was refused, in a sentence"),
        Col("model_id", "STRING", "The model that scored"),
        Col("prompt_id", "STRING", "The prompt it was asked with"),
        Col("counts", "MAP<STRING,BIGINT>", "Rows by what became of them (seen, skipped, scored, refused, …)", True),
        Col("waves", "INT", "Commits of scored rows"),
        Col("prompt_tokens", "BIGINT", "Tokens asked: the sum of all prompts"),
        Col("computed_tokens", "BIGINT", "Tokens computed for the rows written; the rest came from the prefix cache"),
        Col("generated_tokens", "BIGINT", "Tokens the engine wrote: samples and explanations"),
        Col("trie_nodes", "BIGINT", "Nodes of the prompts' prefix trie: the least that any cache can compute"),
        Col("block_floor", "BIGINT", "The least that a cache of whole KV blocks can compute"),
        Col("tokens_cut", "BIGINT", "Tokens of text left out by budgets and the block cut"),
        Col("engine_seconds", "DOUBLE", "Seconds the engines were at work on the rows written, summed over engines"),
        Col("engine_loads", "INT", "Engines that rows came from; those that died before are in counts"),
        Col("p_outside", "DOUBLE", "Mean mass outside the four labels"),
        Col(
            "figures",
            "MAP<STRING,DOUBLE>",
            "What else was measured: seconds of wall time by what they went to (seconds_…), predictions, noise",
            True,
        ),
        Col("dtype", "STRING", "Number type the model ran in"),
        Col("engine_version", "STRING", "Engine and version"),
        Col("settings_hash", "STRING", "Hash of the engine's settings"),
        Col("started_at", "TIMESTAMP", "Start", True),
        Col("finished_at", "TIMESTAMP", "End; null while it runs"),
    ),
    {"status_named": "status IN ('running', 'done', 'stopped', 'failed', 'lost')"},
)

GATES = Table(
    "gates",
    "One thing that a run looked at before it called itself done; also where all was well",
    ("run_id", "name"),
    (
        Col("run_id", "STRING", "The run, in runs", True),
        Col("name", "STRING", "What was looked at", True),
        Col("level", "STRING", "ok; warn: look at it; fail: beyond what is allowed", True),
        Col("found", "DOUBLE", "What was found; null where there was nothing to measure"),
        Col("allowed", "DOUBLE", "The most that is allowed"),
        Col("note", "STRING", "What it means, in a sentence"),
    ),
    {"level_named": "level IN ('ok', 'warn', 'fail')"},
)

# Columns of pairs by which cuts may differ; the view `labels` names each.
SEGMENT_COLUMNS = ("locale", "category", "brand")

THRESHOLDS = Table(
    "thresholds",
    "One cut of one fitted version: a pair is of tier k or better where its cumulative probability c_k >= tau",
    ("version", "segment", "boundary"),
    (
        Col("version", "BIGINT", "The fitted version; all its rows are put into force and taken back together", True),
        Col("segment", "STRING", "Value of the column segment_by for which the cut holds; empty: all others", True),
        Col("boundary", "INT", "The tier that the cut opens: 4, 3 or 2", True),
        Col("tau", "DOUBLE", "The cut: the middle of the interval in which nothing better can be had", True),
        Col("optimal_low", "DOUBLE", "Lower end of that interval", True),
        Col("optimal_high", "DOUBLE", "Upper end of that interval, which belongs to it", True),
        Col("tau_low", "DOUBLE", "2.5 % of the spread of tau over refits on resampled queries; no confidence interval"),
        Col("tau_high", "DOUBLE", "97.5 % of that spread"),
        Col("segment_by", "STRING", "Column of pairs whose value is the segment; null: one cut for all"),
        Col(
            "temperature",
            "DOUBLE",
            "Probabilities are first raised to 1/temperature and made to sum to 1; 1: off",
            True,
        ),
        Col("rule", "STRING", "one: the same tau at all boundaries (the paper's); boundary: a tau for each", True),
        Col("objective", "STRING", "What was made best, with its constraints", True),
        Col(
            "value",
            "DOUBLE",
            "The objective on the rows of the fit (segment '': on all); to expect: measures",
            True,
        ),
        Col("n_gold", "BIGINT", "Judgements it was fitted on", True),
        Col("gold_sources", "ARRAY<STRING>", "Where these come from", True),
        Col("allow_train", "BOOLEAN", "Whether judgements the model was trained on were let in (overconfident)", True),
        Col("model_id", "STRING", "The model whose probabilities it cuts; promoted together with it", True),
        Col("prompt_id", "STRING", "The prompt that model is asked with", True),
        Col("engines", "ARRAY<STRING>", "Number type and engine of the runs that brought the probabilities", True),
        Col("run_id", "STRING", "The run that fitted it; its figures are in measures", True),
        Col("status", "STRING", "candidate, active, or retired", True),
        Col("fitted_at", "TIMESTAMP", "When it was fitted", True),
        Col("activated_at", "TIMESTAMP", "When it was last put into force"),
        Col("activated_by", "STRING", "Who put it into force last"),
        Col("reason", "STRING", "Why, in the words of who did"),
    ),
    {
        "boundary_range": "boundary IN (2, 3, 4)",
        "tau_range": "tau BETWEEN 0 AND 1 AND NOT isnan(tau)",
        "optimal_range": "optimal_low <= tau AND tau <= optimal_high",
        "temperature_range": "temperature BETWEEN 0.05 AND 20",
        "rule_named": "rule IN ('one', 'boundary')",
        "segment_by_named": "segment_by IS NULL OR segment_by IN ("
        + ", ".join(f"'{c}'" for c in SEGMENT_COLUMNS)
        + ")",
        "status_named": "status IN ('candidate', 'active', 'retired')",
        "active_since": "status = 'candidate' OR activated_at IS NOT NULL",
    },
    change_feed=True,
)

PUBLISHED_LABELS = Table(
    "published_labels",
    "The tier handed to the index; a row is rewritten only when its tier changes, so follow the change feed",
    ("pair_id",),
    (
        Col("pair_id", "STRING", "The pair", True),
        Col("query", "STRING", "The pair's query", True),
        Col("product_id", "STRING", "The pair's product", True),
        Col("locale", "STRING", "The pair's locale", True),
        Col("tier", "INT", "4 Excellent, 3 Related, 2 Mismatch, 1 Irrelevant", True),
        Col("tier_since_version", "BIGINT", "The version of thresholds that gave it this tier", True),
        Col("tier_since_model_id", "STRING", "The model that gave it this tier", True),
        Col("published_at", "TIMESTAMP", "When it got this tier", True),
    ),
    {"tier_range": "tier BETWEEN 1 AND 4"},
    cluster_by=("locale", "product_id"),
    change_feed=True,
)

MEASURES = Table(
    "measures",
    "One figure that a run measured on judged pairs",
    ("run_id", "cuts", "split", "segment", "measure"),
    (
        Col("run_id", "STRING", "The run", True),
        Col(
            "cuts",
            "STRING",
            "What cut: one, boundary, score (weighted score), argmax, raw, scaled, or one_by_…, boundary_by_…",
            True,
        ),
        Col(
            "split",
            "STRING",
            "out_of_fold, test, or fit: which judged pairs; probe: what a model that is to be fooled says",
            True,
        ),
        Col("segment", "STRING", "The segment, empty: all", True),
        Col(
            "measure",
            "STRING",
            "macro_f1, accuracy, kappa, cost, f1_…, precision_…, recall_…, log_loss, ece_…, guard_…, "
            "confusion_<label>_<tier>, …_minus_<cuts>, a requirement as it was written; of a probe flips_… and lift_…",
            True,
        ),
        Col("value", "DOUBLE", "The figure; null where it is not defined"),
        Col("low", "DOUBLE", "2.5 % of its bootstrap by query"),
        Col("high", "DOUBLE", "97.5 % of its bootstrap by query"),
        Col("n", "BIGINT", "Judgements it was measured on", True),
    ),
)

TABLES = {
    t.name: t
    for t in (
        PAIRS, GOLD, LABEL_PROBS, THRESHOLDS, PUBLISHED_LABELS, CHAINS, SAMPLES, PREFERENCES, EXPLANATIONS, MODELS,
        MEASURES, QUARANTINE, RUNS, GATES,
    )
}  # fmt: skip


def netstring(text: Column) -> Column:
    """One field in a hash: its length in bytes, a colon, the bytes; `-` for null. No two field lists collide."""
    return F.when(text.isNull(), F.lit("-")).otherwise(F.concat(F.octet_length(text), F.lit(":"), text))


def hash_fields(fields: Sequence[Column]) -> Column:
    """SHA-256, in hex, over the netstrings of the fields."""
    return F.sha2(F.concat(*[netstring(f) for f in fields]).cast("binary"), 256)


def pair_id(locale: Column, query: Column, product_id: Column) -> Column:
    """Key of a pair: hex of the first 16 bytes of SHA-256 over locale, query and product_id (see `netstring`)."""
    return F.substring(hash_fields([locale, query, product_id]), 1, 32)


def product_hash(title: Column, brand: Column, description: Column, attributes: Column, category: Column) -> Column:
    """Hash of a product's text. Attributes count in the order of their names, so that a re-ordered map is no change."""
    entries = F.array_sort(F.map_entries(attributes))
    packed = F.concat_ws("", F.transform(entries, lambda e: F.concat(netstring(e["key"]), netstring(e["value"]))))
    return hash_fields([title, brand, description, F.when(attributes.isNotNull(), packed), category])


def content_hash(product: Column, locale: Column, query: Column) -> Column:
    """Hash of all text of a pair, from the product's hash: what a model's judgement depends on."""
    return hash_fields([locale, query, product])
