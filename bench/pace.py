"""The engine alone, without Spark: pairs a second by the size of a step, and how long the engine takes to load.

    python -m bench.pace [--model demo-base|tiny|4b|FOLDER] [--products 300] [--steps 128x2048 512x8192 …]

A log-shaped night (30 pairs a product, see bench.night) goes through an engine with each size of step, pairs x tokens,
in a process of its own. On a new kind of GPU this is where `--max-num-seqs` and `--max-num-batched-tokens` come from.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from bench.night import a_night, model_folder
from jobs.check import in_own_process, prompts
from partitioner import engines
from udfs.engine import STEP_ON_CPU, STEP_ON_GPU, EngineSettings, VllmEngine, number_type
from udfs.model import inspect
from udfs.prompt import load


def main() -> None:
    """Prints a line for each size of step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="demo-base", help="demo-base, tiny, 4b (random weights), a folder")
    parser.add_argument("--products", type=int, default=300)
    parser.add_argument("--steps", nargs="+", default=[f"{s}x{t}" for s, t in (STEP_ON_CPU, STEP_ON_GPU)])
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = model_folder(args.model, Path(folder))
        for step in args.steps:
            print(in_own_process(one, model, args.products, *map(int, step.split("x"))), flush=True)


def one(model: str, products: int, seqs: int, budget: int) -> str:
    """The night through one engine."""
    looked_at = inspect(model)
    prompt = load(looked_at.prompt_file or "", looked_at.tokenizer_json, looked_at.vocab_size)
    asked = sorted(prompts(prompt, a_night(products, "log")))
    began = time.monotonic()
    dtype = number_type("auto", engines.on_cpu())
    engine = VllmEngine(EngineSettings(model, dtype=dtype, max_num_seqs=seqs, max_num_batched_tokens=budget))
    loaded = time.monotonic()
    computed = sum(len(asked[a.index]) - a.cached for a in engine.answers(iter(asked), prompt.label_ids))
    seconds = time.monotonic() - loaded
    return (
        f"{engine.version}, {engine.dtype}, steps of {seqs} pairs and {budget:,} tokens: {len(asked) / seconds:,.0f} "
        f"pairs/s, {computed / seconds:,.0f} tokens/s computed ({computed / len(asked):.1f} a pair); "
        f"loaded in {loaded - began:.0f} s"
    )


if __name__ == "__main__":
    main()
