"""What this machine offers: cores to use, memory, and a place to keep things."""

import contextlib
import ctypes
import math
import os
import re
import signal
import sys
from pathlib import Path, PurePosixPath

# glibc's own numbers for `mallopt`, from malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


def allowed_cores() -> int:
    """Return the number of cores that this process may use: all, those it is bound to, or its CPU quota's."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cpu_quota()
    return cores if quota is None else max(min(cores, math.ceil(quota)), 1)


def cpu_quota(root: Path = Path("/")) -> float | None:
    """Return how many cores' time the control groups of this process get, or None without a limit.

    Such are the limits of `docker run --cpus`, Kubernetes and systemd, which no affinity shows. Both versions
    of Linux's control groups are read (https://docs.kernel.org/admin-guide/cgroup-v2.html), below `root`.
    """
    quotas = []
    with contextlib.suppress(OSError):  # not on every system
        for line in (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and "cpu" not in controllers.split(","):
                continue
            mount = root / "sys/fs/cgroup" / ("cpu" if controllers else "")
            group = PurePosixPath(path).relative_to("/")
            # A group has at most what the groups around it have.
            quotas += [_quota_of(mount / folder) for folder in (group, *group.parents)]
    return min((quota for quota in quotas if quota is not None), default=None)


def _quota_of(group: Path) -> float | None:
    """Return the quota of one control group: of version 2 (one file) or 1 (two files)."""
    for names in (["cpu.max"], ["cpu.cfs_quota_us", "cpu.cfs_period_us"]):
        with contextlib.suppress(OSError, ValueError):  # absent, or "max"
            text = " ".join((group / name).read_text(encoding="utf-8") for name in names)
            quota, period = map(int, text.split())
            return quota / period if quota > 0 else None
    return None


def stop_signals() -> list[signal.Signals]:
    """Return the signals by which a run is told to stop, as far as this system has them."""
    names = ("SIGTERM", "SIGINT", "SIGUSR1")  # Windows has no SIGUSR1, which SLURM warns with
    return [signal.Signals[name] for name in names if hasattr(signal, name)]


def cpu_requested() -> bool:
    """Tell whether `accelerate launch --cpu` started this process, which then leaves a GPU alone."""
    return os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("true", "1", "yes", "on")


def cpu_has_bf16() -> bool:
    """Tell whether the CPU multiplies in bf16 itself, as server CPUs since about 2022 do.

    Others take many times longer for it. Only Linux is asked.
    """
    with contextlib.suppress(OSError):
        about = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        return re.search(r"\b(avx512_bf16|amx_bf16|svebf16|bf16)\b", about) is not None
    return False


def cache_dir() -> Path:
    """Return `~/.cache/hotdog_hf`, or the same below `XDG_CACHE_HOME`.

    A user without a home, as with `docker run --user`, gets a folder that cannot be made: caches save time,
    nothing else, and one in a folder of everybody's could be anybody's.
    """
    if cache_home := os.environ.get("XDG_CACHE_HOME"):
        return Path(cache_home) / "hotdog_hf"
    try:
        return Path.home() / ".cache" / "hotdog_hf"
    except RuntimeError:
        return Path(os.devnull) / "hotdog_hf"


def keep_freed_memory() -> None:
    """Let freed blocks be used again, where glibc gives large ones back to the system at once.

    A network on a CPU would pay for their page faults in every layer: without them a training step of
    ResNet-18 on 128 photos takes 0.8 of the time, with half as much memory again at its peak.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)  # never: a step can free more than the 2 GB that fit its int
