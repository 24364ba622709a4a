"""Ends the processes of an engine over several GPUs together with the worker that started them.

vLLM starts one process a GPU. Each looks whether its parent lives, but only after its weights are loaded, and only to
leave its loop, which one that waits in a collective call never does: its GPU's memory would stay taken. The kernel ends
it at any time. vLLM imports this module in each of these processes, and nothing else does.
"""

from __future__ import annotations

import ctypes
import signal

_PR_SET_PDEATHSIG = 1

ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


class Leash:
    """All that is wanted of `worker_extension_cls` is that it is imported."""
