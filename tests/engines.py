"""An engine without a model, for tests of Spark and Delta: its answer is a pure function of the prompt's ids."""

from __future__ import annotations

import hashlib
import math
import os
import signal
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

from udfs.engine import Answer, Engine, EngineSettings, Watchdog


class FakeEngine:
    """Answers from a hash of the ids; its prefix cache is perfect and never full."""

    def __init__(self, settings: EngineSettings) -> None:
        self.id = uuid.uuid4().hex
        self.version = f"fake {os.getpid()}"
        self.dtype = "float32"
        self.max_model_len = settings.max_model_len
        self.block = settings.block_size
        self.busy_seconds = 0.0
        self.seen: set[tuple[int, ...]] = set()

    def answers(
        self, prompts: Iterator[Sequence[int] | None], label_ids: Sequence[int], ahead: int | None = None
    ) -> Iterator[Answer]:
        index = 0
        for prompt in prompts:
            if prompt is None:
                continue
            ids = tuple(prompt)
            cached = 0
            for end in range(self.block, len(ids) + 1, self.block):
                if ids[:end] in self.seen and end < len(ids):
                    cached = end
                self.seen.add(ids[:end])
            self.busy_seconds += 1e-4 * (len(ids) - cached)
            yield Answer(index, logprobs(ids), cached)
            index += 1

    def forget(self) -> None:
        self.seen.clear()


def logprobs(ids: Sequence[int]) -> tuple[float, ...]:
    """Four log-probabilities that sum to 0.9, from nothing but the ids."""
    digest = hashlib.sha256(repr(list(ids)).encode()).digest()
    parts = [1 + digest[i] for i in range(4)]
    return tuple(math.log(0.9 * part / sum(parts)) for part in parts)


_loaded: dict[EngineSettings, FakeEngine] = {}


def load_fake(settings: EngineSettings) -> Engine:
    """One fake engine a worker process and settings, as the real loader does."""
    if settings not in _loaded:
        _loaded[settings] = FakeEngine(settings)
    return _loaded[settings]


class DriftingEngine(FakeEngine):
    """Answers differently each time, as an engine with a corrupted cache would."""

    def answers(
        self, prompts: Iterator[Sequence[int] | None], label_ids: Sequence[int], ahead: int | None = None
    ) -> Iterator[Answer]:
        for index, prompt in enumerate(p for p in prompts if p is not None):
            self.busy_seconds += 0.001
            yield Answer(index, logprobs([*prompt, len(self.seen)]), 0)
            self.seen.add((len(self.seen),))


def load_drifting(settings: EngineSettings) -> Engine:
    """The drifting engine of this worker process."""
    if settings not in _loaded:
        _loaded[settings] = DriftingEngine(settings)
    return _loaded[settings]


class MortalEngine(FakeEngine):
    """Dies or hangs once, at its tenth prompt; `settings.model` is a folder that holds how and remembers whether."""

    def __init__(self, settings: EngineSettings) -> None:
        super().__init__(settings)
        self.folder = Path(settings.model)
        self.hang_seconds = settings.hang_seconds

    def answers(
        self, prompts: Iterator[Sequence[int] | None], label_ids: Sequence[int], ahead: int | None = None
    ) -> Iterator[Answer]:
        for answer in super().answers(prompts, label_ids, ahead):
            if answer.index == 9 and not (self.folder / "died").exists():
                (self.folder / "died").write_text(str(os.getpid()))
                if (self.folder / "how").read_text() == "killed":
                    os.kill(os.getpid(), signal.SIGKILL)
                with Watchdog(self.hang_seconds):
                    time.sleep(600)
            yield answer


def load_mortal(settings: EngineSettings) -> Engine:
    """The mortal engine of this worker process."""
    if settings not in _loaded:
        _loaded[settings] = MortalEngine(settings)
    return _loaded[settings]
