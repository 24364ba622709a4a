"""A short storm of kills over nightly and backfill; bench/chaos.py has the long one, and the one on a cluster."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.conftest import REPO


@pytest.mark.slow
def test_nightly_and_backfill_beside_each_other_survive_a_kill_of_each_kind(tmp_path: Path) -> None:
    words = ["--folder", str(tmp_path), "--kills", "0", "--least", "1", "--pairs", "60", "--minutes", "10"]
    ended = subprocess.run(
        [sys.executable, "-m", "bench.chaos", *words], cwd=REPO, capture_output=True, text=True, timeout=900
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr[-3000:]
    fired = Counter(json.loads(line)["kind"] for line in (tmp_path / "journal.jsonl").read_text().splitlines())
    assert set(fired) == {"driver", "executor", "worker", "engine"}
    assert "breaches: 0" in ended.stdout
