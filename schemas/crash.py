"""Kills this process at a named step, for the tests of what a kill leaves behind.

TAOSR1_CRASH=merged:2 kills it when it comes to the step `merged` for the second time. Unset, as ever outside those
tests, a step costs one look at a constant.
"""

from __future__ import annotations

import os
import signal

# The steps of a night, in their order; `commit` and `committed` stand around each Delta commit.
POINTS = (
    "started", "commit", "committed", "planned", "landed", "checked", "merged", "told", "batch", "streamed", "finished",
)  # fmt: skip
_POINT, _, _COUNT = os.environ.get("TAOSR1_CRASH", "").partition(":")
_seen = 0


def crash(point: str) -> None:
    """Step `point` is reached."""
    global _seen
    if point != _POINT:
        return
    _seen += 1
    if _seen == int(_COUNT or 1):
        os.kill(os.getpid(), signal.SIGKILL)
