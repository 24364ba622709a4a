"""One night through the job and through bare vLLM: the same prompts, the same order, the same machine, in turns.

python -m bench.night [--model demo-base|tiny|4b|FOLDER] [--shape log|wands|esci] [--products 100] [--rounds 3]
                      [--kv-cache-gib 1] [--short] [--arrival] [--server] [--ray]

The night: products of the demo catalogue, each with some queries. Shapes: log, 30 pairs a product and queries by Zipf's
law; wands, 5 pairs a product and 480 a query; esci, 1.5 pairs a product. A round runs, each in a process of its own,
bare vLLM (`LLM.generate` on the job's prompts in the job's order, in one process with a thread a core), in the first
round also as vLLM comes and on prompts whose product part is not cut at a block's boundary, and the whole rescore job
on local Spark. --short leaves out the two of the first round. --arrival adds the job on pairs in the order they came
(without its plan), --server a vLLM API server on this machine that Spark tasks ask over HTTP, a pair a request, 128
at a time, --ray Ray Data's batch processor around one vLLM engine (ray[data] is not among the project's packages); both
get the pairs in the order they came.
Printed are pairs a second, ratios, and the tokens computed against the trie's nodes and the block floor.

Engine start-up and one warm-up are left out on all sides. "engine" is the time the engine was at work, "waves" the wall
time of scoring, landing and merging, "job" all of it with planning, Delta and Spark's streaming.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import demo.catalogue
import demo.model
from jobs.check import in_own_process

SHAPES = ("log", "wands", "esci")


def main() -> None:
    """Runs the rounds and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--model", default="demo-base", help="demo-base, tiny (4 layers, 256 wide, random), 4b, a folder"
    )
    parser.add_argument("--shape", default="log", choices=SHAPES)
    parser.add_argument("--products", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kv-cache-gib", type=float, default=1.0)
    parser.add_argument("--short", action="store_true", help="without vLLM as it comes and on uncut prompts")
    parser.add_argument("--arrival", action="store_true", help="also the job without its plan")
    parser.add_argument("--server", action="store_true", help="also Spark asking a vLLM API server")
    parser.add_argument("--ray", action="store_true", help="also Ray Data's batch processor")
    args = parser.parse_args()
    if args.ray and importlib.util.find_spec("ray") is None:
        parser.error('--ray wants Ray Data, which is not installed: .venv/bin/uv pip install "ray[data]"')
    with tempfile.TemporaryDirectory() as folder:
        model = model_folder(args.model, Path(folder))
        night = a_night(args.products, args.shape)
        rounds = []
        for number in range(args.rounds):
            root, cache = f"{folder}/tables-{number}", args.kv_cache_gib
            figures = told("job", len(night), the_job, model, night, root, cache)
            prompts = json.loads(Path(root, "prompts.json").read_text())
            peers: dict[str, tuple[Any, ...]] = {"bare": (bare_vllm, model, prompts["aligned"], cache)}
            if not number and not args.short:
                peers["as it comes"] = (bare_vllm, model, prompts["aligned"], cache, True)
                peers["unaligned"] = (bare_vllm, model, prompts["unaligned"], cache)
            if args.arrival:
                peers["arrival"] = (the_job, model, night, f"{root}-arrival", cache, True)
            if args.server:
                peers["server"] = (over_http, model, prompts["arrival"], cache)
            if args.ray:
                peers["ray"] = (by_ray, model, prompts["arrival"], cache)
            for name, asked in peers.items():
                figures[name] = told(name, len(night), *asked)
            rounds.append(figures)
            print(f"round {number + 1}: {summary(figures, len(night))}", flush=True)
        report(rounds, len(night), args)


def told(name: str, pairs: int, work: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """Runs one in a process of its own and prints its pace at once: a night may be cut off."""
    figures = in_own_process(work, *arguments)
    paces = {what: figures[what] for what in ("seconds", "engine", "waves", "job") if what in figures}
    print(f"{name}: " + ", ".join(f"{what} {pairs / s:,.1f} pairs/s" for what, s in paces.items()), flush=True)
    return figures


def model_folder(name: str, folder: Path) -> str:
    """The folder of a model; `tiny` and `4b` are made here, with random weights: the pace does not depend on them."""
    if name == "tiny":
        from tests.models import tiny_model

        return str(tiny_model(folder / "tiny", width=256, layers=4))
    if name == "4b":
        return in_own_process(model_of_4b, str(folder / "4b"))
    return str(demo.model.demo_model()) if name == "demo-base" else name


def model_of_4b(folder: str) -> str:
    """Writes a model of Qwen3-4B's shape, 8 GB, with the demo's tokenizer and prompt."""
    import shutil

    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=151_936,
        hidden_size=2560,
        intermediate_size=9728,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=True,
        dtype="bfloat16",
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model: Any = Qwen3ForCausalLM(config)
    model.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json", "prompt.json"):
        shutil.copy(demo.model.demo_model() / file, folder)
    return folder


def a_night(products: int, shape: str) -> list[dict[str, Any]]:
    """The pairs of `products` products. Where the catalogue ends it begins again with a numbered title."""
    rows: list[dict[str, Any]] = [dict(row) for row in demo.catalogue.rows()]
    catalogue = list({row["product_id"]: row for row in rows}.values())
    queries = sorted({row["query"] for row in rows})
    random_ = random.Random(products)  # noqa: S311 (a made-up night)
    if shape == "wands":
        queries = random_.sample(queries, max(5, 5 * products // 480))
    odds = [1 / (n + 1) if shape == "log" else 1.0 for n in range(len(queries))]
    night = []
    for number in range(products):
        product = catalogue[number % len(catalogue)]
        edition = f" no. {number // len(catalogue) + 1}" if number >= len(catalogue) else ""
        text = {**product, "product_id": str(number), "title": product["title"] + edition}
        text.pop("label"), text.pop("split")
        pairs = {"log": 30, "wands": 5, "esci": 1 + number % 2}[shape]
        chosen: set[str] = set()
        while len(chosen) < pairs:
            chosen |= set(random_.choices(queries, odds, k=pairs - len(chosen)))
        night += [{**text, "query": query} for query in sorted(chosen)]
    random_.shuffle(night)
    return night


def bare_vllm(model: str, prompts: list[list[int]], cache: float, as_it_comes: bool = False) -> dict[str, Any]:
    """Seconds that `LLM.generate` takes for all prompts, and the tokens it computed.

    At its best, in this process with a thread a core; or as it comes, in processes of its own, with one core left to
    its scheduler.
    """
    os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
    if not as_it_comes:
        from udfs.engine import take_cores, threads_of_machine

        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        take_cores(threads_of_machine())
    from vllm import LLM, SamplingParams

    llm: Any = LLM(model=model, **as_the_job(model, cache))
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


def as_the_job(model: str, cache: float) -> dict[str, Any]:
    """What the job's engine is told, for peers."""
    from vllm.platforms import current_platform

    from udfs.engine import EngineSettings, number_type, vllm_arguments

    on_cpu = current_platform.is_cpu()
    settings = EngineSettings(model=model, dtype=number_type("auto", on_cpu), kv_cache_gib=cache)
    # What the job tells by a function, which no command line takes.
    return vllm_arguments(settings, on_cpu) | {"hf_overrides": {"head_dtype": "float32"}}


def over_http(model: str, prompts: list[list[int]], cache: float) -> dict[str, Any]:
    """Seconds that Spark's tasks take to ask an API server on this machine, each pair in a request of its own."""
    import subprocess
    import urllib.request

    from schemas import delta

    port, served = 18_765, "model"
    words = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--port", str(port)]
    words += ["--host", "127.0.0.1", "--served-model-name", served]
    for name, value in as_the_job(model, cache).items():
        if name != "skip_tokenizer_init":  # a server tells tokens as text
            flag = ("--no-" if value is False else "--") + name.replace("_", "-")
            words.append(flag)
            if not isinstance(value, bool):
                words.append(value if isinstance(value, str) else json.dumps(value))
    environment = {**os.environ, "VLLM_LOGGING_LEVEL": "ERROR"}
    with open(f"{tempfile.gettempdir()}/bench-server.log", "wb") as log:
        server = subprocess.Popen([*words, "--disable-uvicorn-access-log"], env=environment, stdout=log, stderr=log)  # noqa: S603
    try:
        for _ in range(300):
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            if server.poll() is not None:
                raise RuntimeError(f"the server ended, see {log.name}")
            time.sleep(1)
        ask = asker(f"http://127.0.0.1:{port}/v1/completions", served)
        spark = delta.session("bench")
        warm = spark.createDataFrame([(ids[::-1],) for ids in prompts[:256]], "ids ARRAY<INT>").repartition(2)
        warm.mapInPandas(ask, "p DOUBLE").collect()
        asked = spark.createDataFrame([(ids,) for ids in prompts], "ids ARRAY<INT>").repartition(2).localCheckpoint()
        began = time.monotonic()
        answered = asked.mapInPandas(ask, "p DOUBLE").count()
        seconds = time.monotonic() - began
        spark.stop()
    finally:
        server.terminate()
        server.wait()
    if answered != len(prompts):
        raise RuntimeError(f"{answered} of {len(prompts)} answers came")
    return {"seconds": seconds}


def asker(url: str, model: str) -> Any:
    """What a task does: 64 requests at a time (there are two tasks), each for one token and its log-probabilities."""

    def ask(frames: Any) -> Any:
        import pandas as pd
        import requests

        session = requests.Session()
        session.mount("http://", requests.adapters.HTTPAdapter(pool_maxsize=64))

        def one(ids: Any) -> float:
            body: Any = {
                "model": model,
                "prompt": [int(i) for i in ids],
                "max_tokens": 1,
                "temperature": 0,
                "logprobs": 5,
            }
            answer = session.post(url, json=body, timeout=600)
            answer.raise_for_status()
            return float(answer.json()["choices"][0]["logprobs"]["token_logprobs"][0])

        with ThreadPoolExecutor(64) as pool:
            for frame in frames:
                yield pd.DataFrame({"p": list(pool.map(one, frame["ids"]))})

    return ask


def by_ray(model: str, prompts: list[list[int]], cache: float) -> dict[str, Any]:
    """Seconds from the first request's arrival in the engine of Ray Data's batch processor to the last row's return."""
    # It calls home unless told not to; its workers take the packages of this process.
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "VLLM_LOGGING_LEVEL": "ERROR"}
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    ray: Any = importlib.import_module("ray")
    llm: Any = importlib.import_module("ray.data.llm")
    ray.init(include_dashboard=False, log_to_driver=False, _node_ip_address="127.0.0.1", object_store_memory=2**30)
    ray.data.DataContext.get_current().enable_progress_bars = False
    config = llm.vLLMEngineProcessorConfig(
        model_source=model,
        engine_kwargs=as_the_job(model, cache) | {"disable_log_stats": False},  # else no answer tells when it arrived
        batch_size=256,
        concurrency=1,
        log_engine_metrics=False,
        placement_group_config={"bundles": [{"CPU": 1}]},  # no GPU
        **{f"{name}_stage": {"enabled": False} for name in ("chat_template", "tokenize", "detokenize")},
    )
    ask = {"max_tokens": 1, "temperature": 0.0, "logprobs": 5, "detokenize": False}
    process = llm.build_processor(
        config,
        preprocess=lambda row: {"tokenized_prompt": row["ids"], "sampling_params": ask, "warm": row["warm"]},
        postprocess=lambda row: {"arrived": row["metrics"]["arrival_time"], "warm": row["warm"]},
    )
    warm = [{"ids": ids[::-1], "warm": True} for ids in prompts[:256]]
    rows = ray.data.from_items([*warm, *({"ids": ids, "warm": False} for ids in prompts)])
    answered = [row["arrived"] for row in process(rows).iter_rows() if not row["warm"]]
    seconds = time.time() - min(answered)
    ray.shutdown()
    if len(answered) != len(prompts):
        raise RuntimeError(f"{len(answered)} of {len(prompts)} answers came")
    return {"seconds": seconds}


def the_job(model: str, night: list[dict[str, Any]], root: str, cache: float, arrival: bool = False) -> dict[str, Any]:
    """Ingests the night, warms the engine up on a few pairs, rescores the rest; writes the prompts it used.

    arrival: the line is in the order in which pairs came, not sorted by prefix.
    """
    from pyspark.sql import functions as F

    from jobs import ingest, rescore
    from partitioner import engines, prefix, waves
    from schemas import delta
    from udfs.engine import EngineSettings, number_type
    from udfs.model import inspect
    from udfs.prompt import load
    from udfs.render import rendered
    from udfs.score import Scoring

    file = Path(f"{root}.jsonl")
    # Other texts than the night's, or its prefixes would be in the cache before it begins.
    warm = [{**row, "product_id": f"warm-{row['product_id']}", "title": f"Warm {row['title']}"} for row in night[:256]]
    looked_at = inspect(model)
    spec = json.loads(Path(looked_at.prompt_file or "").read_text())
    prompt = load(spec, looked_at.tokenizer_json, looked_at.vocab_size)
    settings = EngineSettings(model=model, dtype=number_type("auto", engines.on_cpu()), kv_cache_gib=cache)
    what = Scoring(looked_at, "external", prompt, settings)
    if arrival:
        lined_up = prefix.lined_up

        def as_they_came(rows: Any, parts: int, block: int) -> Any:
            order = F.substring(F.conv(F.substring("pair_id", 1, 7), 16, 10), 1, 12).cast("int")
            return lined_up(rows.withColumn("portion", order), parts, block)

        setattr(prefix, "lined_up", as_they_came)  # noqa: B010
    seconds: dict[str, float] = {}
    for rows in (warm, night):
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        ingest.main(["--tables", root, "--pairs", str(file), "--source", "bench"])
        spark = delta.session("bench")
        timed = Timed(waves.Waves.run_line)
        setattr(waves.Waves, "run_line", timed.method)  # noqa: B010
        began = time.monotonic()
        run = rescore.rescore(spark, root, what)
        # The first pass loaded the engine; where it was lost meanwhile, loading is no pace either.
        loading = run.figures.get("seconds_startup", 0.0)
        seconds = {"job": time.monotonic() - began - loading, "waves": timed.seconds - loading}
        seconds["engine"] = run.engine_seconds or 0.0
        setattr(waves.Waves, "run_line", timed.inner)  # noqa: B010
    pairs = delta.read(spark, root, "pairs").where("product_id NOT LIKE 'warm-%'")
    unaligned = load({**spec, "block": 1}, looked_at.tokenizer_json, looked_at.vocab_size)
    prompts = {
        name: sorted(list(row["ids"]) for row in rendered(pairs, p).select("ids").collect())
        for name, p in (("aligned", prompt), ("unaligned", unaligned))
    }
    prompts["arrival"] = random.Random(0).sample(prompts["aligned"], len(prompts["aligned"]))  # noqa: S311
    Path(root, "prompts.json").write_text(json.dumps(prompts))
    figures = {
        "prompt_tokens": run.prompt_tokens,
        "trie": run.trie_nodes,
        "floor": run.block_floor,
        "computed": run.computed_tokens,
        "loads": run.engine_loads,
        "dtype": run.dtype,
        "split": {name: value for name, value in run.figures.items() if name.startswith("seconds_")},
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
    if "arrival" in figures:
        seconds["arrival"] = figures["arrival"]["job"]
    seconds |= {peer: figures[peer]["seconds"] for peer in ("server", "ray") if peer in figures}
    return " · ".join(f"{name} {pairs / s:,.1f} pairs/s ({seconds['bare'] / s:.2f})" for name, s in seconds.items())


def report(rounds: list[dict[str, Any]], pairs: int, args: argparse.Namespace) -> None:
    """Medians over the rounds, and the token figures, which do not vary."""
    one = rounds[0]
    print(f"\n{args.model} ({one['dtype']}), {args.shape}: {pairs:,} pairs of {args.products:,} products")
    for name in ("engine", "waves", "job"):
        ratios = sorted(r["bare"]["seconds"] / r[name] for r in rounds)
        print(f"  {name:<7} ÷ bare vLLM  median {statistics.median(ratios):.2f}  ({ratios[0]:.2f} to {ratios[-1]:.2f})")
    if "as it comes" in one:
        best, plain = one["bare"]["seconds"], one["as it comes"]["seconds"]
        print(f"  bare vLLM ÷ as it comes, in a process of its own: {plain / best:.2f}")
    for peer in ("arrival", "server", "ray"):
        if peer in one:
            took = [r[peer].get("job", r[peer].get("seconds")) for r in rounds]
            ratios = sorted(other / r["job"] for other, r in zip(took, rounds, strict=True))
            print(f"  job ÷ {peer:<12} median {statistics.median(ratios):.2f}  ({ratios[0]:.2f} to {ratios[-1]:.2f})")
    split = {
        name.removeprefix("seconds_"): statistics.median(r["split"][name] for r in rounds) for name in one["split"]
    }
    print("  the job's seconds: " + ", ".join(f"{name} {seconds:.1f}" for name, seconds in sorted(split.items())))
    for name, tokens in (
        ("prompt", one["prompt_tokens"]),
        ("trie nodes", one["trie"]),
        ("block floor", one["floor"]),
        ("computed by the job", one["computed"]),
        ("bare vLLM, same prompts", one["bare"]["computed"]),
        *([("bare vLLM, not aligned", one["unaligned"]["computed"])] if "unaligned" in one else []),
        *([("in order of arrival", one["arrival"]["computed"])] if "arrival" in one else []),
    ):
        print(
            f"  {name:<24} {tokens / pairs:7.1f} tokens a pair  {tokens / one['trie']:6.2f} × trie  "
            f"{tokens / one['floor']:6.3f} × block floor"
        )


if __name__ == "__main__":
    main()
