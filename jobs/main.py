"""The one main file: runs the job that its first argument names, or several, one behind the other.

spark-submit … --py-files taosr1.zip jobs/main.py JOB [--flag value …] [then JOB [--flag value …] …]

Jobs with `then` between them are one application: Spark starts once, and an engine stays for the next job that wants
the same one within a minute. Each begins only when the one before ended with 0; all their flags are read, and the
models that these name by a folder are looked at, before the first begins. How long each took stands at the end of the
errors' stream.
Exit codes: 0 done; 1 failed; 2 a flag, file or table was wrong and nothing was done; 3 a gate failed; 4 given up after
faults that did not go away; 5 ended early, as asked (--deadline); 130 a Ctrl-C. The last line of a job is one JSON
object: job, exit, error, and of its run the run_id, status, message, counts and figures. (`sql` answers with rows and
has no such line.)
"""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import signal
import sys
import time
import traceback
from datetime import datetime

# spark-submit puts this file's own folder on the path, where `sql.py` or `check.py` would shadow others' modules; the
# project's packages come from --py-files, or from the folder above in a checkout.
_HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:] = [entry for entry in sys.path if os.path.abspath(entry or ".") != _HERE]
if os.path.isdir(os.path.join(os.path.dirname(_HERE), "schemas")):
    sys.path.insert(0, os.path.dirname(_HERE))

from py4j.protocol import Py4JError  # noqa: E402
from pyspark.errors import PySparkException, PythonException  # noqa: E402

import jobs  # noqa: E402
from jobs import DONE, FAILED, GATE_FAILED, GAVE_UP, INTERRUPTED, STOPPED, USAGE  # noqa: E402
from partitioner import engines, waves  # noqa: E402
from schemas import runs  # noqa: E402
from schemas.delta import GaveUp  # noqa: E402

THEN = "then"


def names() -> list[str]:
    """Every job there is: the files of this package."""
    return sorted(m.name for m in pkgutil.iter_modules(jobs.__path__) if m.name != "main")


def usage() -> str:
    """The list of jobs, each with the first line of its file."""
    lines = ["usage: JOB [--flag value …] [then JOB …]; `JOB --help` explains itself. The jobs:"]
    for name in names():
        summary = (importlib.import_module(f"jobs.{name}").__doc__ or "").strip().splitlines()[0]
        lines.append(f"  {name:<20} {summary}")
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    """Runs the jobs; returns the exit code of the last one that ran."""
    if argv[:1] in (["-h"], ["--help"]):
        print(usage(), file=sys.stderr)
        return DONE
    there, commands = names(), apart(argv)
    for command in commands:
        if not command or command[0] not in there:
            wrong = f"there is no job {command[0]!r}" if command else "a job is missing"
            print(wrong, usage(), sep="\n", file=sys.stderr)
            return USAGE
    jobs.began = datetime.now() if len(commands) > 1 else None
    if len(commands) == 1:
        return run(commands[0])
    made: list[str] = []  # folders of models that a job makes for those behind it
    for job, *words in commands:
        try:
            args = importlib.import_module(f"jobs.{job}").flags().parse_args(words)
            jobs.look_ahead(args, made)
            made += [os.path.abspath(out)] if (out := getattr(args, "out", None)) else []
        except ValueError as error:
            print(f"{job}: {error}", file=sys.stderr)
            print(last_line(job, USAGE, str(error)), flush=True)
            return USAGE
    code, took = DONE, []
    for command in commands:
        if not code and waves.stop_asked.is_set():  # at a moment when the job before was about to end
            code, runs.last = STOPPED, None
            print(last_line(command[0], code, "not begun: asked to end (SIGTERM)"), flush=True)
        if code:
            took.append(f"        {command[0]}: not begun")
            continue
        print(f"\n== {command[0]}", flush=True)  # its words may hold what no log should
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the job before may have taken it for itself
        began = time.monotonic()
        code = run(command)
        took.append(f"{time.monotonic() - began:5.0f} s  {command[0]}")
    print("\nEach job took:", *took, sep="\n", file=sys.stderr, flush=True)
    return code


def apart(argv: list[str]) -> list[list[str]]:
    """The words of each job, between which `then` stands."""
    commands: list[list[str]] = [[]]
    for word in argv:
        if word == THEN:
            commands.append([])
        else:
            commands[-1].append(word)
    return commands


def run(command: list[str]) -> int:
    """Runs one job and tells its end; returns its exit code."""
    job, *words = command
    code, error = ended(job, words)
    if error:
        print(f"{job}: {error}", file=sys.stderr)
    if job != "sql":
        print(last_line(job, code, error), flush=True)
    return code


def ended(job: str, flags: list[str]) -> tuple[int, str | None]:
    """Exit code of a job, and what went wrong, in a sentence."""
    runs.last = engines.left_alone = None
    try:
        return int(importlib.import_module(f"jobs.{job}").main(flags)), None
    except ValueError as error:
        if runs.last is None:
            return USAGE, str(error)
        if not isinstance(error, runs.Unmet) and runs.last.status != "done":
            traceback.print_exc()  # a run had begun, so it was no flag or file, but a mistake of ours
        return FAILED, str(error)
    except (PySparkException, Py4JError) as error:
        if engines.left_alone:
            return GAVE_UP, engines.left_alone
        line, text = runs.in_a_line(error), str(error)
        text = text if text.startswith(line) else f"{line}\n{text}"
        # Spark has tried a task four times by then. Its error is a page of Java; what a worker said stands in there.
        given_up = isinstance(error, PythonException) or "Job aborted" in text or "Task failed" in text
        return (GAVE_UP if given_up else FAILED), text
    except GaveUp as error:
        return GAVE_UP, str(error)
    except waves.Stopped as stopped:
        return STOPPED, str(stopped)
    except waves.TooManyRefused as error:
        return GATE_FAILED, str(error)
    except RuntimeError as error:
        return (GAVE_UP, engines.left_alone) if engines.left_alone else (FAILED, str(error))
    except KeyboardInterrupt:
        return INTERRUPTED, "interrupted (Ctrl-C)"
    except Exception as error:  # a full disk, or a mistake of ours: whoever mends it needs to see where
        traceback.print_exc()
        return FAILED, f"{type(error).__name__}: {error}"


def last_line(job: str, code: int, error: str | None) -> str:
    """What became of the job, for whoever started it: one line of JSON."""
    told: dict[str, object] = {"job": job, "exit": code}
    if error:
        told["error"] = error.strip().splitlines()[0]
    if run := runs.last:
        told |= {name: getattr(run, name) for name in ("run_id", "status", "message", "counts", "figures")}
    return json.dumps({name: value for name, value in told.items() if value not in (None, {})}, ensure_ascii=False)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
