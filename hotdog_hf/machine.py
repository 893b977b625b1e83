"""The machine: cores to use, memory, and a cache folder."""

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
    """Return the CPU quota of this process's control groups in cores, or None without a limit.

    It is the limit of `docker run --cpus`, Kubernetes and systemd, not part of the affinity. Both versions
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
    """Return the signals that tell a run to stop, those that this system has."""
    names = ("SIGTERM", "SIGINT", "SIGUSR1")  # Windows has no SIGUSR1, which SLURM warns with
    return [signal.Signals[name] for name in names if hasattr(signal, name)]


def cpu_requested() -> bool:
    """Return whether `accelerate launch --cpu` started this process, which then uses no GPU."""
    return os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("true", "1", "yes", "on")


def cpu_has_bf16() -> bool:
    """Return whether the CPU has native bf16 arithmetic, as server CPUs since about 2022 do.

    Others are many times slower in it. Detected only on Linux.
    """
    with contextlib.suppress(OSError):
        about = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        return re.search(r"\b(avx512_bf16|amx_bf16|svebf16|bf16)\b", about) is not None
    return False


def cache_dir() -> Path:
    """Return `~/.cache/hotdog_hf`, or the same below `XDG_CACHE_HOME`.

    A user without a home, as with `docker run --user`, gets a path that cannot be created: caches only save
    time, and anybody could write to one in a shared folder.
    """
    if cache_home := os.environ.get("XDG_CACHE_HOME"):
        return Path(cache_home) / "hotdog_hf"
    try:
        return Path.home() / ".cache" / "hotdog_hf"
    except RuntimeError:
        return Path(os.devnull) / "hotdog_hf"


def keep_freed_memory() -> None:
    """Keep freed memory for reuse, which glibc would return to the system at once if the block is large.

    A network on a CPU would pay for their page faults in every layer: without them a training step of
    ResNet-18 on 128 photos takes 0.8 of the time, with half as much memory again at its peak.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)  # never: a step can free more than the 2 GB that fit its int
