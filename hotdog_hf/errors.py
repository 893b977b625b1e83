"""The one exception that means "you can mend this", and how a script ends on it."""

import contextlib
import io
import os
import re
import sys
from collections.abc import Iterator


class UserError(Exception):
    """A mistake the user can mend; the message names the file or value, the fault, and what to do next."""


def message_of(error: UserError) -> str:
    """Return the message in one line; a loader worker's error arrives with its traceback above it."""
    text = str(error)
    if "Traceback (most recent call last)" in text:
        text = re.sub(r"^hotdog_hf(\.\w+)+: ", "", text.strip().splitlines()[-1])
    return printable(text)


def printable(text: str) -> str:
    """Return the text with line breaks, escape sequences and undecodable bytes written out."""
    return text if text.isprintable() else repr(text)[1:-1]


@contextlib.contextmanager
def exit_on_user_error() -> Iterator[None]:
    """End the script with one line on stderr and exit code 2 where a `UserError` reaches it; no traceback.

    Characters that the output's encoding lacks (a class "süß" in an ASCII locale) are printed as escapes.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        yield
    except UserError as error:
        rank = os.environ.get("RANK", "0")
        prefix = "error" if rank == "0" else f"error (process {rank})"
        print(f"{prefix}: {message_of(error)}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None
