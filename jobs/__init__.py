"""One file a command; listing the folder is reading the pipeline. What the commands share stands here: exit codes,
flags, and Spark over the tables with the model that was named."""

from __future__ import annotations

import argparse
import math
import os
import re
from collections.abc import Callable, Container
from datetime import datetime
from typing import NoReturn, TypeVar

from pyspark.errors import PySparkException
from pyspark.sql import DataFrame, SparkSession

from partitioner import engines, models, tiers
from schemas import delta, runs
from udfs.engine import STEP_ON_CPU, STEP_ON_GPU, EngineSettings, number_type
from udfs.model import inspect, manifest
from udfs.prompt import load as load_prompt
from udfs.score import Scoring

T = TypeVar("T")
# Exit codes: done, an error, a wrong flag or file, a gate failed, faults that did not go away, ended early as asked.
DONE, FAILED, USAGE, GATE_FAILED, GAVE_UP, STOPPED = range(6)
INTERRUPTED = 130  # as shells have it
began: datetime | None = None  # when the first of several jobs did: a time of day is meant from there on


class Parser(argparse.ArgumentParser):
    """Its errors are those of all else that is wrong before any work: a ValueError with a sentence."""

    def error(self, message: str) -> NoReturn:
        """Raises ValueError."""
        raise ValueError(f"{message}; see {self.prog} --help")


def parser(job: str, doc: str | None, tables_required: bool = True) -> Parser:
    """Of a job, whose module's docstring explains it; with the flag that all have. A flag is written out in full."""
    found = Parser(prog=job, description=doc, formatter_class=argparse.RawTextHelpFormatter, allow_abbrev=False)
    found.add_argument(
        "--tables", required=tables_required, type=_tables, metavar="T", help="root folder or URI of the tables"
    )
    return found


def _tables(text: str) -> str:
    try:
        return delta.root(text)
    except ValueError as error:  # of which argparse would tell nothing
        raise argparse.ArgumentTypeError(str(error)) from None


def at_least(least: int) -> Callable[[str], int]:
    """Type of a flag: a whole number that is no less."""

    def read(text: str) -> int:
        if not re.fullmatch(r"\d+", text) or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r}: a whole number is needed, at least {least}")
        return int(text)

    return read


positive = at_least(1)


def printable(text: str) -> str:
    """Text from data as a terminal may be shown it: what would move its cursor or set its title, as \\xNN."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda control: f"\\x{ord(control[0]):02x}", text)


def named(text: str) -> str:
    """Type of a flag: a name, not a blank, as a variable of the shell that is not set leaves."""
    if not text.strip():
        raise argparse.ArgumentTypeError("it is empty; name one")
    return text


def number(text: str) -> float:
    """Type of a flag: a number that is no less than 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r}: a number is needed, at least 0")
    return value


def above_zero(text: str) -> float:
    """Type of a flag: a number above 0."""
    if not (value := number(text)):
        raise argparse.ArgumentTypeError(f"{text!r}: a number above 0 is needed")
    return value


def seed(text: str) -> int:
    """Type of a flag: what draws the same again."""
    if (value := at_least(0)(text)) >= 2**31:
        raise argparse.ArgumentTypeError(f"{text!r}: allowed is 0 to {2**31 - 1}")
    return value


def share(text: str) -> float:
    """Type of a flag: a share, such as 0.2 or 20%."""
    try:
        value = float(text.rstrip("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no share: write 0.2 or 20%")
    return value


def some(text: str) -> float:
    """Type of a flag: a share above 0."""
    if not (value := share(text)):
        raise argparse.ArgumentTypeError(f"{text!r}: a share above 0 is needed")
    return value


def add_scoring_flags(parser: argparse.ArgumentParser, model_required: bool = True) -> None:
    """The flags that every job with an engine shares."""
    defaults = EngineSettings(model="")
    parser.add_argument(
        "--model",
        type=named,
        required=model_required,
        metavar="M",
        help="demo, a model folder or its URI, a registered model_id, or active: the model of the thresholds in force",
    )
    parser.add_argument(
        "--verify", default="quick", choices=("quick", "full"), help="full: each worker hashes the weights whole"
    )
    told = "prompt.json (default: the one beside the model's weights)"
    parser.add_argument("--prompt", type=named, metavar="FILE", help=told)
    parser.add_argument(
        "--dtype", default=defaults.dtype, choices=("auto", "bfloat16", "float16", "float32"),
        help="number type (default auto: the model's own, or float32 where this CPU has no instructions for bfloat16)",
    )  # fmt: skip
    parser.add_argument("--head", default="float32", choices=("float32", "model"), help="number type of the logits")
    parser.add_argument("--max-model-len", type=positive, default=defaults.max_model_len, help="tokens of a prompt")
    parser.add_argument("--kv-cache-gib", type=above_zero, default=defaults.kv_cache_gib, help="KV cache on CPU, GiB")
    parser.add_argument("--gpu-memory", type=some, default=defaults.gpu_memory, help="share of a GPU's memory")
    by_device = f"{STEP_ON_CPU[0]} on CPU, {STEP_ON_GPU[0]} on a GPU"
    told = f"pairs in one step of the engine ({by_device}; sample: 256)"
    parser.add_argument("--max-num-seqs", type=positive, default=defaults.max_num_seqs, help=told)
    by_device = f"{STEP_ON_GPU[1]} on a GPU, {STEP_ON_CPU[1]} on CPU"
    told = f"tokens in one step ({by_device}, at least --max-model-len there)"
    parser.add_argument("--max-num-batched-tokens", type=positive, default=defaults.max_num_batched_tokens, help=told)
    parser.add_argument("--tensor-parallel", type=positive, default=1, help="GPUs that hold one copy of the model")
    parser.add_argument("--hang-seconds", type=positive, default=defaults.hang_seconds, help="no answer so long: hung")


def scoring(args: argparse.Namespace, folder: str, stage: str) -> Scoring:
    """Looks at the model folder and reads the prompt, before Spark does any work. Raises ValueError with a sentence."""
    full = args.verify == "full"
    model = inspect(folder, full)
    source = args.prompt or model.prompt_file
    if source is None:
        raise ValueError(
            f"{folder} has no prompt.json and --prompt was not given; write one (demo/prompt.json is a template for "
            "ChatML models) and pass it with --prompt FILE"
        )
    if model.quantised_head and args.head == "float32":
        raise ValueError(f"{folder} has a quantised head, which the engine cannot run in float32; add --head model")
    files = manifest(model.path)
    if inspect(folder).model_id != model.model_id:  # or the rows of what came meanwhile would bear the old one's id
        raise ValueError(f"{folder} changed while it was looked at; start again when it is whole")
    settings = EngineSettings(
        model=model.source,
        manifest=files,
        weights_hash=model.weights_hash if full else None,
        dtype=number_type(args.dtype, engines.on_cpu()),
        fp32_head=args.head == "float32",
        max_model_len=min(args.max_model_len, model.max_positions),
        kv_cache_gib=args.kv_cache_gib,
        gpu_memory=args.gpu_memory,
        max_num_seqs=args.max_num_seqs,
        max_num_batched_tokens=args.max_num_batched_tokens,
        tensor_parallel=args.tensor_parallel,
        hang_seconds=args.hang_seconds,
    )
    prompt = load_prompt(source, model.tokenizer_json, model.vocab_size)
    if prompt.block % settings.block_size:
        print(
            f"prompt {prompt.prompt_id} cuts the first part at {prompt.block} tokens, but the engine's KV blocks are "
            f"of {settings.block_size}: pairs of a product will share less than they could",
            flush=True,
        )
    return Scoring(model, stage, prompt, settings)


def look_ahead(args: argparse.Namespace, made: Container[str] = ()) -> None:
    """Looks at each model that the flags name by its folder, but for folders that are yet to be `made`. Raises
    ValueError with a sentence."""
    asks_engine = hasattr(args, "verify")
    looks: list[tuple[str | None, Callable[[argparse.Namespace, str, str], object]]] = [
        (getattr(args, "model", None), scoring if asks_engine else lambda _, folder, __: inspect(folder)),
        *((name, scoring_beside) for name in getattr(args, "also", ())),
    ]
    for name, look in looks:
        if name is None or os.path.abspath(name) not in made:
            seen(argparse.Namespace(**{**vars(args), "model": name}), look)


def seen(args: argparse.Namespace, look: Callable[[argparse.Namespace, str, str], T]) -> T | None:
    """What `look` (flags, folder, stage) makes of a `--model` that is named by its folder; None for any other."""
    found = models.folder_of(args.model) if args.model not in (None, models.ACTIVE) else None
    return look(args, *found) if found else None


def scoring_beside(args: argparse.Namespace, folder: str, stage: str) -> Scoring:
    """A second model of a command, asked with the prompt beside its weights, or where there is none with `--prompt`."""
    own = inspect(folder).prompt_file
    return scoring(argparse.Namespace(**{**vars(args), "prompt": own or args.prompt}), folder, stage)


def in_force(spark: SparkSession, args: argparse.Namespace) -> Scoring:
    """The model and the prompt of the thresholds in force, whatever `--model` and `--prompt` name. Raises ValueError
    where that prompt is not to be found."""
    found = registered(spark, argparse.Namespace(**{**vars(args), "model": models.ACTIVE, "prompt": None}), scoring)
    models.refuse_other_prompt(spark, args.tables, found)
    return found


def opened(
    args: argparse.Namespace, job: str, look: Callable[[argparse.Namespace, str, str], T]
) -> tuple[SparkSession, T]:
    """Spark over the tables `--tables`, and what `look` (flags, folder, stage) made of `--model`.

    A model that is named by its folder is looked at before Spark starts, so that a wrong one costs no time.
    """
    ahead = seen(args, look)
    spark = delta.session(job)
    engines.watch(spark)
    engines.refuse_unfit(spark, args.tensor_parallel)
    delta.prepare(spark, args.tables)
    return spark, ahead or registered(spark, args, look)


def registered(spark: SparkSession, args: argparse.Namespace, look: Callable[[argparse.Namespace, str, str], T]) -> T:
    """What `look` (flags, folder, stage) makes of a `--model` that stands in the tables, or is the one in force; that
    one is asked with the prompt in force, of which the tables keep a copy, where `--prompt` names none."""
    if args.model not in (None, models.ACTIVE):
        return look(args, *models.registered_folder(spark, args.tables, args.model))
    model_id, prompt_id = models.in_force(spark, args.tables)
    prompt = args.prompt or models.kept_prompt(spark, args.tables, model_id, prompt_id)
    return look(
        argparse.Namespace(**{**vars(args), "prompt": prompt}),
        *models.registered_folder(spark, args.tables, model_id),
    )


def selected(spark: SparkSession, root: str, job: str, query: str, limit: int | None = None) -> DataFrame:
    """The pairs (pair_id) that the operator's `--pairs` selects, each once, in memory. As a subquery, so that only what
    reads is SQL here."""
    tiers.register(spark, root)
    try:
        found = spark.sql(f"SELECT pair_id FROM (\n{query.strip().rstrip(';')}\n)")  # noqa: S608
        ids: dict[str, None] = {}  # in the order of the query
        for row in found.toLocalIterator():
            ids[str(row["pair_id"])] = None
            if limit is not None and len(ids) > limit:
                break
    except PySparkException as error:
        raise ValueError(
            f"--pairs: {runs.in_a_line(error)} Wanted is one query that returns a column pair_id; "
            "explain --help has one that works"
        ) from error
    if not ids:
        raise ValueError('--pairs: the query selects no pair; look at it with: sql --tables T "…"')
    if limit is not None and len(ids) > limit:
        print(
            f"{job}: the query selects more than {limit:,} pairs; the first {limit:,} are taken (--limit)", flush=True
        )
    return spark.createDataFrame([(i,) for i in list(ids)[:limit]], "pair_id STRING")
