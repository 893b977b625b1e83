"""The exception for mistakes that the user can fix, and how a script exits on it."""

import contextlib
import gc
import io
import os
import re
import select
import sys
from collections.abc import Iterator

# Container objects created between two searches for unreachable ones; Python's own number is 700 or 2,000. A
# sixth of the time that torch and timm take to import went into searching, and nothing was found.
OBJECTS_BETWEEN_COLLECTIONS = 100_000

# 128 and the number of SIGINT or SIGPIPE, which Windows has not.
INTERRUPTED, PIPE_BROKEN = 130, 141


class UserError(Exception):
    """A mistake that the user can fix; the message names the file or value, the problem, and what to do."""


def message_of(error: UserError) -> str:
    """Return the message in one line; the error of a loader process arrives with a traceback above it."""
    text = str(error)
    if "Traceback (most recent call last)" in text:
        text = re.sub(r"^hotdog_hf(\.\w+)+: ", "", text.strip().splitlines()[-1])
    return printable(text)


def printable(text: str) -> str:
    """Return the text with line breaks, escape sequences and undecodable bytes written out."""
    return text if text.isprintable() else repr(text)[1:-1]


@contextlib.contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Exit with one line on stderr and exit code 2, without a traceback, if a `UserError` is raised.

    Ctrl-C and a reader that stops reading the output, as `| head` does, end a script without a traceback too,
    with the exit codes that a shell gives them. Characters that the output's encoding lacks (a class "süß" in
    an ASCII locale) are printed as escapes, and the garbage collector is told to look seldom.
    """
    gc.set_threshold(OBJECTS_BETWEEN_COLLECTIONS)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        try:
            yield
        finally:
            print(end="", flush=True)  # what a buffer holds may break the pipe too
    except KeyboardInterrupt:
        raise SystemExit(INTERRUPTED) from None
    except BrokenPipeError as error:
        if not _output_is_broken():
            raise
        raise SystemExit(PIPE_BROKEN) from error
    except UserError as error:
        rank = os.environ.get("RANK", "0")
        prefix = "error" if rank == "0" else f"error (process {rank})"
        print(f"{prefix}: {message_of(error)}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None


def _output_is_broken() -> bool:
    """Return whether nobody reads the output any more; what is left to print then goes nowhere."""
    if os.name == "nt":
        return False
    waiting = select.poll()
    waiting.register(sys.stdout.fileno(), 0)
    broken = any(events & select.POLLERR for _, events in waiting.poll(0))
    if broken:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return broken
