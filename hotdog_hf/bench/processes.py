"""Measured processes: start, watch, time, end.

Imports no torch: the waiting process must take neither time nor memory.
"""

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hotdog_hf.machine import cache_dir

POLL_SECONDS = 0.02
# Environment of every measured process: unbuffered output, and no time spent on the Hub.
ENVIRONMENT = {"PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}


# Processes.


class MeasurementError(Exception):
    """A measured process failed; the message has its last line of output."""


@dataclass(frozen=True)
class FinishedProcess:
    """A process that has exited: its start, its seconds, and the rows that it wrote with their times."""

    command: str
    started_at: float
    seconds: float
    until_seconds: float | None
    rows: list[tuple[float, dict]]


def run_process(
    words: list[str],
    folder: Path,
    *,
    rows_file: Path | None = None,
    until: Callable[[], bool] | None = None,
    env: dict[str, str] | None = None,
) -> FinishedProcess:
    """Run a command to its end and measure it; its output goes to `folder`.

    `rows_file` is a file of JSON lines that it writes (None: its output); each line is kept with its time.
    When `until` becomes true, the time is kept and the process is terminated.
    """
    out, errors = folder / "output.txt", folder / "errors.txt"
    command = shlex.join(["python" if word == sys.executable else word for word in words])
    rows: list[tuple[float, dict]] = []
    until_seconds = None
    with out.open("wb") as out_file, errors.open("wb") as error_file:
        started_at, started = time.time(), time.perf_counter()
        process = subprocess.Popen(
            words,
            stdout=out_file,
            stderr=error_file,
            env=os.environ | ENVIRONMENT | (env or {}),
            start_new_session=True,  # so that it can be killed with all its children
        )
        try:
            while True:
                code = process.poll()
                seconds = time.perf_counter() - started
                rows += [(seconds, row) for row in _json_lines(rows_file or out)[len(rows) :]]
                if until and until_seconds is None and until():
                    until_seconds = seconds
                    process.terminate()  # does nothing if it has exited
                if code is not None:
                    break
                time.sleep(POLL_SECONDS)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise
    text = errors.read_text(encoding="utf-8", errors="replace")
    if until_seconds is None and (code or until):
        said = [line for line in text.splitlines() if line.strip()] or ["no output"]
        lines = [line for line in said if line.startswith("error")] or said
        raise MeasurementError(f"`{command}` exited with {code}: {lines[-1]}")
    return FinishedProcess(
        command=command,
        started_at=started_at,
        seconds=seconds,
        until_seconds=until_seconds,
        rows=rows,
    )


def fresh_cache(folder: Path) -> dict[str, str]:
    """Return the environment of a process without hotdog_hf's caches, but with those of the libraries."""
    before = cache_dir().parent
    hub = os.environ.get("HF_HOME") or str(before / "huggingface")
    fonts = os.environ.get("MPLCONFIGDIR") or str(before / "matplotlib")
    return {"XDG_CACHE_HOME": str(folder.resolve()), "HF_HOME": hub, "MPLCONFIGDIR": fonts}


def _json_lines(file: Path) -> list[dict]:
    """Return the complete lines of a file that are JSON objects."""
    try:
        text = file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    rows = []
    for line in text.splitlines(keepends=True):
        if line.startswith("{") and line.endswith("\n"):
            with contextlib.suppress(ValueError):
                rows.append(json.loads(line))
    return rows


def task_command(name: str, /, **knobs: object) -> list[str]:
    """Return the command that runs a part of `hotdog_hf.bench.tasks`."""
    return [sys.executable, "-m", "hotdog_hf.bench.tasks", name, json.dumps(knobs)]


def task_result(finished: FinishedProcess) -> dict:
    """Return the result that a task printed."""
    return finished.rows[-1][1]
