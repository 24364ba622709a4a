"""One night through the job and through bare vLLM: the same prompts, the same order, the same machine, in turns.

python -m bench.night [--model demo|tiny|FOLDER] [--products 100] [--pairs 30] [--rounds 3]

The night: products of the demo catalogue, each with the same number of queries drawn over all kinds. A round runs, each
in a process of its own, bare vLLM (`LLM.generate` on the job's prompts in the job's order), the same on prompts whose
product part is not cut at a block's boundary, and the whole rescore job on local Spark. Printed are pairs a second, the
job's ratio to bare vLLM, and the tokens computed against the trie's nodes and the block floor.

Engine start-up and one warm-up are left out on both sides. "engine" is the time the engine was at work, "waves" the
wall time of scoring, landing and merging, "job" all of it with planning, Delta and Spark's streaming.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import demo.catalogue
import demo.model


def main() -> None:
    """Runs the rounds and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="demo", help="demo, tiny (4 layers, 256 wide, random), a folder")
    parser.add_argument("--products", type=int, default=100)
    parser.add_argument("--pairs", type=int, default=30, help="pairs a product")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = model_folder(args.model, Path(folder))
        night = a_night(args.products, args.pairs)
        rounds = []
        for number in range(args.rounds):
            root = f"{folder}/tables-{number}"
            figures = apart(the_job, model, night, root)
            prompts = json.loads(Path(root, "prompts.json").read_text())
            figures["bare"] = apart(bare_vllm, model, prompts["aligned"])
            if not number:
                figures["unaligned"] = apart(bare_vllm, model, prompts["unaligned"])
            rounds.append(figures)
            print(f"round {number + 1}: {summary(figures, len(night))}", flush=True)
        report(rounds, len(night), args)


def model_folder(name: str, folder: Path) -> str:
    """The folder of a model; `tiny` is made here."""
    if name == "tiny":
        from tests.models import tiny_model

        return str(tiny_model(folder / "tiny", width=256, layers=4))
    return str(demo.model.demo_model()) if name == "demo" else name


def a_night(products: int, pairs: int) -> list[dict[str, Any]]:
    """`products` × `pairs` rows. Where the catalogue ends it begins again with a numbered title."""
    rows: list[dict[str, Any]] = [dict(row) for row in demo.catalogue.rows()]
    catalogue = list({row["product_id"]: row for row in rows}.values())
    queries = itertools.cycle(sorted({row["query"] for row in rows}))
    night = []
    for number in range(products):
        product = catalogue[number % len(catalogue)]
        edition = f" no. {number // len(catalogue) + 1}" if number >= len(catalogue) else ""
        text = {**product, "product_id": str(number), "title": product["title"] + edition}
        text.pop("label"), text.pop("split")
        night += [{**text, "query": query} for query in itertools.islice(queries, pairs)]
    return night


def apart(work: Any, *arguments: Any) -> dict[str, Any]:
    """Runs a function in a fresh process."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        found: dict[str, Any] = process.submit(work, *arguments).result()
    return found


def bare_vllm(model: str, prompts: list[list[int]]) -> dict[str, Any]:
    """Seconds that `LLM.generate` takes for all prompts, and the tokens it computed."""
    os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
    from vllm import LLM, SamplingParams

    from udfs.engine import EngineSettings

    settings = EngineSettings(model=model)
    llm: Any = LLM(
        model=model,
        skip_tokenizer_init=True,
        enforce_eager=True,
        block_size=settings.block_size,
        max_model_len=settings.max_model_len,
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=settings.max_num_batched_tokens,
        kv_cache_memory_bytes=int(settings.kv_cache_gib * 2**30),
        hf_overrides={"head_dtype": "float32"},
    )
    ask = SamplingParams(max_tokens=1, temperature=0.0, logprob_token_ids=[1, 2, 3, 4], detokenize=False)
    warm = [{"prompt_token_ids": ids} for ids in prompts[:256]]
    llm.generate(warm, ask, use_tqdm=False)
    llm.reset_prefix_cache()
    began = time.monotonic()
    answers = llm.generate([{"prompt_token_ids": ids} for ids in prompts], ask, use_tqdm=False)
    seconds = time.monotonic() - began
    computed = sum(len(a.prompt_token_ids) - (a.num_cached_tokens or 0) for a in answers)
    llm.llm_engine.engine_core.shutdown()  # its process would keep this one from ending
    return {"seconds": seconds, "computed": computed}


def the_job(model: str, night: list[dict[str, Any]], root: str) -> dict[str, Any]:
    """Ingests the night, warms the engine up on a few pairs, rescores the rest; writes the prompts it used."""
    from jobs import ingest, rescore
    from schemas import delta
    from udfs.engine import EngineSettings
    from udfs.model import inspect
    from udfs.prompt import load
    from udfs.render import rendered

    file = Path(f"{root}.jsonl")
    # Other texts than the night's, or its prefixes would be in the cache before it begins.
    warm = [{**row, "product_id": f"warm-{row['product_id']}", "title": f"Warm {row['title']}"} for row in night[:256]]
    looked_at = inspect(model)
    spec = json.loads(Path(looked_at.prompt_file or "").read_text())
    prompt = load(spec, looked_at.tokenizer_json, looked_at.vocab_size)
    what = rescore.Scoring(looked_at, "external", prompt, EngineSettings(model=model))
    seconds: dict[str, float] = {}
    for rows in (warm, night):
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        ingest.main(["--tables", root, "--pairs", str(file), "--source", "bench"])
        spark = delta.session("bench")
        timed = Timed(rescore.Waves.run_line)
        setattr(rescore.Waves, "run_line", timed.method)  # noqa: B010
        began = time.monotonic()
        run = rescore.rescore(spark, root, what)
        seconds = {"job": time.monotonic() - began, "waves": timed.seconds, "engine": run.engine_seconds or 0.0}
        setattr(rescore.Waves, "run_line", timed.inner)  # noqa: B010
    pairs = delta.read(spark, root, "pairs").where("product_id NOT LIKE 'warm-%'")
    unaligned = load({**spec, "block": 1}, looked_at.tokenizer_json, looked_at.vocab_size)
    prompts = {
        name: sorted(list(row["ids"]) for row in rendered(pairs, p).select("ids").collect())
        for name, p in (("aligned", prompt), ("unaligned", unaligned))
    }
    Path(root, "prompts.json").write_text(json.dumps(prompts))
    figures = {
        "prompt_tokens": run.prompt_tokens,
        "trie": run.trie_nodes,
        "floor": run.block_floor,
        "computed": run.computed_tokens,
        "loads": run.engine_loads,
        "dtype": run.dtype,
        **seconds,
    }
    spark.stop()
    return figures


class Timed:
    """A method that adds up how long it ran."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.seconds = inner, 0.0

        def method(*arguments: Any) -> Any:
            began = time.monotonic()
            try:
                return inner(*arguments)
            finally:
                self.seconds += time.monotonic() - began

        self.method = method


def summary(figures: dict[str, Any], pairs: int) -> str:
    """One round in a line."""
    seconds = {"bare": figures["bare"]["seconds"]} | {name: figures[name] for name in ("engine", "waves", "job")}
    return " · ".join(f"{name} {pairs / s:,.1f} pairs/s ({seconds['bare'] / s:.2f})" for name, s in seconds.items())


def report(rounds: list[dict[str, Any]], pairs: int, args: argparse.Namespace) -> None:
    """Medians over the rounds, and the token figures, which do not vary."""
    one = rounds[0]
    print(f"\n{args.model} ({one['dtype']}): {pairs:,} pairs, {args.pairs} a product, {args.rounds} rounds")
    for name in ("engine", "waves", "job"):
        ratios = sorted(r["bare"]["seconds"] / r[name] for r in rounds)
        print(f"  {name:<7} ÷ bare vLLM  median {statistics.median(ratios):.2f}  ({ratios[0]:.2f} to {ratios[-1]:.2f})")
    for name, tokens in (
        ("prompt", one["prompt_tokens"]),
        ("trie nodes", one["trie"]),
        ("block floor", one["floor"]),
        ("computed by the job", one["computed"]),
        ("bare vLLM, same prompts", one["bare"]["computed"]),
        ("bare vLLM, not aligned", one["unaligned"]["computed"]),
    ):
        print(
            f"  {name:<24} {tokens / pairs:7.1f} tokens a pair  {tokens / one['trie']:6.2f} × trie  "
            f"{tokens / one['floor']:6.3f} × block floor"
        )


if __name__ == "__main__":
    main()
