"""The training jobs on real Spark and Delta with a tiny real model: what they take, refuse, leave and register."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from jobs import ingest, sample, train_dpo, train_grpo, train_sft, write_chains
from partitioner import models as named
from schemas import delta, gold
from schemas.labels import NAMES
from tests.engines import load_fake
from tests.models import tiny_model
from tests.test_ingest import jsonl, pair
from udfs import adapter
from udfs.answer import form
from udfs.engine import EngineSettings, Sampling
from udfs.model import Model, inspect
from udfs.prompt import load
from udfs.score import Scoring


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_model(tmp_path_factory.mktemp("base") / "model"))


def test_a_training_has_its_folder_for_itself(tmp_path: Path) -> None:
    with (
        train_sft.alone_in(str(tmp_path)),
        pytest.raises(ValueError, match="another training is at work there"),
        train_sft.alone_in(str(tmp_path)),
    ):
        pass
    with train_sft.alone_in(str(tmp_path)):
        pass


def told(root: str, folder: Path) -> None:
    """Twelve judged pairs, eight of them of the train split."""
    rows = [pair(n, label=1 + n % 4, split="train" if n < 8 else "dev" if n < 10 else "test") for n in range(12)]
    ingest.main(["--tables", root, "--pairs", str(jsonl(folder / "pairs.jsonl", *rows)), "--source", "raters"])


def taught(root: str, folder: Path, first: int = 0) -> None:
    """The judged pairs, with chains for all, or for those from the `first` on."""
    told(root, folder)
    chains = [
        {"query": f"query {n}", "product_id": f"p{n}", "label": 1 + n % 4, "chain": f"Seen. So {NAMES[1 + n % 4]}."}
        for n in range(first, 12)
    ]
    write_chains.main(["--tables", root, "--chains", str(jsonl(folder / "chains.jsonl", *chains))])


LEAK = "also in dev or test, such as 'query 3'"


def leaking(spark: SparkSession, root: str, folder: Path) -> None:
    """A train query judged once more, in another spelling and locale, as one of test: ingest keeps it in train, but
    another writer of gold may not."""
    again = pair(70, label=4, split="test") | {"query": "QUERY  3", "locale": "de"}
    ingest.main(["--tables", root, "--pairs", str(jsonl(folder / "more.jsonl", again))])
    (new,) = delta.read(spark, root, "pairs").where("locale = 'de'").select("pair_id").collect()
    mine = F.col("pair_id") == new["pair_id"]
    assert [row["split"] for row in delta.read(spark, root, "gold").where(mine).collect()] == ["train"]
    delta.update(spark, root, "gold", mine, {"split": F.lit("test")})


def answered(spark: SparkSession, root: str, model: Model) -> None:
    """Sixteen answers to each train pair, from an engine that needs no model, in this model's name."""
    prompt = load(str(model.prompt_file), model.tokenizer_json, model.vocab_size)
    what = Scoring(model, "sft", prompt, EngineSettings(model=model.path, max_model_len=512), load_fake)
    made = form(model, prompt)
    sample.sample(spark, root, what, made, Sampling(40, made.end_ids, n=16, seed=3))


def models(spark: SparkSession, root: str) -> list[dict[str, Any]]:
    return [row.asDict() for row in delta.read(spark, root, "models").orderBy("created_at").collect()]


@pytest.mark.slow
def test_sft_sees_train_pairs_alone_and_registers_an_adapter_that_rescore_takes(
    spark: SparkSession, root: str, base: str, tmp_path: Path
) -> None:
    taught(root, tmp_path)
    out = tmp_path / "sft"
    flags = ["--tables", root, "--model", base, "--out", str(out), "--epochs", "1", "--rank", "4", "--accumulate", "1"]
    assert train_sft.main(flags) == 0
    pairs = {r["pair_id"]: r["query"] for r in delta.read(spark, root, "pairs").collect()}
    seen = {pairs[i] for i in pq.read_table(out / "data.parquet")["pair_id"].to_pylist()}
    assert seen == {f"query {n}" for n in range(8)}
    (row,) = models(spark, root)
    folder, _ = named.folder_of(str(out)) or ("", "")
    made = inspect(folder)
    assert (row["model_id"], row["stage"], row["parent_id"]) == (made.model_id, "sft", inspect(base).model_id)
    assert row["trained_on"] == ["raters"]
    assert {"loss", "label_accuracy"} <= row["metrics"].keys()
    assert (row["config"]["rank"], row["config"]["epochs"]) == ("4", "1.0")
    assert row["data_hash"] == json.loads((out / adapter.RECIPE).read_text())["data_hash"]
    assert named.registered_folder(spark, root, row["model_id"])[0] == folder
    assert (out / "log.html").stat().st_size > 10_000
    assert json.loads((out / adapter.RECIPE).read_text())["merged_hash"] == made.weights_hash
    assert sum(file.stat().st_size for file in out.glob("adapter*")) < 20 << 20

    # The same command once more finds all done and makes the same model.
    assert train_sft.main(flags) == 0
    assert [row["model_id"] for row in models(spark, root)] == [made.model_id]

    # The stages after it go on with the adapter, and say what is missing.
    onward = ["--tables", root, "--model", row["model_id"]]
    dpo = [*onward, "--out", str(tmp_path / "dpo"), "--epochs", "3"]  # three steps, of which the first moves nothing
    with pytest.raises(ValueError, match="has not answered any train pair yet; ask it: sample"):
        train_dpo.main(dpo)
    with pytest.raises(ValueError, match=r"--rank 8: .* is an adapter, which is trained on at its own rank"):
        train_dpo.main([*dpo, "--rank", "8"])
    answered(spark, root, made)
    assert train_dpo.main(dpo) == 0
    preferred = models(spark, root)[-1]
    assert (preferred["stage"], preferred["parent_id"]) == ("dpo", made.model_id)
    assert preferred["model_id"] != made.model_id
    assert (preferred["config"]["rank"], "balance" in preferred["config"]) == ("4", False)
    grpo = ["--steps", "2", "--groups", "2", "--group", "3", "--max-tokens", "8", "--refresh", "1"]
    assert train_grpo.main([*onward, "--out", str(tmp_path / "grpo"), *grpo]) == 0
    last = models(spark, root)[-1]
    assert (last["stage"], last["parent_id"], last["trained_on"]) == ("grpo", row["model_id"], ["raters"])
    assert last["prompt_id"] == row["prompt_id"]

    # What any stage read or wrote is of train queries alone.
    for name in ("chains", "samples", "preferences"):
        mine = {pairs[r["pair_id"]] for r in delta.read(spark, root, name).select("pair_id").collect()}
        assert mine
        assert mine <= seen, name
    asked = pq.read_table(tmp_path / "grpo" / "data.parquet").to_pylist()
    assert {pairs[r["pair_id"]] for r in asked} == seen
    assert any(r["rate"] is not None for r in asked)
    leaking(spark, root, tmp_path)
    with pytest.raises(ValueError, match=LEAK):
        answered(spark, root, made)


@pytest.mark.slow
def test_a_query_that_is_held_out_anywhere_stops_the_stage_before_it_begins(
    spark: SparkSession, root: str, base: str, tmp_path: Path
) -> None:
    taught(root, tmp_path)
    leaking(spark, root, tmp_path)
    with pytest.raises(ValueError, match=LEAK):
        train_sft.main(["--tables", root, "--model", base, "--out", str(tmp_path / "sft")])
    assert not (tmp_path / "sft").exists()
    # Nor does it get a chain.
    with pytest.raises(ValueError, match=LEAK):
        write_chains.main(["--tables", root, "--chains", str(tmp_path / "chains.jsonl")])


@pytest.mark.slow
def test_a_killed_training_goes_on_with_its_own_rows_and_not_with_what_is_held_out_by_now(
    spark: SparkSession,
    root: str,
    base: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    told(root, tmp_path)
    flags = ["--tables", root, "--epochs", "2", "--accumulate", "1", "--checkpoint-every", "1", "--labels-only"]
    flags += ["--model", base, "--out", str(tmp_path / "sft")]
    with monkeypatch.context() as patched:
        patched.setattr(train_sft, "leave", lambda *_: (_ for _ in ()).throw(RuntimeError("killed")))
        with pytest.raises(RuntimeError, match="killed"):
            train_sft.main(flags)
    began = pq.read_table(tmp_path / "sft" / "data.parquet")
    one = delta.read(spark, root, "pairs").where("query = 'query 1'").head()
    assert one
    mine = F.col("pair_id") == one["pair_id"]
    delta.update(spark, root, "gold", mine, {"split": F.lit("test")})
    with pytest.raises(ValueError, match="in dev or test now, such as 'query 1'; begin anew under another --out"):
        train_sft.main(flags)
    delta.update(spark, root, "gold", mine, {"split": F.lit("train"), "label": F.lit(4)})
    assert train_sft.main(flags) == 0
    assert "it goes on with those it began with" in capsys.readouterr().out
    assert pq.read_table(tmp_path / "sft" / "data.parquet").equals(began)
    with pytest.raises(ValueError, match="holds a training that differs in the rows"):
        train_sft.main(flags)
    # Nor does a later stage learn upon what is held out by now.
    delta.update(spark, root, "gold", mine, {"split": F.lit("test")})
    with pytest.raises(ValueError, match="in dev or test now, such as 'query 1'; start from a model that has not"):
        train_sft.main([*flags, "--model", str(tmp_path / "sft"), "--out", str(tmp_path / "more")])


def test_a_parent_is_what_its_recipe_says_also_where_it_is_named_by_a_uri(base: str, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "parent")
    adapter.write_recipe(str(tmp_path / "parent"), {"order": "pre", "trained_on": ["raters"]})
    for name in (str(tmp_path / "parent"), f"file://{tmp_path}/parent"):
        args = train_sft.flags().parse_args(["--tables", "t", "--model", name, "--out", str(tmp_path / "out")])
        lesson = train_sft.read_lesson(name, args)
        assert (lesson.form.order, lesson.trained_on) == ("pre", ("raters",))
        with pytest.raises(ValueError, match="was taught --order pre"):
            train_sft.read_lesson(name, args, "post")
    config = tmp_path / "parent" / "config.json"
    config.write_text(
        json.dumps(json.loads(config.read_text()) | {"architectures": ["Gemma3ForConditionalGeneration"]})
    )
    with pytest.raises(ValueError, match="which also takes images"):
        train_sft.read_lesson(str(tmp_path / "parent"), args)


@pytest.mark.slow
def test_without_chains_it_says_how_to_bring_them_and_teaches_labels_alone_where_asked(
    spark: SparkSession, root: str, base: str, tmp_path: Path
) -> None:
    flags = ["--tables", root, "--model", base, "--out", str(tmp_path / "sft"), "--epochs", "1", "--balance", "1"]
    with pytest.raises(ValueError, match=r"write_chains --tables .* or teach the labels alone: --labels-only"):
        train_sft.main(flags)
    with pytest.raises(ValueError, match="no judged train pair"):
        train_sft.main([*flags, "--labels-only"])
    with pytest.raises(ValueError, match="no chain that --order pre could put first"):
        train_sft.main([*flags, "--labels-only", "--order", "pre"])
    told(root, tmp_path)
    assert train_sft.main([*flags, "--labels-only"]) == 0
    rows = pq.read_table(tmp_path / "sft" / "data.parquet").to_pylist()
    assert len(rows) == 8
    assert {len(row["answer"]) for row in rows} == {2}  # the label and the end
    (made,) = models(spark, root)
    assert named.registered_folder(spark, root, made["model_id"])[0] == str(tmp_path / "sft" / "merged")


@pytest.mark.slow
def test_each_label_that_raters_gave_is_taught_by_its_share(
    spark: SparkSession, root: str, base: str, tmp_path: Path
) -> None:
    rows = [
        pair(0, label=4, rater_labels=[4, 4, 3], split="train"),
        pair(1, label=2, rater_labels=[2, 2, 2], split="train"),
        pair(2, label=1, split="train"),
        pair(3, label=4, rater_labels=[4, 3], split="test"),
    ]
    ingest.main(["--tables", root, "--pairs", str(jsonl(tmp_path / "pairs.jsonl", *rows)), "--source", "raters"])
    flags = ["--tables", root, "--model", base, "--out", str(tmp_path / "sft"), "--epochs", "1"]
    with pytest.raises(ValueError, match="it wants --labels-only"):
        train_sft.main([*flags, "--raters", "fractions"])
    assert train_sft.main([*flags, "--raters", "fractions", "--labels-only"]) == 0
    looked_at = inspect(base)
    answers = form(looked_at, load(looked_at.prompt_file or "", looked_at.tokenizer_json, looked_at.vocab_size))
    names = {row["pair_id"]: row["product_id"] for row in delta.read(spark, root, "pairs").collect()}
    told = [
        (names[row["pair_id"]], answers.read(row["answer"]).label, round(row["weight"], 6))
        for row in pq.read_table(tmp_path / "sft" / "data.parquet").to_pylist()
    ]
    assert sorted(told) == [("p0", 3, 0.333333), ("p0", 4, 0.666667), ("p1", 2, 1.0), ("p2", 1, 1.0)]
    # Two sources count alike, whatever the number of their raters, unless they are told to weigh otherwise.
    more = pair(0, label=3, rater_labels=[3], split="train")
    ingest.main(["--tables", root, "--pairs", str(jsonl(tmp_path / "more.jsonl", more)), "--source", "more"])
    votes = [row for row in gold.votes(spark, root).collect() if names[row["pair_id"]] == "p0"]
    assert {row["label"]: row["share"] for row in votes} == pytest.approx({4: 1 / 3, 3: 2 / 3})


@pytest.mark.slow
def test_a_limit_counts_the_pairs_that_can_be_learnt_from(
    spark: SparkSession, root: str, base: str, tmp_path: Path
) -> None:
    taught(root, tmp_path, first=4)
    flags = ["--tables", root, "--model", base, "--epochs", "1", "--limit", "3", "--out"]
    assert train_sft.main([*flags, str(tmp_path / "sft")]) == 0
    assert pq.read_table(tmp_path / "sft" / "data.parquet").num_rows == 3


@pytest.mark.slow
def test_a_judgement_teaches_as_much_as_it_counts(spark: SparkSession, root: str, base: str, tmp_path: Path) -> None:
    rows = [pair(0, label=4, split="train"), pair(1, label=2, split="train", gold_weight=0.25)]
    ingest.main(["--tables", root, "--pairs", str(jsonl(tmp_path / "pairs.jsonl", *rows))])
    flags = ["--tables", root, "--model", base, "--out", str(tmp_path / "sft"), "--epochs", "4", "--labels-only"]
    assert train_sft.main(flags) == 0
    assert sorted(pq.read_table(tmp_path / "sft" / "data.parquet")["weight"].to_pylist()) == [0.25, 1.0]
    more = pair(0, label=3, split="train", gold_weight=3)
    ingest.main(["--tables", root, "--pairs", str(jsonl(tmp_path / "more.jsonl", more)), "--source", "more"])
    names = {row["pair_id"]: row["product_id"] for row in delta.read(spark, root, "pairs").collect()}
    votes = [row for row in gold.votes(spark, root).collect() if names[row["pair_id"]] == "p0"]
    assert {row["label"]: row["share"] for row in votes} == {4: 0.25, 3: 0.75}
    # A model that is named by its id must be the one that lies there.
    (made,) = models(spark, root)
    shutil.rmtree(tmp_path / "sft")
    assert train_sft.main([*flags, "--seed", "5"]) == 0
    with pytest.raises(ValueError, match=f"--model {made['model_id']}: its folder .* holds another model now"):
        train_sft.main(
            ["--tables", root, "--model", made["model_id"], "--out", str(tmp_path / "more"), "--labels-only"]
        )


def test_a_training_writes_over_nothing_that_is_no_training_of_its_own(base: str, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "model.safetensors").touch()
    (tmp_path / "file").touch()
    for out, told in (
        (base, r"is the folder of --model"),
        (str(tmp_path / "other"), r"holds a model already \(model\.safetensors\) and no training"),
        (str(tmp_path / "file"), "is a file"),
        ("s3://bucket/sft", "a training writes to a folder"),
    ):
        with pytest.raises(ValueError, match=f"--out {out}.*{told}"):
            train_sft.main(["--tables", str(tmp_path / "t"), "--model", base, "--out", out])
    (tmp_path / "other" / "plan.json").touch()  # one that goes on
    train_sft.refuse_wrong_out(str(tmp_path / "other"), base)


@pytest.mark.parametrize(
    "flag",
    ["--epochs 0", "--epochs nan", "--learning-rate 0", "--learning-rate inf", "--label-weight -1", "--seed -1"],
)
def test_a_number_that_no_training_can_have_is_refused_before_any_work(flag: str, tmp_path: Path) -> None:
    name, value = flag.split()
    with pytest.raises(ValueError, match=f"argument {name}: '{value}'"):
        train_sft.main(["--tables", str(tmp_path), "--model", "m", "--out", str(tmp_path / "o"), name, value])


def test_a_whole_model_is_named_as_a_base_by_its_folder_whatever_it_was_called_by() -> None:
    assert train_sft.named_base("demo-base", "/cache/demo-model") == "demo-base"
    assert train_sft.named_base("0123456789abcdef", "/models/taosr1") == "/models/taosr1"
    assert train_sft.named_base("s3://bucket/taosr1", "s3://bucket/taosr1") == "s3://bucket/taosr1"
    assert train_sft.named_base("taosr1", "taosr1") == str(Path("taosr1").absolute())
