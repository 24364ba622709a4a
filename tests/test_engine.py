"""The real engine with a tiny real model: right numbers, prefix hits, and an end when it hangs or breaks."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import REPO
from tests.models import tiny_model


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
    print("self", selfcheck.check_engine(engine, prompts[:8], labels))
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
elif how == "slow":
    selfcheck.probabilities(engine, prompts, labels)  # the first steps compile kernels
    real = engine._engine.step
    engine._engine.step = lambda: (time.sleep(3), real())[1]
    print("answers", len(selfcheck.probabilities(engine, prompts[:12], labels, ahead=3)))
"""


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
def test_an_engine_slower_than_the_watchdog_in_all_but_moving_is_left_alone(tiny: Path) -> None:
    ended = python(_REAL, str(tiny), "slow")
    assert "answers 12" in ended.stdout, ended.stderr[-2000:]
