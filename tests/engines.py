"""An engine without a model, for tests of Spark and Delta: its answer is a pure function of the prompt's ids."""

from __future__ import annotations

import hashlib
import json
import math
import os
import signal
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

from tokenizers import Tokenizer

from partitioner.waves import CHECKED_PROMPTS
from schemas.labels import LABELS, NAMES
from schemas.runs import _born
from tests.models import PROMPT, tiny_tokenizer
from udfs.answer import Form
from udfs.engine import (
    Answer,
    Engine,
    EngineSettings,
    Samples,
    Sampling,
    Watchdog,
    _broken_engine_ends_the_process,
    within_memory,
)
from udfs.prompt import load


class FakeEngine:
    """Answers from a hash of the ids; its prefix cache is perfect and never full."""

    def __init__(self, settings: EngineSettings) -> None:
        self.id = uuid.uuid4().hex
        self.version = f"fake {os.getpid()} cpu"
        self.dtype = "float32"
        self.max_model_len = settings.max_model_len
        self.block = settings.block_size
        self.busy_seconds = 0.0
        self.seen: set[tuple[int, ...]] = set()
        self.folder = Path(settings.model)  # through which a test speaks with the engine

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

    def samples(
        self, prompts: Iterator[Sequence[int] | None], sampling: Sampling, ahead: int | None = None
    ) -> Iterator[Samples]:
        index = 0
        for prompt in prompts:
            if prompt is None:
                continue
            self.busy_seconds += 0.01 * sampling.n
            seed = sampling.seed_of(prompt)
            yield Samples(
                index, tuple(written(prompt, seed + i)[: sampling.max_tokens] for i in range(sampling.n)), None
            )
            index += 1

    def forget(self) -> None:
        self.seen.clear()


def logprobs(ids: Sequence[int]) -> tuple[float, ...]:
    """Four log-probabilities that sum to 0.9, from nothing but the ids."""
    digest = hashlib.sha256(repr(list(ids)).encode()).digest()
    parts = [1 + digest[i] for i in range(4)]
    return tuple(math.log(0.9 * part / sum(parts)) for part in parts)


CHAINS = ("Missed: colour. So {own}.", "Grade {digit}. Missed: size. So {other}.", "It is blue.", "So {own}.")


@cache
def answer_form() -> Form:
    """The form of the fake engine's answers: those of the tiny model's prompt."""
    tokenizer = tiny_tokenizer()
    prompt = load(PROMPT, tokenizer, 512)
    end = json.loads(tokenizer)["added_tokens"][2]["id"]
    return Form("post", prompt.label_ids, (end,), None, prompt.reserved, tokenizer)


def written(ids: Sequence[int], seed: int) -> tuple[int, ...]:
    """An answer drawn from a hash of ids and seed: any label, any of `CHAINS`. After a chosen label, only its chain."""
    form = answer_form()
    digest = hashlib.sha256(repr((list(ids), seed)).encode()).digest()
    chosen = ids[-1] in form.label_ids
    label = LABELS[form.label_ids.index(ids[-1])] if chosen else LABELS[digest[0] % 4]
    other = LABELS[LABELS.index(label) - 1]
    chain = CHAINS[digest[1] % 4].format(own=NAMES[label], other=NAMES[other], digit=label)
    return tuple(form.target(label, chain)[1 if chosen else 0 :])


class DriftingEngine(FakeEngine):
    """Answers differently each time, as an engine with a corrupted cache would."""

    def answers(
        self, prompts: Iterator[Sequence[int] | None], label_ids: Sequence[int], ahead: int | None = None
    ) -> Iterator[Answer]:
        for index, prompt in enumerate(p for p in prompts if p is not None):
            self.busy_seconds += 0.001
            yield Answer(index, logprobs([*prompt, len(self.seen)]), 0)
            self.seen.add((len(self.seen),))


class MortalEngine(FakeEngine):
    """Dies or hangs once, while it scores (the check of first use asks fewer prompts at a time); `settings.model` is a
    folder that holds how and remembers whether."""

    def __init__(self, settings: EngineSettings) -> None:
        super().__init__(settings)
        self.hang_seconds = settings.hang_seconds

    def answers(
        self, prompts: Iterator[Sequence[int] | None], label_ids: Sequence[int], ahead: int | None = None
    ) -> Iterator[Answer]:
        for answer in super().answers(prompts, label_ids, ahead):
            if answer.index == CHECKED_PROMPTS and not (self.folder / "died").exists():
                (self.folder / "died").write_text(str(os.getpid()))
                if (self.folder / "how").read_text() == "killed":
                    os.kill(os.getpid(), signal.SIGKILL)
                with Watchdog(self.hang_seconds):
                    time.sleep(600)
            yield answer


class PoisonedEngine(FakeEngine):
    """Dies, each time, at the prompts of poison.json in the folder `settings.model`, or hangs where there is a file
    `hangs` too; where there is one `company` only behind another prompt. `deaths` there counts. Where there is one
    `nan`, all its answers are no numbers."""

    def __init__(self, settings: EngineSettings) -> None:
        super().__init__(settings)
        loaded = self.folder / "loaded"
        if loaded.exists() and any(map(_born, map(int, loaded.read_text().split()))):
            (self.folder / "beside").touch()
        self.hang_seconds = settings.hang_seconds
        with open(loaded, "a") as pids:
            pids.write(f"{os.getpid()}\n")
        self.poison = {tuple(ids) for ids in json.loads((self.folder / "poison.json").read_text())}

    def answers(
        self, prompts: Iterator[Sequence[int] | None], label_ids: Sequence[int], ahead: int | None = None
    ) -> Iterator[Answer]:
        for answer in super().answers(self.tasted(prompts), label_ids, ahead):
            broken = (self.folder / "nan").exists()
            yield replace(answer, logprobs=(math.nan,) * 4) if broken else answer

    def samples(
        self, prompts: Iterator[Sequence[int] | None], sampling: Sampling, ahead: int | None = None
    ) -> Iterator[Samples]:
        yield from super().samples(self.tasted(prompts), sampling, ahead)

    def tasted(self, prompts: Iterator[Sequence[int] | None]) -> Iterator[Sequence[int] | None]:
        alone = (self.folder / "company").exists()
        for prompt in prompts:
            if prompt is not None and tuple(prompt) in self.poison and not alone:
                with open(self.folder / "deaths", "a") as deaths:
                    deaths.write(f"{os.getpid()}\n")
                if (self.folder / "hangs").exists():
                    with Watchdog(self.hang_seconds):
                        time.sleep(600)
                os._exit(70)
            alone = alone and prompt is None
            yield prompt


class FallingEngine(FakeEngine):
    """Goes wrong after some prompts, as one with a corrupted cache. Its folder (`settings.model`) says after how many,
    and whether engines that are loaded later do so too."""

    def __init__(self, settings: EngineSettings) -> None:
        super().__init__(settings)
        folder = Path(settings.model)
        healed = (folder / "loaded").exists() and not (folder / "always").exists()
        (folder / "loaded").touch()
        self.left = 10**9 if healed else int((folder / "after").read_text())

    def answers(
        self, prompts: Iterator[Sequence[int] | None], label_ids: Sequence[int], ahead: int | None = None
    ) -> Iterator[Answer]:
        for answer in super().answers(prompts, label_ids, ahead):
            self.left -= 1
            yield answer if self.left > 0 else Answer(answer.index, tuple(reversed(answer.logprobs)), answer.cached)


class BelievingEngine(FakeEngine):
    """Calls everything Irrelevant but what has the query's words once more in its text: that is Related."""

    def answers(
        self, prompts: Iterator[Sequence[int] | None], label_ids: Sequence[int], ahead: int | None = None
    ) -> Iterator[Answer]:
        tokenizer = Tokenizer.from_str(tiny_tokenizer())
        for index, ids in enumerate(p for p in prompts if p is not None):
            self.busy_seconds += 0.001
            text, _, query = tokenizer.decode(list(ids)).rpartition("Query: ")
            p = (0.1, 0.6, 0.1, 0.2) if query.partition("\n")[0] in text else (0.1, 0.1, 0.1, 0.7)
            yield Answer(index, tuple(map(math.log, p)), 0)


class UnevenEngine(FakeEngine):
    """Slow on worker 0 of a cluster; the file `asked` of its folder (`settings.model`) tells of each shard."""

    def __init__(self, settings: EngineSettings) -> None:
        super().__init__(settings)
        self.asked = Path(settings.model) / "asked"
        self.slow = "worker0" in os.getcwd()

    def answers(
        self, prompts: Iterator[Sequence[int] | None], label_ids: Sequence[int], ahead: int | None = None
    ) -> Iterator[Answer]:
        began = time.time()
        for answer in super().answers(prompts, label_ids, ahead):
            if self.slow:
                time.sleep(0.3)
            yield answer
        if answer.index >= 12:  # no shard of the first-use check or of the noise sample
            with open(self.asked, "a") as asked:
                asked.write(json.dumps({"slow": self.slow, "began": began, "ended": time.time()}) + "\n")


class CountedEngine(FakeEngine):
    """Tells of each load in the file `loads` of its folder (`settings.model`)."""

    def __init__(self, settings: EngineSettings) -> None:
        super().__init__(settings)
        with open(self.folder / "loads", "a") as loads:
            loads.write("loaded\n")


class HungryEngine(FakeEngine):
    """Runs out of memory with more than 32 prompts in a step, as real ones do: inside the engine's own guard."""

    def __init__(self, settings: EngineSettings) -> None:
        super().__init__(settings)
        self.room = within_memory(settings, on_cpu=True).max_num_seqs

    def answers(
        self, prompts: Iterator[Sequence[int] | None], label_ids: Sequence[int], ahead: int | None = None
    ) -> Iterator[Answer]:
        with _broken_engine_ends_the_process():
            if self.room > 32:
                raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
        yield from super().answers(prompts, label_ids, ahead)


class DoomedEngine(FakeEngine):
    """Takes two milliseconds a prompt, and exits when the file `die` is in the folder `settings.model`.

    Not at the first prompt of a task: one that is alone, and dies twice, is taken for the cause.
    """

    def answers(
        self, prompts: Iterator[Sequence[int] | None], label_ids: Sequence[int], ahead: int | None = None
    ) -> Iterator[Answer]:
        for answer in super().answers(prompts, label_ids, ahead):
            time.sleep(0.002)
            if answer.index == 0 or not (self.folder / "die").exists():
                yield answer
                continue
            (self.folder / "die").unlink(missing_ok=True)
            with open(self.folder / "journal.jsonl", "a") as journal:
                journal.write(json.dumps({"kind": "engine", "at": time.time()}) + "\n")
            os._exit(70)


class SlowEngine(FakeEngine):
    """Takes two seconds a prompt; the file `asked` in its folder (`settings.model`) says that it has begun."""

    def answers(
        self, prompts: Iterator[Sequence[int] | None], label_ids: Sequence[int], ahead: int | None = None
    ) -> Iterator[Answer]:
        for answer in super().answers(prompts, label_ids, ahead):
            if answer.index >= 12:  # no prompt of the first-use check
                (self.folder / "asked").touch()
                time.sleep(2)
            yield answer


_loaded: dict[EngineSettings, FakeEngine] = {}


def _load(kind: type[FakeEngine], settings: EngineSettings) -> Engine:
    """One engine a worker process and settings, as the real loader does."""
    if settings not in _loaded:
        _loaded[settings] = kind(settings)
    return _loaded[settings]


# Workers find `_load` by its name, and with it the one `_loaded` of their process.
load_fake = partial(_load, FakeEngine)
load_drifting = partial(_load, DriftingEngine)
load_mortal = partial(_load, MortalEngine)
load_poisoned = partial(_load, PoisonedEngine)
load_falling = partial(_load, FallingEngine)
load_believing = partial(_load, BelievingEngine)
load_counted = partial(_load, CountedEngine)
load_uneven = partial(_load, UnevenEngine)
load_hungry = partial(_load, HungryEngine)
load_doomed = partial(_load, DoomedEngine)
load_slow = partial(_load, SlowEngine)
