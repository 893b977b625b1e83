"""A kill, or a full disk, before any chosen change of the disk.

Python reports its changes to audit hooks before it asks the system for them: files opened for writing, names
made, moved and removed, modes and times set. Not so a flush, nor what safetensors writes: these are wrapped.
Files are also left half written.
"""

import contextlib
import errno
import functools
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import safetensors.torch

CHANGES = frozenset("os.rename os.remove os.rmdir os.mkdir os.chmod os.utime os.truncate os.link".split())


class Killed(BaseException):
    """Stands for the end of the process: from here on no change reaches the disk, not even a clearing up."""


class Faults:
    """Counts the changes of the disk inside `with faults.before(n, strike)`, and strikes before number n."""

    def __init__(self, monkeypatch):
        self.at, self.strike, self.changes, self.killed = None, None, None, False
        sys.addaudithook(self._hear)  # it stays as long as the process
        monkeypatch.setattr(os, "fsync", self._flush)
        monkeypatch.setattr(Path, "write_text", functools.partialmethod(_in_halves, self, Path.write_text))
        monkeypatch.setattr(
            safetensors.torch, "save_file", functools.partial(self._save, safetensors.torch.save_file)
        )

    def kill(self) -> None:
        """Strike as kill -9 does, without the cost of a process."""
        self.killed = True
        raise Killed

    def exit(self) -> None:
        """Strike by the end of the process, for a fork: nothing is flushed or cleared up."""
        os._exit(77)

    def fill_disk(self) -> None:
        """Strike as the system does when nothing more can be written; the next change succeeds."""
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    @contextlib.contextmanager
    def before(self, number: int | None, strike: Callable[[], None] | None = None) -> Iterator[list[str]]:
        """Yield the list that the changes are noted in."""
        self.at, self.strike, self.changes, self.killed = number, strike, [], False
        try:
            yield self.changes
        finally:
            self.changes = None

    def reach(self, change: str, path: object) -> None:
        """Note a change that is about to be made, and strike if it is the one."""
        if self.changes is None or str(path).endswith(".lock"):
            return
        if self.killed:
            raise Killed
        self.changes.append(f"{change} {Path(str(path)).name}")
        if len(self.changes) == self.at:
            self.strike()

    def _hear(self, event: str, arguments: tuple) -> None:
        if self.changes is None:
            return
        if event in CHANGES or (event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)):
            self.reach(event, arguments[0])

    def _flush(self, handle: int) -> None:
        self.reach("os.fsync", handle)  # what has been written outlives a process without it

    def _save(self, save_file: Callable, tensors: dict, filename: str, metadata: dict | None = None) -> None:
        content = safetensors.torch.save(tensors, metadata)
        Path(filename).write_bytes(content[: len(content) // 2])
        self.reach("half written", filename)
        save_file(tensors, filename, metadata)


def _in_halves(path: Path, faults: Faults, write_text: Callable, text: str, **how: str) -> int:
    write_text(path, text[: len(text) // 2], **how)
    faults.reach("half written", path)
    return write_text(path, text, **how)


def exit_code_in_fork(function: Callable[[], object]) -> int:
    """Return how a fork of this process ends that calls the function: 0, or what `os._exit` was given."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            function()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
