"""What this machine offers: cores to use, and a place to keep things."""

import os
from pathlib import Path


def allowed_cores() -> int:
    """Return the number of cores that this process may use, which is fewer in a container than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cache_dir() -> Path:
    """Return `~/.cache/hotdog_hf`, or the same below `XDG_CACHE_HOME`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hotdog_hf"
