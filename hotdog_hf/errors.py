"""The one exception that means "you can mend this", and how a script ends on it."""

import contextlib
import os
import sys
from collections.abc import Iterator


class UserError(Exception):
    """A mistake the user can mend; the message names the file or value, the fault, and what to do next."""


@contextlib.contextmanager
def exit_on_user_error() -> Iterator[None]:
    """End the script with one line on stderr and exit code 2 where a `UserError` reaches it; no traceback."""
    try:
        yield
    except UserError as error:
        rank = os.environ.get("RANK", "0")
        prefix = "error" if rank == "0" else f"error (process {rank})"
        # A loader worker's error arrives with its traceback in the text; the message is the last line.
        message = str(error).strip().splitlines()[-1].removeprefix(f"{UserError.__module__}.UserError: ")
        print(f"{prefix}: {message}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None
