"""Runs a command of Python's in a fork of a process that has the slow imports behind it.

Imports take most of a script's time in these tests. What is run is the script itself, by its own name, with
the arguments, environment and folder that a user would give. What the interpreter and the libraries read of
the environment as they start must be as it was then: libraries that ask the Hub are imported anew in another
environment of theirs (`HF_...`), and a test that tells the interpreter something needs a fresh one.
"""

import atexit
import functools
import gc
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import IO, TextIO

THOSE_WITHOUT_A_HUB = (
    "torch torchvision torch._dynamo sklearn.linear_model scipy.stats matplotlib.pyplot pandas"
)
THE_REST = (
    "hotdog_hf.training.loop hotdog_hf.report.page hotdog_hf.report.runner hotdog_hf.study.page"
    " hotdog_hf.study.runner hotdog_hf.deploy.export accelerate.commands.accelerate_cli"
)


class _Server:
    """A process that forks when asked, which only the main thread may do."""

    def __init__(self, requests: TextIO, answers: TextIO):
        self._requests, self._answers = requests, answers

    def ask(self, **request: object) -> int | None:
        self._requests.write(json.dumps(request) + "\n")
        self._requests.flush()
        return json.loads(self._answers.readline())


_uses: Counter[frozenset[tuple[str, str]]] = Counter()


@functools.cache
def _first_server() -> _Server:
    command = [sys.executable, __file__, *THOSE_WITHOUT_A_HUB.split()]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    atexit.register(server.kill)
    return _Server(server.stdin, server.stdout)


@functools.cache
def _server_with_the_rest(env: frozenset[tuple[str, str]]) -> _Server:
    """Fork a server from the first one that imports the rest in an environment; it ends when we do."""
    with tempfile.TemporaryDirectory() as folder:
        pipes = [Path(folder, name) for name in ("requests", "answers")]
        for pipe in pipes:
            os.mkfifo(pipe)
        requests, answers = map(str, pipes)
        _first_server().ask(requests=requests, answers=answers, env=dict(os.environ | dict(env)))
        return _Server(pipes[0].open("w"), pipes[1].open())


def _server_for(env: dict[str, str]) -> _Server:
    """Return the server with all imports, made in the environment of the Hub's clients.

    For an environment that is new, the script does the rest of the imports itself: many are used once.
    """
    ours = os.environ.items()
    hub = frozenset(pair for pair in env.items() if pair[0].startswith("HF_") and pair not in ours)
    _uses[hub] += 1
    return _server_with_the_rest(hub) if not hub or _uses[hub] > 3 else _first_server()


class Process:
    """Runs the Python file words[0] with `env` on top of the environment; used like a `subprocess.Popen`.

    It leads a process group of its own.
    """

    def __init__(self, words: list[str], cwd: Path, env: dict[str, str]):
        self._server = _server_for(env)
        self._scratch = tempfile.TemporaryDirectory()
        self._outputs = [Path(self._scratch.name, name) for name in ("out", "err")]
        out, err = map(str, self._outputs)
        self.words, self.returncode = words, None
        self.pid = self._server.ask(words=words, cwd=str(cwd), env=dict(os.environ | env), out=out, err=err)

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = self._server.ask(poll=self.pid)
        return self.returncode

    def wait(self, timeout: float = 600) -> int:
        end, pause = time.monotonic() + timeout, 0.001
        while self.poll() is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired(self.words, timeout)
            time.sleep(pause)
            pause = min(2 * pause, 0.05)
        return self.returncode

    def communicate(self, timeout: float = 600) -> tuple[str, str]:
        self.wait(timeout)
        return tuple(path.read_text() for path in self._outputs)

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)


def run_forked(
    words: list[str], cwd: Path, timeout: float, env: dict[str, str]
) -> subprocess.CompletedProcess:
    """Run the Python file words[0] as `subprocess.run` does, with `env` on top of the environment."""
    process = Process(words, cwd, env)
    try:
        return subprocess.CompletedProcess(words, process.wait(timeout), *process.communicate())
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise


def _serve(requests: TextIO, answers: TextIO) -> None:
    gc.freeze()  # no fork has to look through the imports for garbage
    for line in requests:
        request = json.loads(line)
        if "poll" in request:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        else:
            answer = os.fork()
            if answer == 0:
                (_become if "words" in request else _serve_with_the_rest)(**request)
        print(json.dumps(answer), file=answers, flush=True)


def _serve_with_the_rest(requests: str, answers: str, env: dict[str, str]) -> None:
    with Path(requests).open() as asked, Path(answers).open("w") as answered:
        os.environ.clear()
        os.environ.update(env)
        for name in THE_REST.split():
            __import__(name)
        sys.modules["datasets"].config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0.5  # after each pass over shards
        _serve(asked, answered)
    os._exit(0)


def _become(words: list[str], cwd: str, env: dict[str, str], out: str, err: str) -> None:
    os.setsid()  # so that it can be ended with all that it starts
    # As on a terminal: what a shell starts in the background ignores Ctrl-C, and all that starts does too.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    files = (
        os.open(os.devnull, os.O_RDONLY),
        *(os.open(file, os.O_WRONLY | os.O_CREAT) for file in (out, err)),
    )
    for number, file in enumerate(files):
        os.dup2(file, number)
    os.chdir(cwd)
    if Path(words[0]).name in ("accelerate", "benchmark.py"):  # which start scripts
        subprocess.Popen = _popen
    _run(words, env)


def _run(words: list[str], env: dict[str, str]) -> None:
    """Run a Python file as this process's program, and exit as it does."""
    os.environ.clear()
    os.environ.update(env)
    sys.argv, sys.path[0] = words, str(Path(words[0]).parent)
    code = 0
    try:
        runpy.run_path(words[0], run_name="__main__")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


class _ForkedPopen:
    """What a launcher uses of `subprocess.Popen`, for a Python file that runs in a fork of the launcher."""

    def __init__(
        self, args: list[str], env: dict[str, str], start_new_session: bool, outputs: list[IO | None]
    ):
        sys.stdout.flush()
        sys.stderr.flush()
        self.args, self.returncode, self.pid = args, None, os.fork()
        if self.pid == 0:
            if start_new_session:
                os.setsid()
            for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):  # the launcher's are not inherited
                signal.signal(number, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            for number, file in enumerate(outputs, start=1):
                if file:
                    os.dup2(file.fileno(), number)
            atexit._clear()  # what the launcher cleans up is its own
            subprocess.Popen = _REAL_POPEN
            _run(args, env)

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        end = None if timeout is None else time.monotonic() + timeout
        while self.poll() is None:
            if end is not None and time.monotonic() > end:
                raise subprocess.TimeoutExpired(self.args, timeout)
            time.sleep(0.01)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


_REAL_POPEN = subprocess.Popen


def _popen(args: Sequence[str], **options: object) -> subprocess.Popen | _ForkedPopen:
    """Start a process, a Python file in a fork of this one: its imports are the launcher's."""
    words = [word for word in args if word != "-u"] if isinstance(args, (list, tuple)) else [""]
    outputs = [options.get(name) for name in ("stdout", "stderr")]
    piped = any(isinstance(output, int) for output in outputs)
    if words[0] != sys.executable or not words[1].endswith(".py") or piped:
        return _REAL_POPEN(args, **options)
    return _ForkedPopen(words[1:], dict(options["env"]), bool(options.get("start_new_session")), outputs)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        __import__(name)
    _serve(sys.stdin, sys.stdout)
