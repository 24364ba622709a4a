"""Says whether a model can score here, over these tables; with --parity, whether the engine computes what it should.

check --tables T [--model M] [--prompt FILE]     (without --model: the one in force)
check --parity --model M [--tables T] [--pairs 200]

Ready or blocked: one line a point, and where it is blocked the command that mends it; exit code 3 then. Parity scores
the same prompts twice: with Hugging Face transformers in float32, one by one and without any cache, the plain slow way;
and with the engine in float32. No probability may differ by more than 1e-3. The engine is then asked once more in
bfloat16, and that difference is printed. The pairs are those of T, or the demo catalogue's. Each of the three loads the
model in a process of its own, one after the other: two copies of a large model do not fit together.
"""

from __future__ import annotations

import argparse
import dataclasses
import getpass
import json
import os
import platform
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib import metadata
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

from pyspark.sql import SparkSession
from pyspark.sql import functions as F

import demo.catalogue
import jobs
from partitioner import engines, models
from schemas import delta, files, runs
from schemas.canonical import TEXTS
from schemas.tables import TABLES
from udfs import adapter, selfcheck
from udfs.decode import label_probs
from udfs.engine import EngineSettings, VllmEngine, number_type
from udfs.model import fetched
from udfs.prompt import Prompt, renderer
from udfs.render import product_text
from udfs.score import Scoring

JOB = "check"
ALLOWED = 1e-3  # |Δp| between engine and plain model, both in float32
SLOW_PAIRS = 20  # that are asked in bfloat16 too where this CPU has no instructions for it
LEAST_DISK = 2 * 2**30
_MEMORY = ("--query-gpu=memory.total,memory.free", "--format=csv,noheader,nounits")  # MiB
Prompts = list[list[int]]
T = TypeVar("T")


def flags() -> jobs.Parser:
    """The flags of this job."""
    parser = jobs.parser(JOB, __doc__, tables_required=False)
    parser.add_argument("--parity", action="store_true", help="compare the engine with the plain model")
    parser.add_argument(
        "--pairs", type=jobs.positive, default=200, metavar="N", help="compare on so many pairs (default 200)"
    )
    jobs.add_scoring_flags(parser, model_required=False)
    return parser


def main(argv: list[str]) -> int:
    """Returns 0 when ready (and in parity), 3 when blocked, or parity is broken."""
    args = flags().parse_args(argv)
    points, what = looked_at(args)
    for name, blocked, told in points:
        print(f"check: {'BLOCKED' if blocked else 'ok':<8} {name}: {told}", flush=True)
    count = sum(blocked for _, blocked, _ in points)
    print(f"check: blocked, {count} of {len(points)} points" if count else "check: ready", flush=True)
    if count or what is None:
        return jobs.GATE_FAILED
    if not args.parity:
        return jobs.DONE
    pairs = from_tables(args.tables, args.pairs) if args.tables else demo.catalogue.rows()
    # Evenly over all of them, so that every department and kind of query is there.
    pairs = pairs[:: max(1, len(pairs) // args.pairs)][: args.pairs]
    held = parity(what.settings, what.prompt, prompts(what.prompt, pairs))
    return jobs.DONE if held else jobs.GATE_FAILED


Point = tuple[str, bool, str]  # what, whether it is in the way, what was found and which command mends it


def looked_at(args: argparse.Namespace) -> tuple[list[Point], Scoring | None]:
    """All that a night needs, looked at one by one; and what would score, where that is in order."""
    spark, what = delta.session("check") if args.tables else None, None
    points: list[Point] = [("versions", *worker(spark, versions, alike=True)), ("device", *worker(spark, device))]
    opened = spark is not None
    if spark is not None:
        points += [(name, *found) for name, found in tables_of(spark, args.tables)]
        opened = ("storage", True) not in [point[:2] for point in points]
        try:
            engines.refuse_unfit(spark, args.tensor_parallel)
            points.append(("engines", False, f"{engines.count(spark)} can work at a time"))
        except ValueError as error:
            points.append(("engines", True, str(error)))
    try:
        active = args.model in (None, models.ACTIVE)
        found = None if active else models.folder_of(args.model)
        if found is None:
            if spark is None or not opened:
                mend = "which cannot be opened" if spark else "which were not named; add --tables T"
                raise ValueError(f"--model {args.model or 'active'} stands in the tables, {mend}")
            what = jobs.registered(spark, args, jobs.scoring)
        else:
            what = jobs.scoring(args, *found)
        told = (
            f"{what.model.model_id} ({what.model.architecture}), {what.model.vocab_size:,} tokens, no code, no pickle"
        )
        points.append(("model", False, told))
        points.append(("prompt", False, f"{what.prompt.prompt_id}, label tokens {what.prompt.label_ids}"))
        if not files.is_uri(what.model.source):  # each worker copies that one
            path, settings = what.model.path, what.settings
            points.append(("memory", *worker(spark, lambda: memory(path, settings))))
        if spark is not None and opened and delta.exists(spark, args.tables, "models"):
            models.refuse_foreign_prompt(spark, args.tables, what)
            if active:
                models.refuse_other_prompt(spark, args.tables, what)
        adapter.refuse_chain_first(what.model.path)
    except (ValueError, OSError) as error:
        points.append(("model and prompt", True, str(error)))
    return points, what


def worker(spark: SparkSession | None, look: Callable[[], tuple[bool, str]], alike: bool = False) -> tuple[bool, str]:
    """What is found where engines would run: on a cluster on each of its executors, else on this machine. `alike`: what
    differs from one to the other is in the way."""
    if spark is None or engines.is_local(spark):
        return look()
    count = engines.settled(spark)

    def look_there(_: int) -> tuple[bool, str, str]:
        time.sleep(0.5)  # so that no executor takes two
        return *look(), socket.gethostname()

    found = spark.sparkContext.parallelize(range(count), count).map(look_there).collect()
    hosts: dict[str, set[str]] = {}
    for _, told, host in found:
        hosts.setdefault(told, set()).add(host)
    blocked = any(wrong for wrong, _, _ in found)
    if len(hosts) == 1:
        return blocked, f"on {count} executor(s): {found[0][1]}"
    return blocked or alike, "; ".join(f"on {', '.join(sorted(on))}: {told}" for told, on in hosts.items())


def versions() -> tuple[bool, str]:
    """Whether the packages that compute are there."""
    found, missing = [f"Python {platform.python_version()}"], []
    for name in ("pyspark", "delta-spark", "pyarrow", "torch", "transformers"):
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            missing.append(name)
    if not (engine := engines.package()):
        missing.append("vllm")
    if missing:
        told = "install: make setup, or in another environment: pip install --no-deps -r requirements/cpu.txt (cuda.txt"
        return True, f"{', '.join(missing)} missing; {told} with a GPU)"
    return False, ", ".join([*found, engine])


def device() -> tuple[bool, str]:
    """GPUs, or the CPU, and whether the engine that is installed is made for it."""
    gpus = [line for line in nvidia_smi("-L") if line.startswith("GPU")]
    for_gpu = bool(engines.package()) and not engines.on_cpu()
    if gpus and not for_gpu:
        return True, f"{len(gpus)} GPU(s), but the engine is the one for CPUs; install: make ENGINE=cuda setup"
    if not gpus and for_gpu:
        return True, "no GPU, but the engine is the one for CUDA; on this machine install: make ENGINE=cpu setup"
    return False, f"{len(gpus)} GPU(s)" if gpus else f"no GPU, {os.cpu_count()} CPU cores"


def nvidia_smi(*words: str) -> list[str]:
    """What the driver's own tool says of the GPUs, line by line; nothing where there is none."""
    tool = shutil.which("nvidia-smi")
    return subprocess.run([tool, *words], capture_output=True, text=True).stdout.splitlines() if tool else []  # noqa: S603


def memory(folder: str, settings: EngineSettings) -> tuple[bool, str]:
    """Whether the weights fit: into the share of a GPU that an engine takes of each of its GPUs; where there is none,
    into this machine's memory, beside the KV cache."""
    tensor_parallel, share = settings.tensor_parallel, settings.gpu_memory
    weights = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
    if not weights:
        return True, f"the model's folder {folder} is not on this machine; copy it there, or give --model a URI"
    if gpus := [tuple(map(float, line.split(","))) for line in nvidia_smi(*_MEMORY) if line.count(",") == 1]:
        free_enough = [total for total, free in gpus if free >= share * total]
        each = weights / tensor_parallel / 2**20
        told = f"weights {each / 1024:,.2f} GiB a GPU, {len(free_enough)} of {len(gpus)} GPU(s) with {share:.0%} free"
        if len(free_enough) < tensor_parallel:
            return True, f"{told}, which an engine takes; end what is on the others (nvidia-smi), or --gpu-memory X"
        if each > (room := share * min(free_enough)):
            return True, f"{told}; spread it over several: --tensor-parallel {-int(-weights / 2**20 // room)}"
        return False, told
    if settings.dtype == "float32" and stored_in_16_bits(folder):
        weights *= 2
    free = available()
    told = (
        f"weights {weights / 2**30:,.2f} GiB in {settings.dtype}, KV cache {settings.kv_cache_gib:g} GiB, "
        f"{free / 2**30:,.1f} GiB of memory free here"
    )
    if weights * 1.2 + settings.kv_cache_gib * 2**30 > free:
        mend = "end what holds it (ps aux --sort=-rss), give a smaller --kv-cache-gib, or use a machine with more"
        return True, f"{told}; {mend}"
    return False, told


def stored_in_16_bits(folder: str) -> bool:
    """Whether a model's config.json says that its weights take two bytes each."""
    config = Path(folder) / "config.json"
    told = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
    return (told.get("dtype") or told.get("torch_dtype")) in ("bfloat16", "float16")


def available() -> int:
    """Bytes of memory that a new process can have: free, or the kernel's cache of files."""
    with open("/proc/meminfo", encoding="ascii") as file:
        (line,) = [line for line in file if line.startswith("MemAvailable:")]
    return int(line.split()[1]) * 1024


def tables_of(spark: SparkSession, root: str) -> Iterator[tuple[str, tuple[bool, str]]]:
    """Whether the tables can be written, have room, and fit this version of the project."""
    try:
        delta.refuse_silent_loss(spark, root)
        delta.try_to_write(spark, root)
        yield "storage", (False, f"{root} can be written")
    except Exception as error:  # whatever the storage throws
        user = f"this job runs as {getpass.getuser()}"
        yield "storage", (True, f"{root}: {runs.in_a_line(error)}; {user}: let it write there, or name other --tables")
        return
    local = files.local_path(root)
    if local and Path(local).exists():  # a plain path may be of HDFS
        free = shutil.disk_usage(local).free
        told = f"{free / 2**30:,.1f} GiB free; at least {LEAST_DISK / 2**30:.0f} is wanted"
        full = free < LEAST_DISK
        yield "disk", (full, f"{told}; free some: maintain --tables {root}" if full else told)
    there = [table for table in TABLES.values() if delta.exists(spark, root, table.name)]
    for table in there:
        if differences := delta.misfits(spark, root, table):
            yield f"table {table.name}", (True, "; ".join(differences))
    if not there:
        yield "tables", (True, f"there are none yet; make them: ingest --tables {root} --pairs FILE")
        return
    count = delta.read(spark, root, "pairs").count() if delta.exists(spark, root, "pairs") else 0
    yield "tables", (not count, f"{len(there)} of {len(TABLES)}, {count:,} pairs" + ("" if count else
        f"; bring some: ingest --tables {root} --pairs FILE"))  # fmt: skip


def from_tables(root: str, count: int) -> list[dict[str, Any]]:
    """Some pairs of the tables, always the same ones; Spark has ended when this returns."""
    spark = delta.session("check")
    chosen = delta.read(spark, root, "pairs").orderBy(F.xxhash64("pair_id")).limit(count).select("query", *TEXTS)
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
    if not asked:
        raise ValueError(f"all prompts are longer than --max-model-len {settings.max_model_len}; give a larger one")
    tokens = sum(map(len, asked))
    print(f"check: {len(asked)} pairs, {tokens:,} prompt tokens; the plain model first (slow) …", flush=True)
    plain = in_own_process(plain_model, settings.model, asked, prompt.label_ids)
    exact = dataclasses.replace(settings, dtype="float32", fp32_head=True)
    engine = in_own_process(engine_alone, exact, asked, prompt.label_ids)
    difference = selfcheck.largest_difference(plain, engine)
    agrees = difference <= ALLOWED
    print(f"check: float32 engine, plain model: max |Δp| {difference:.2e}, allowed {ALLOWED:.0e}", flush=True)
    if number_type(settings.dtype, engines.on_cpu()) == "float32":  # bfloat16 is several times slower here
        asked, plain = asked[:SLOW_PAIRS], plain[:SLOW_PAIRS]
    rough = dataclasses.replace(settings, dtype="bfloat16", fp32_head=True)
    found = in_own_process(engine_alone, rough, asked, prompt.label_ids)
    gaps = [abs(x - y) for a, b in zip(plain, found, strict=True) for x, y in zip(a, b, strict=True)]
    print(
        f"check: bfloat16 engine, plain model, {len(asked)} pairs: max |Δp| "
        f"{selfcheck.largest_difference(plain, found):.2e}, mean {sum(gaps) / len(gaps):.2e}"
    )
    print(f"check: parity {'holds' if agrees else 'is BROKEN: do not score with this engine and model'}")
    return agrees


def in_own_process(work: Callable[..., T], *arguments: Any) -> T:
    """Runs a function in a fresh process that ends with it, and with it the memory that the model took."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(work, *arguments).result()


def plain_model(folder: str, asked: Prompts, label_ids: Sequence[int]) -> list[list[float]]:
    """p of labels 4, 3, 2, 1 by transformers in float32: one prompt at a time, no batch, no cache."""
    import torch
    from transformers import AutoModelForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(
        fetched(folder), dtype=torch.float32, use_safetensors=True, local_files_only=True, trust_remote_code=False
    )
    model.to(device).eval()
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
