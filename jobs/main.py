"""The one main file: runs the job that its first argument names.

spark-submit … --py-files taosr1.zip jobs/main.py JOB [--flag value …]

Exit codes: 0 done; 1 failed; 2 a flag, file or table was wrong and nothing was done; 3 a gate failed.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import sys

# spark-submit puts this file's own folder on the path, where `sql.py` or `check.py` would shadow others' modules; the
# project's packages come from --py-files, or from the folder above in a checkout.
_HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:] = [entry for entry in sys.path if os.path.abspath(entry or ".") != _HERE]
if os.path.isdir(os.path.join(os.path.dirname(_HERE), "schemas")):
    sys.path.insert(0, os.path.dirname(_HERE))

import jobs  # noqa: E402


def names() -> list[str]:
    """Every job there is: the files of this package."""
    return sorted(m.name for m in pkgutil.iter_modules(jobs.__path__) if m.name != "main")


def usage() -> str:
    """The list of jobs, each with the first line of its file."""
    lines = ["usage: JOB [--flag value …]; `JOB --help` explains itself. The jobs:"]
    for name in names():
        summary = (importlib.import_module(f"jobs.{name}").__doc__ or "").strip().splitlines()[0]
        lines.append(f"  {name:<20} {summary}")
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    """Runs `argv[0]` with the rest; returns the exit code."""
    if not argv or argv[0] not in names():
        if argv and argv[0] not in ("-h", "--help"):
            print(f"there is no job {argv[0]!r}", file=sys.stderr)
        print(usage(), file=sys.stderr)
        return 0 if argv and argv[0] in ("-h", "--help") else 2
    try:
        return int(importlib.import_module(f"jobs.{argv[0]}").main(argv[1:]))
    except ValueError as error:
        print(f"{argv[0]}: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        print(f"{argv[0]}: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
