"""The engine: vLLM, loaded once per worker process, fed with token ids, asked for label log-probabilities or for text.

This is the only file that imports vllm. The engine runs inside the Spark worker's own process, not in a child: when the
worker dies the engine is gone with it, and when the engine dies so does the worker, so a task that Spark tries again
always meets a fresh one. (vLLM's usual child process outlives a killed parent and keeps its memory; and a killed child
leaves the caller waiting for ever.) Only an engine over several GPUs has children, one a GPU; udfs/leash.py ends them
with the worker. Against a hang, `Watchdog` ends the process from a thread of C code that needs neither Python's lock
nor a living engine; and against one whose threads are all stopped, `watched` from a process beside it.
"""

from __future__ import annotations

import dataclasses
import faulthandler
import hashlib
import json
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Protocol

from udfs.model import Manifest, fetched, refuse_changed

# Ends the worker when the engine is broken beyond repair; Spark then starts a new worker for the retry.
BROKEN_ENGINE_EXIT = 70
# Pairs and tokens in a step. A GPU wants more at once (`python -m bench.pace`): with steps of 128 and 2,048, of 256 and
# 4,096, of 512 and 8,192 one H200 scored 1,466, 2,308, 2,188 pairs/s (4B weights), and 1,945, 2,494, 2,739 (135M).
STEP_ON_CPU = (128, 2048)
STEP_ON_GPU = (512, 8192)
THREADS = "TAOSR1_THREADS"  # of an engine on CPUs, in its worker's environment
# A large model may take minutes to load and to compile its first step: till then nothing hangs. A share may be slow.
LOADING_SECONDS = 900
BYTES_PER_SECOND = 50e6


@dataclass(frozen=True)
class EngineSettings:
    """All that is fixed when an engine is loaded. Equal settings mean one and the same engine.

    dtype: number type of the weights and activations ("auto": the model's own, "bfloat16", "float32"; `number_type`).
    fp32_head: project onto the vocabulary in float32; bf16 logits alone are steps of 0.06 to 0.25 nat wide.
    max_model_len: longest prompt and answer together, in tokens. block_size: tokens in a KV block; 32 is the least
    that gives prefix hits on CPU. kv_cache_gib: KV cache on CPU. gpu_memory: share of a GPU's memory on CUDA.
    max_num_seqs, max_num_batched_tokens: pairs (or samples) and tokens in one step of the engine; 0: STEP_ON_CPU or
    STEP_ON_GPU, whatever the engine finds.
    tensor_parallel: GPUs that hold one copy of the model. hang_seconds: no step finished for so long is a hang.
    model: folder or URI. manifest, weights_hash: what it must hold when it is loaded (`udfs.model.refuse_changed`).
    """

    model: str
    manifest: Manifest = ()
    weights_hash: str | None = None
    dtype: str = "auto"
    fp32_head: bool = True
    max_model_len: int = 2048
    block_size: int = 32
    kv_cache_gib: float = 1.0
    gpu_memory: float = 0.9
    max_num_seqs: int = 0
    max_num_batched_tokens: int = 0
    tensor_parallel: int = 1
    hang_seconds: int = 300

    @property
    def hash(self) -> str:
        """Twelve hex digits over all settings but which model it is, for `runs`."""
        about_model = ("model", "manifest", "weights_hash")
        values = {k: v for k, v in dataclasses.asdict(self).items() if k not in about_model}
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]


@dataclass(frozen=True, slots=True)
class Answer:
    """What the engine said about prompt number `index`.

    logprobs: natural logarithms of the full-vocabulary probabilities of the four label ids, in the order they were
    asked for. cached: prompt tokens that came from the prefix cache.
    """

    index: int
    logprobs: tuple[float, ...]
    cached: int


@dataclass(frozen=True, slots=True)
class Sampling:
    """How text is drawn. n: samples of each prompt. max_tokens: of each sample, the end token included.

    end_ids: tokens that end a sample; it holds them. seed: with the prompt's own ids it decides the draw, so a sample
    does not depend on the shard or the neighbours (up to the noise of a batch in the logits), and the first samples of
    n = 8 are those of n = 4. temperature 0 draws nothing: the likeliest token each time, and n must be 1.
    """

    max_tokens: int
    end_ids: tuple[int, ...]
    n: int = 1
    temperature: float = 1.0
    seed: int = 0

    def seed_of(self, prompt: Sequence[int]) -> int:
        """Seed of a prompt's first sample; the others' follow it."""
        digest = hashlib.sha256(repr((self.seed, *prompt)).encode()).digest()
        return int.from_bytes(digest[:6], "big")


@dataclass(frozen=True, slots=True)
class Samples:
    """What the engine wrote after prompt number `index`: token ids of each sample, in the order of their seeds.

    cached: prompt tokens that came from the prefix cache; None for several samples, of which vLLM tells one's only.
    """

    index: int
    ids: tuple[tuple[int, ...], ...]
    cached: int | None


class Engine(Protocol):
    """What the jobs need of an engine; the tests of Spark and Delta bring one that needs no model."""

    id: str
    version: str
    dtype: str
    max_model_len: int
    busy_seconds: float

    def answers(
        self, prompts: Iterator[Sequence[int] | None], label_ids: Sequence[int], ahead: int | None = None
    ) -> Iterator[Answer]:
        """Answers in any order; `None` among the prompts means that none is ready at this moment."""

    def samples(
        self, prompts: Iterator[Sequence[int] | None], sampling: Sampling, ahead: int | None = None
    ) -> Iterator[Samples]:
        """Continuations of the prompts, in any order; all samples of a prompt come together."""

    def forget(self) -> None:
        """Empties the prefix cache."""


def silent_seconds(settings: EngineSettings) -> float:
    """So long an engine may say nothing: while it is loaded, or without a step."""
    loading = LOADING_SECONDS + sum(size for _, size, _ in settings.manifest) / BYTES_PER_SECOND
    return max(settings.hang_seconds, loading)


class Watchdog:
    """Ends this process when nothing has moved for `seconds`: pet it at each sign of progress.

    The clock is faulthandler's own C thread: it fires while Python is stuck in a kernel or holds its lock, prints
    where every thread stood, and exits at once. A slow engine that moves keeps resetting it.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def __enter__(self) -> Watchdog:
        self.pet()
        return self

    def pet(self) -> None:
        """Something moved."""
        # In a Spark worker sys.stderr is the executor's log.
        faulthandler.dump_traceback_later(self.seconds, exit=True, file=sys.__stderr__)  # type: ignore[arg-type]

    def __exit__(self, *_: object) -> None:
        faulthandler.cancel_dump_traceback_later()


_WITNESS = """
import os, signal, sys, time
pid, seconds, since = int(sys.argv[1]), float(sys.argv[2]), None
while os.getppid() == pid:
    with open(f"/proc/{pid}/stat") as file:
        stopped = file.read().rpartition(")")[2].split()[0] == "T"
    since = (since or time.monotonic()) if stopped else None
    if since and time.monotonic() - since > seconds:
        print(f"process {pid} was stopped for {seconds:.0f} s, and is ended", file=sys.stderr)
        os.kill(pid, signal.SIGKILL)
    time.sleep(min(1.0, seconds / 4))
"""


@cache
def watched(seconds: float) -> subprocess.Popen[bytes]:
    """Has this process ended when it is stopped (SIGSTOP) for so long, by a small process that ends with it.

    No clock of a process that is stopped runs, and Spark asks it to end by a signal that it does not hear.
    """
    words = [sys.executable, "-I", "-S", "-c", _WITNESS, str(os.getpid()), str(seconds)]
    # A group of its own: what stops this one's must not stop it.
    return subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True)  # noqa: S603


class VllmEngine:
    """One vLLM engine in this process. Loading takes 10 to 60 s on CPU, minutes for a large model on GPUs."""

    def __init__(self, settings: EngineSettings) -> None:
        folder = fetched(settings.model)
        if settings.manifest:
            refuse_changed(folder, settings.manifest, settings.weights_hash)
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # see the first lines of this file
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")  # nothing calls home
        os.environ.setdefault("VLLM_DO_NOT_TRACK", "1")
        os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)  # would override kv_cache_gib
        watched(settings.hang_seconds)
        self._hang_seconds = silent_seconds(settings)
        # Of a step on several GPUs, the first ones too; the watchdog is stricter afterwards.
        os.environ["VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS"] = str(int(self._hang_seconds))
        import vllm
        from vllm.engine.arg_utils import EngineArgs
        from vllm.platforms import current_platform
        from vllm.v1.engine.llm_engine import LLMEngine

        on_cpu = current_platform.is_cpu()
        if on_cpu:
            take_cores(threads_of_task())
        settings = within_memory(settings, on_cpu)
        arguments = EngineArgs(model=folder, **vllm_arguments(settings, on_cpu))
        self.settings = settings
        with Watchdog(self._hang_seconds), _broken_engine_ends_the_process(by_memory_alone=True):
            self._engine = LLMEngine.from_engine_args(arguments, enable_multiprocessing=False)
        self.id = uuid.uuid4().hex
        self.version = f"vllm {vllm.__version__} {'cpu' if on_cpu else current_platform.get_device_name()}"
        self.dtype = str(self._engine.model_config.dtype).removeprefix("torch.")
        self.max_model_len = int(self._engine.model_config.max_model_len)
        self.busy_seconds = 0.0
        # The first steps compile kernels (10 s on two slow cores): that is loading, and no measure of the pace to come.
        for count in (1, 2):
            list(self.answers(iter([[0, 1, 2]] * count), (0, 1, 2, 3)))
        self.forget()
        self._hang_seconds, self.busy_seconds = settings.hang_seconds, 0.0

    def answers(
        self, prompts: Iterator[Sequence[int] | None], label_ids: Sequence[int], ahead: int | None = None
    ) -> Iterator[Answer]:
        """Streams prompts (token ids) through the engine; yields one Answer a prompt, in the order they finish.

        At most `ahead` prompts (default: two steps' worth) are inside the engine, so neither side holds a partition.
        Time spent here between asking for prompts and yielding answers adds to `busy_seconds`. An error of the engine
        ends this worker process: the engine's state is lost, and the retry must not meet it.
        """
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        parameters = SamplingParams(
            max_tokens=1,
            temperature=0.0,
            logprob_token_ids=list(label_ids),
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
            skip_clone=True,
        )
        for index, output in self._outputs(prompts, lambda _: parameters, ahead or 2 * self.settings.max_num_seqs):
            by_id = output.outputs[0].logprobs[0]
            yield Answer(index, tuple(by_id[i].logprob for i in label_ids), output.num_cached_tokens or 0)

    def samples(
        self, prompts: Iterator[Sequence[int] | None], sampling: Sampling, ahead: int | None = None
    ) -> Iterator[Samples]:
        """Streams prompts through the engine as `answers` does; yields their samples, prompt by prompt.

        All samples of a prompt enter together and share its full KV blocks; each computes what is behind the last one.
        """
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        def parameters(prompt: Sequence[int]) -> SamplingParams:
            return SamplingParams(
                n=sampling.n,
                max_tokens=sampling.max_tokens,
                temperature=sampling.temperature,
                seed=sampling.seed_of(prompt) if sampling.temperature else None,
                stop_token_ids=list(sampling.end_ids),
                ignore_eos=True,  # what ends an answer is said above, not by the engine's own reading of the folder
                detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY,
                skip_clone=True,
            )

        # Enough samples that a finished one is replaced at once, without keeping the cache full of waiting prompts.
        ahead = ahead or max(1, 2 * self.settings.max_num_seqs // sampling.n)
        for index, output in self._outputs(prompts, parameters, ahead):
            ids = tuple(tuple(one.token_ids) for one in sorted(output.outputs, key=lambda one: one.index))
            yield Samples(index, ids, (output.num_cached_tokens or 0) if sampling.n == 1 else None)

    def _outputs(
        self, prompts: Iterator[Sequence[int] | None], parameters: Callable[[Sequence[int]], Any], ahead: int
    ) -> Iterator[tuple[int, Any]]:
        """Number and final output of each prompt, in the order they finish; at most `ahead` prompts are inside."""
        engine, exhausted, index, inside = self._engine, False, 0, 0
        # The watch runs only while there is work inside: waiting for prompts is Spark's time, not the engine's.
        try:
            while inside or not exhausted:
                while not exhausted and inside < ahead:
                    try:
                        prompt = next(prompts)
                    except StopIteration:
                        exhausted = True
                        break
                    if prompt is None:
                        break
                    started = time.monotonic()
                    with _broken_engine_ends_the_process():
                        engine.add_request(str(index), {"prompt_token_ids": list(prompt)}, parameters(prompt))
                    self.busy_seconds += time.monotonic() - started
                    index += 1
                    inside += 1
                if not inside:
                    continue
                started = time.monotonic()
                with Watchdog(self._hang_seconds) as watchdog, _broken_engine_ends_the_process():
                    outputs: list[Any] = []
                    # A long prompt takes several steps, text one a token. Each moves something on, so there is an end.
                    for _ in range(inside * 2 * self.max_model_len):
                        outputs = engine.step()
                        watchdog.pet()
                        if outputs:
                            break
                    else:
                        raise RuntimeError("the engine steps on and on, and no prompt is finished")
                self.busy_seconds += time.monotonic() - started
                inside -= len(outputs)
                for output in outputs:
                    yield int(output.request_id.split("-")[0]), output
        finally:
            if inside:  # the consumer stopped early: leave no request behind for the next task
                engine.abort_request([str(i) for i in range(index)])

    def forget(self) -> None:
        """Empties the prefix cache, so that the next answers are computed from nothing."""
        if not self._engine.reset_prefix_cache():
            raise RuntimeError("the engine did not empty its prefix cache: it still holds blocks of a prompt")


def take_cores(threads: int) -> None:
    """Has this process compute with so many threads; 0: as many as torch likes."""
    import torch

    if threads:
        torch.set_num_threads(threads)
    # Attention in bf16 uses AMX where the processor has it. The kernel must be asked for leave first, which vLLM leaves
    # to oneDNN; a small model may not need that before, and died of an illegal instruction.
    getattr(torch.cpu, "_init_amx", bool)()


def threads_of_machine() -> int:
    """As many as the variable OMP_NUM_THREADS says, else one a core that this process may use."""
    return int(os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0)))


def threads_of_task() -> int:
    """Threads that an engine on CPUs computes with: as many as the driver says, else all cores of its Spark task.

    Spark tells each Python worker to use `spark.task.cpus`, one, whatever its task was given. 0 outside of a task: what
    the process was told.
    """
    from pyspark import TaskContext

    context = TaskContext.get()
    return int(os.environ.get(THREADS) or context.cpus()) if context is not None else 0


def number_type(asked: str, on_cpu: bool, cpuinfo: str = "/proc/cpuinfo") -> str:
    """The dtype that is meant: on a CPU that has no instructions for bfloat16, "auto" is float32. There the engine
    computes bfloat16 in software: some 60 tokens a second against 440 (SmolLM2-135M, two cores with AVX2 alone)."""
    if asked != "auto" or not on_cpu:
        return asked
    flags = Path(cpuinfo).read_text(encoding="utf-8").split() if Path(cpuinfo).exists() else []
    return asked if not flags or {"avx512_bf16", "amx_bf16", "bf16"} & set(flags) else "float32"


def vllm_arguments(settings: EngineSettings, on_cpu: bool) -> dict[str, Any]:
    """The settings as arguments of a vLLM engine, but for its model."""
    seqs, budget = _step(settings, on_cpu)
    device: dict[str, Any] = {"gpu_memory_utilization": settings.gpu_memory}
    if on_cpu:
        device = {"kv_cache_memory_bytes": int(settings.kv_cache_gib * 2**30), "enforce_eager": True}
        # vLLM 0.32 breaks on CPU when a prompt with a seed of its own is computed in pieces ("CPU Generator does not
        # use offset"), so a step takes whole prompts and must have room for the longest.
        device["enable_chunked_prefill"] = False
        budget = max(budget, settings.max_model_len)
    return {
        "skip_tokenizer_init": True,  # it is fed with ids only; the tokenizer is the prompt's business
        "trust_remote_code": False,
        "load_format": "safetensors",  # "auto" would fall back to pickle files
        "dtype": settings.dtype,
        "hf_overrides": with_fp32_head if settings.fp32_head else {},
        "language_model_only": True,  # of a model that also takes images, the decoder alone
        "max_model_len": settings.max_model_len,
        "block_size": settings.block_size,
        "enable_prefix_caching": True,
        "max_num_seqs": seqs,
        "max_num_batched_tokens": budget,
        "tensor_parallel_size": settings.tensor_parallel,
        "worker_extension_cls": "udfs.leash.Leash" if settings.tensor_parallel > 1 else "",
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
        **device,
    }


def with_fp32_head(config: Any) -> Any:
    """A model's configuration with its head in float32; a model that also takes images keeps its decoder's inside."""
    for part in (config, config.get_text_config()):
        part.head_dtype = "float32"
    return config


class _broken_engine_ends_the_process:
    """by_memory_alone: other errors are raised, as while loading, where they say what is wrong with the model."""

    def __init__(self, by_memory_alone: bool = False) -> None:
        self._by_memory_alone = by_memory_alone

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is None or isinstance(error, GeneratorExit | KeyboardInterrupt):
            return
        if self._by_memory_alone and not _out_of_memory(error):
            return
        import traceback

        traceback.print_exception(error)
        if _out_of_memory(error):
            note_out_of_memory()
        print(f"the engine is broken ({kind.__name__ if kind else ''}: {error}); this worker ends", file=sys.stderr)
        sys.stderr.flush()
        os._exit(BROKEN_ENGINE_EXIT)


def _out_of_memory(error: BaseException) -> bool:
    text = f"{type(error).__name__} {error}".lower()
    return isinstance(error, MemoryError) or any(
        words in text for words in ("outofmemory", "out of memory", "can't allocate memory", "cannot allocate memory")
    )


def note_out_of_memory() -> None:
    """Notes beside Spark's files of this executor, which go with it, that an engine ran out of memory here."""
    if notes := _notes():
        with open(notes, "a", encoding="ascii") as file:
            file.write(f"{os.getpid()}\n")


def within_memory(settings: EngineSettings, on_cpu: bool) -> EngineSettings:
    """The settings with the size of a step filled in: half as many prompts, and on a GPU tokens, for each engine that
    ran out of memory on this executor, at most three times: beyond that it is a prompt, or the machine."""
    seqs, budget = _step(settings, on_cpu)
    notes = _notes()
    if count := min(3, len(notes.read_text().split())) if notes and notes.exists() else 0:
        seqs, budget = max(1, seqs >> count), max(settings.block_size, budget >> count)
        tokens = f" and {budget} tokens" * (not on_cpu)  # on CPU it must have room for the longest prompt
        print(
            f"engine: {count} ran out of memory on this executor; a step takes {seqs} prompts{tokens} now",
            file=sys.stderr,
            flush=True,
        )
    return dataclasses.replace(settings, max_num_seqs=seqs, max_num_batched_tokens=budget)


def _step(settings: EngineSettings, on_cpu: bool) -> tuple[int, int]:
    seqs, budget = STEP_ON_CPU if on_cpu else STEP_ON_GPU
    return settings.max_num_seqs or seqs, settings.max_num_batched_tokens or budget


def _notes() -> Path | None:
    """The file of notes; None outside a Spark worker."""
    from pyspark import SparkFiles

    folder = SparkFiles._root_directory if SparkFiles._is_running_on_worker else None
    return Path(folder) / "engines-out-of-memory" if folder else None


_loaded: dict[EngineSettings, VllmEngine] = {}


def load(settings: EngineSettings) -> Engine:
    """The engine of this worker process: loaded at the first call, the same one at every later call.

    Raises RuntimeError for other settings than the last call's: two engines do not fit beside each other.
    """
    if settings not in _loaded:
        if _loaded:
            raise RuntimeError("this worker holds an engine with other settings; it must end before a new one loads")
        claim_gpus()
        _loaded[settings] = VllmEngine(settings)
    return _loaded[settings]


def claim_gpus() -> None:
    """Shows this process only the GPUs that Spark gave to its task.

    Spark does not set CUDA_VISIBLE_DEVICES by itself, and numbers GPUs as nvidia-smi does, by their place on the bus;
    CUDA would have the fastest first. Must run before vllm or torch is imported.
    """
    from pyspark import TaskContext

    context = TaskContext.get()
    gpus = context.resources().get("gpu") if context else None
    addresses = list(gpus.addresses) if gpus else []
    if addresses:
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(addresses)
        os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
        print(f"engine: CUDA_VISIBLE_DEVICES={os.environ['CUDA_VISIBLE_DEVICES']}", file=sys.stderr, flush=True)
