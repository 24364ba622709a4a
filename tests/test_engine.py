"""The real engine with a tiny real model: right numbers, prefix hits, and an end when it hangs or breaks."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import REPO
from tests.models import tiny_model
from udfs.engine import (
    STEP_ON_CPU,
    STEP_ON_GPU,
    EngineSettings,
    VllmEngine,
    number_type,
    vllm_arguments,
    with_fp32_head,
)
from udfs.model import manifest


def python(script: str, *arguments: str, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    """Runs a script in a process of its own: an engine takes the process with it when it dies."""
    return subprocess.run(
        [sys.executable, "-c", script, *arguments],
        cwd=REPO,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.mark.parametrize(
    ("asked", "on_cpu", "flags", "meant"),
    [
        ("auto", True, "fma avx2", "float32"),
        ("auto", True, "avx512f avx512_bf16", "auto"),
        ("auto", True, "asimd bf16", "auto"),
        ("auto", False, "fma avx2", "auto"),
        ("bfloat16", True, "fma avx2", "bfloat16"),
    ],
)
def test_a_cpu_without_bfloat16_computes_in_float32_unless_told_otherwise(
    tmp_path: Path, asked: str, on_cpu: bool, flags: str, meant: str
) -> None:
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nflags\t\t: {flags}\n")
    assert number_type(asked, on_cpu, str(tmp_path / "cpuinfo")) == meant
    assert number_type(asked, on_cpu, "/nowhere") == asked


def test_a_hang_ends_the_process_and_says_where_it_stood() -> None:
    began = time.monotonic()
    ended = python("import time\nfrom udfs.engine import Watchdog\nwith Watchdog(1):\n    time.sleep(60)")
    assert ended.returncode == 1
    assert time.monotonic() - began < 30
    assert "Timeout" in ended.stderr
    assert "line 4" in ended.stderr


def test_a_hang_that_holds_pythons_lock_ends_too() -> None:
    # A regular expression that backtracks for hours never lets another Python thread run.
    script = "import re\nfrom udfs.engine import Watchdog\nwith Watchdog(1):\n    re.match(r'(a+)+$', 'a' * 60 + 'b')"
    assert python(script, timeout=30).returncode == 1


def test_what_is_slow_but_moves_is_left_alone() -> None:
    script = (
        "import time\nfrom udfs.engine import Watchdog\nwith Watchdog(1) as watchdog:\n"
        "    for _ in range(5):\n        time.sleep(0.5)\n        watchdog.pet()\nprint('whole')"
    )
    assert python(script).stdout.strip() == "whole"


_REAL = """
import sys, time
from udfs import selfcheck
from udfs.engine import EngineSettings, VllmEngine
from jobs.check import plain_model
model, how = sys.argv[1:]
engine = VllmEngine(EngineSettings(model=model, dtype="float32", hang_seconds=8, max_model_len=256))
products = [[300 + p] * 64 for p in range(4)]
prompts = [p + [q, q + 1, q + 2] for p in products for q in range(10, 60, 5)]
labels = [20, 21, 22, 23]
if how == "right":
    got = selfcheck.probabilities(engine, prompts, labels)
    print("parity", selfcheck.largest_difference(got, plain_model(model, prompts, labels)))
    print("self", selfcheck.check_engine(engine, prompts[:8], labels)[0])
    engine.forget()
    computed = sum(len(prompts[a.index]) - a.cached for a in engine.answers(iter(prompts), labels))
    print("computed", computed, 4 * 64 + 3 * len(prompts))
    part = engine.answers(iter(prompts), labels)
    next(part)
    part.close()
    again = selfcheck.probabilities(engine, prompts, labels)
    print("after a task that ended early", selfcheck.largest_difference(got, again))
    print("spread", max(p[0] for p in got) - min(p[0] for p in got))
elif how == "hangs":
    engine._engine.step = lambda: time.sleep(3600)
    selfcheck.probabilities(engine, prompts, labels)
elif how == "breaks":
    def step():
        raise RuntimeError("CUDA error: device-side assert")
    engine._engine.step = step
    selfcheck.probabilities(engine, prompts, labels)
elif how == "hungry":
    import resource, torch
    from pyspark import SparkFiles
    SparkFiles._is_running_on_worker, SparkFiles._root_directory = True, model
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    real = engine._engine.step
    def step():
        torch.empty(2**33, dtype=torch.uint8)
        return real()
    engine._engine.step = step
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, used + 2**30))
    selfcheck.probabilities(engine, prompts, labels)
elif how == "slow":
    real = engine._engine.step
    engine._engine.step = lambda: (time.sleep(3), real())[1]
    print("answers", len(selfcheck.probabilities(engine, prompts[:12], labels, ahead=3)))
"""


_LOADS = """
import sys
from pyspark import SparkFiles
from vllm.v1.engine.llm_engine import LLMEngine
from udfs.engine import EngineSettings, VllmEngine
model, folder, error = sys.argv[1:]
SparkFiles._is_running_on_worker, SparkFiles._root_directory = True, folder
def load(*_, **__):
    raise RuntimeError(error)
LLMEngine.from_engine_args = load
VllmEngine(EngineSettings(model=model, dtype="float32", max_model_len=256))
"""


def test_a_process_that_is_stopped_is_ended_and_one_that_goes_on_in_time_is_not() -> None:
    script = (
        "import os, signal, subprocess, sys, time\n"
        "from udfs.engine import watched\n"
        "watched(2)\n"
        "time.sleep(float(sys.argv[1]))\n"
        "kick = f'exec > /dev/null 2>&1; sleep {sys.argv[2]}; kill -CONT {os.getpid()}'\n"
        "subprocess.Popen(['sh', '-c', kick], start_new_session=True)\n"
        "os.kill(os.getpid(), signal.SIGSTOP)\n"
        "print('went on')"
    )
    began = time.monotonic()
    ended = python(script, "0.1", "60", timeout=50)
    assert (ended.returncode, ended.stdout) == (-signal.SIGKILL, "")
    assert "was stopped for 2 s, and is ended" in ended.stderr
    assert time.monotonic() - began < 30
    # Longer at work than it may be stopped, and stopped for a moment.
    ended = python(script, "3", "0.5")
    assert (ended.returncode, ended.stdout) == (0, "went on\n")


def test_an_engine_of_another_model_than_the_job_looked_at_is_not_loaded(tiny: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny, tmp_path / "model")
    settings = EngineSettings(model=str(folder), manifest=manifest(str(folder)))
    (folder / "config.json").write_text((folder / "config.json").read_text() + " ")
    with pytest.raises(ValueError, match=r"config\.json changed since this job looked at it"):
        VllmEngine(settings)


def test_the_engine_is_told_what_was_asked_for_or_what_its_device_wants() -> None:
    def step(on_cpu: bool, **asked: int) -> tuple[int, int]:
        told = vllm_arguments(EngineSettings(model="m", **asked), on_cpu)  # type: ignore[arg-type]
        return told["max_num_seqs"], told["max_num_batched_tokens"]

    assert step(on_cpu=True) == STEP_ON_CPU
    assert step(on_cpu=False) == STEP_ON_GPU
    assert step(on_cpu=False, max_num_seqs=7, max_num_batched_tokens=99) == (7, 99)
    told = vllm_arguments(EngineSettings(model="m"), on_cpu=True)
    assert (told["load_format"], told["trust_remote_code"]) == ("safetensors", False)
    assert told["hf_overrides"] is with_fp32_head
    assert vllm_arguments(EngineSettings(model="m", fp32_head=False), on_cpu=True)["hf_overrides"] == {}
    # On CPU a step takes whole prompts.
    assert step(on_cpu=True, max_num_batched_tokens=99, max_model_len=300) == (STEP_ON_CPU[0], 300)


@pytest.mark.slow
def test_the_head_is_in_float32_also_where_the_decoder_has_a_configuration_of_its_own() -> None:
    from transformers import AutoConfig

    for config in (AutoConfig.for_model("llama"), AutoConfig.for_model("gemma3")):
        changed = with_fp32_head(config)
        assert {changed.head_dtype, changed.get_text_config().head_dtype} == {"float32"}


def test_the_processes_of_an_engine_on_several_gpus_end_with_their_worker_also_when_they_hang() -> None:
    child = "import os, signal, udfs.leash; print(os.getpid(), flush=True); os.kill(os.getpid(), signal.SIGSTOP)"
    script = (
        "import os, signal, subprocess, sys\n"
        "child = subprocess.Popen([sys.executable, '-c', sys.argv[1]], stdout=subprocess.PIPE)\n"
        "print(child.stdout.readline().decode(), flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    pid = int(python(script, child).stdout)

    def alive() -> bool:
        stat = Path(f"/proc/{pid}/stat")
        return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"

    until = time.monotonic() + 10
    while alive() and time.monotonic() < until:
        time.sleep(0.1)
    assert not alive()


def test_the_engine_computes_what_the_plain_model_computes_and_reuses_prefixes(tiny: Path) -> None:
    ended = python(_REAL, str(tiny), "right")
    said = dict(
        line.rsplit(" ", 1)
        for line in ended.stdout.splitlines()
        if line.startswith(("parity", "self", "after", "spread"))
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert float(said["parity"]) < 1e-4
    assert float(said["self"]) < 1e-4
    assert float(said["after a task that ended early"]) < 1e-4
    assert float(said["spread"]) > 0.01  # a model that says the same to all would pass the lines above
    computed, floor = next(line.split()[1:] for line in ended.stdout.splitlines() if line.startswith("computed"))
    assert computed == floor


_WRITES = """
import sys
from udfs.engine import EngineSettings, Sampling, VllmEngine
model = sys.argv[1]
# A step has room for 300 tokens: were prompts computed in pieces, seeds of their own would break this engine on CPU.
engine = VllmEngine(EngineSettings(model=model, dtype="float32", max_model_len=256, max_num_batched_tokens=300))
prompts = [[300 + p] * 64 + [q, q + 1] * 30 for p in range(4) for q in range(10, 60, 10)]
def ask(sampling, some=prompts, **more):
    return {a.index: a for a in engine.samples(iter(some), sampling, **more)}
import torch
from transformers import AutoModelForCausalLM
plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
greedy = ask(Sampling(12, (), temperature=0.0))
right = 0
for i, prompt in enumerate(prompts):
    ids = list(prompt)
    for token in greedy[i].ids[0]:
        logits = plain(torch.tensor([ids])).logits[0, -1]
        right += bool(logits.max() - logits[token] < 1e-3)
        ids.append(token)
print("greedy", right, 12 * len(prompts))
eight = ask(Sampling(16, (), n=8, seed=5))
print("whole", sum(len(ids) == 16 for a in eight.values() for ids in a.ids), 8 * len(prompts))
print("distinct", len({ids for a in eight.values() for ids in a.ids}))
backwards = ask(Sampling(16, (), n=4, seed=5), prompts[::-1], ahead=1)
alike = [a == b for i in eight for a, b in zip(eight[i].ids, backwards[len(prompts) - 1 - i].ids)]
print("alike", sum(alike), len(alike))
other = ask(Sampling(16, (), n=8, seed=6))
print("other seed", sum(eight[i].ids == other[i].ids for i in eight))
end = eight[0].ids[0][3]
ended = ask(Sampling(16, (end,), n=8, seed=5))
cut = [ids[: ids.index(end) + 1] if end in ids else ids for i in sorted(eight) for ids in eight[i].ids]
print("ended", sum(a == b for a, b in zip(cut, [ids for i in sorted(ended) for ids in ended[i].ids])), len(cut))
print("cached", min(a.cached for a in ask(Sampling(1, ())).values()))
part = engine.samples(iter(prompts), Sampling(50, (), n=8, seed=1))
next(part)
part.close()
again = ask(Sampling(16, (), n=8, seed=5))
print("after a task that ended early", sum(eight[i].ids == again[i].ids for i in eight), len(eight))
"""


@pytest.mark.slow
def test_the_engine_writes_what_the_plain_model_would_and_a_seed_draws_the_same_wherever_it_stands(tiny: Path) -> None:
    ended = python(_WRITES, str(tiny))
    assert ended.returncode == 0, ended.stderr[-3000:]
    said = {name: list(map(int, found)) for name, *found in (_words(line) for line in ended.stdout.splitlines())}
    # In float32 two tokens are a tie about once in a thousand.
    assert said["greedy"][0] >= said["greedy"][1] - 2
    assert said["whole"] == [160, 160]
    assert said["distinct"][0] > 150
    assert said["alike"][0] >= said["alike"][1] - 2
    assert said["other seed"] == [0]
    assert said["ended"][0] >= said["ended"][1] - 2
    assert said["cached"][0] >= 64
    assert said["after a task that ended early"][0] >= said["after a task that ended early"][1] - 1


def _words(line: str) -> list[str]:
    """A name of words and the numbers behind it."""
    words = line.split()
    numbers = [word for word in words if word.isdigit()]
    return [" ".join(word for word in words if not word.isdigit()), *numbers]


@pytest.mark.slow
def test_an_engine_that_hangs_ends_its_process_within_the_watchdogs_time(tiny: Path) -> None:
    began = time.monotonic()
    ended = python(_REAL, str(tiny), "hangs")
    assert ended.returncode == 1
    assert "Timeout" in ended.stderr
    assert time.monotonic() - began < 120  # loading included


@pytest.mark.slow
def test_an_engine_that_breaks_ends_its_process_and_says_why(tiny: Path) -> None:
    ended = python(_REAL, str(tiny), "breaks")
    assert ended.returncode == 70
    assert "the engine is broken (RuntimeError: CUDA error" in ended.stderr


@pytest.mark.slow
def test_an_engine_that_runs_out_of_memory_ends_its_process_and_leaves_a_note(tiny: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny, tmp_path / "tiny")
    ended = python(_REAL, str(tmp_path / "tiny"), "hungry")
    assert ended.returncode == 70, ended.stderr[-2000:]
    assert "allocate memory" in ended.stderr
    assert len((tmp_path / "tiny" / "engines-out-of-memory").read_text().split()) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("error", "code"), [("CUDA out of memory occurred when warming up sampler", 70), ("no such layer", 1)]
)
def test_an_engine_that_does_not_fit_while_it_loads_leaves_a_note_and_any_other_error_is_told(
    tiny: Path, tmp_path: Path, error: str, code: int
) -> None:
    ended = python(_LOADS, str(tiny), str(tmp_path), error)
    assert ended.returncode == code, ended.stderr[-2000:]
    assert f"RuntimeError: {error}" in ended.stderr
    assert (tmp_path / "engines-out-of-memory").exists() == (code == 70)


@pytest.mark.slow
def test_an_engine_slower_than_the_watchdog_in_all_but_moving_is_left_alone(tiny: Path) -> None:
    ended = python(_REAL, str(tiny), "slow")
    assert "answers 12" in ended.stdout, ended.stderr[-2000:]
