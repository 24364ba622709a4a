"""Says whether a model can score here; with --parity, whether the engine computes what the plain model computes.

check --model M [--prompt FILE]
check --parity --model M [--tables T] [--pairs 200]

Parity scores the same prompts twice: with Hugging Face transformers in float32, one by one and without any cache, the
plain slow way; and with the engine in float32. No probability may differ by more than 1e-3. The engine is then asked
once more in bfloat16, and that difference is printed. The pairs are those of T, or the demo catalogue's. Each of the
three loads the model in a process of its own, one after the other: two copies of a large model do not fit together.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

from pyspark.sql import functions as F

import demo.catalogue
from jobs import rescore
from schemas import delta
from udfs import selfcheck
from udfs.decode import label_probs
from udfs.engine import EngineSettings, VllmEngine
from udfs.prompt import Prompt, renderer
from udfs.render import PRODUCT_TEXT, product_text

ALLOWED = 1e-3  # |Δp| between engine and plain model, both in float32
Prompts = list[list[int]]


def main(argv: list[str]) -> int:
    """Returns 0 when ready (and in parity), 3 when parity is broken."""
    parser = argparse.ArgumentParser(prog="check", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--parity", action="store_true", help="compare the engine with the plain model")
    parser.add_argument("--tables", type=delta.root, metavar="T", help="take the pairs from these tables")
    parser.add_argument("--pairs", type=int, default=200, metavar="N", help="compare on so many pairs (default 200)")
    rescore.add_scoring_flags(parser)
    args = parser.parse_args(argv)
    if args.pairs < 1:
        raise ValueError(f"--pairs {args.pairs}: at least 1 pair is needed")
    found = rescore.model_folder(args.model)
    if found is None:
        if not args.tables:
            raise ValueError(f"--model {args.model} looks like a model_id; add --tables T, where it is registered")
        spark = delta.session("check")
        found = rescore.registered_folder(spark, args.tables, args.model)
    what = rescore.scoring(args, *found)
    print(
        f"check: model {what.model.model_id} ({what.model.architecture}) and prompt {what.prompt.prompt_id} fit: "
        f"label tokens {what.prompt.label_ids}, vocabulary {what.model.vocab_size:,}, no code, no pickle"
    )
    if not args.parity:
        return 0
    pairs = from_tables(args.tables, args.pairs) if args.tables else demo.catalogue.rows()
    # Evenly over all of them, so that every department and kind of query is there.
    pairs = pairs[:: max(1, len(pairs) // args.pairs)][: args.pairs]
    return 0 if parity(what.settings, what.prompt, prompts(what.prompt, pairs)) else 3


def from_tables(root: str, count: int) -> list[dict[str, Any]]:
    """Some pairs of the tables, always the same ones; Spark has ended when this returns."""
    spark = delta.session("check")
    chosen = delta.read(spark, root, "pairs").orderBy(F.xxhash64("pair_id")).limit(count).select("query", *PRODUCT_TEXT)
    pairs = [row.asDict() for row in chosen.collect()]
    spark.stop()
    if not pairs:
        raise ValueError(f"there are no pairs in {root!r}; bring some: ingest --tables {root} --pairs FILE")
    return pairs


def prompts(prompt: Prompt, pairs: Sequence[dict[str, Any]]) -> Prompts:
    """The pairs' prompts as token ids."""
    render = renderer(prompt)
    return [render.join(render.product(**product_text(pair)), render.query(pair["query"])) for pair in pairs]


def parity(settings: EngineSettings, prompt: Prompt, asked: Prompts) -> bool:
    """Prints the largest differences; whether float32 agrees within `ALLOWED`."""
    asked = [ids for ids in asked if len(ids) < settings.max_model_len]
    tokens = sum(map(len, asked))
    print(f"check: {len(asked)} pairs, {tokens:,} prompt tokens; the plain model first (slow) …", flush=True)
    plain = in_own_process(plain_model, settings.model, asked, prompt.label_ids)
    exact = dataclasses.replace(settings, dtype="float32", fp32_head=True)
    engine = in_own_process(engine_alone, exact, asked, prompt.label_ids)
    difference = selfcheck.largest_difference(plain, engine)
    agrees = difference <= ALLOWED
    print(f"check: float32 engine, plain model: max |Δp| {difference:.2e}, allowed {ALLOWED:.0e}", flush=True)
    rough = in_own_process(
        engine_alone, dataclasses.replace(settings, dtype="bfloat16", fp32_head=True), asked, prompt.label_ids
    )
    gaps = [abs(x - y) for a, b in zip(plain, rough, strict=True) for x, y in zip(a, b, strict=True)]
    print(
        f"check: bfloat16 engine, plain model: max |Δp| {selfcheck.largest_difference(plain, rough):.2e}, "
        f"mean {sum(gaps) / len(gaps):.2e}"
    )
    print(f"check: parity {'holds' if agrees else 'is BROKEN: do not score with this engine and model'}")
    return agrees


def in_own_process(work: Any, *arguments: Any) -> list[list[float]]:
    """Runs a function in a fresh process that ends with it, and with it the memory that the model took."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        found: list[list[float]] = process.submit(work, *arguments).result()
    return found


def plain_model(folder: str, asked: Prompts, label_ids: Sequence[int]) -> list[list[float]]:
    """p of labels 4, 3, 2, 1 by transformers in float32: one prompt at a time, no batch, no cache."""
    import torch
    from transformers import AutoModelForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, use_safetensors=True, local_files_only=True, trust_remote_code=False
    )
    model.to(device).eval()  # type: ignore[arg-type]
    found = []
    with torch.inference_mode():
        for ids in asked:
            logits = model(torch.tensor([ids], device=device), use_cache=False, logits_to_keep=1).logits[0, -1]
            logprobs = torch.log_softmax(logits.double(), dim=-1)[list(label_ids)].tolist()
            found.append(list(label_probs(logprobs).p or [float("nan")] * 4))
    return found


def engine_alone(settings: EngineSettings, asked: Prompts, label_ids: Sequence[int]) -> list[list[float]]:
    """p of labels 4, 3, 2, 1 by the engine, batched and cached as in a night."""
    return selfcheck.probabilities(VllmEngine(settings), asked, label_ids)
