"""Train where Python lacks what Linux has: these names are hidden from the package, not from the libraries.

    python tests/elsewhere.py <flags of scripts/train.py>

Loader processes are spawned, as on Windows and macOS.
"""

import importlib
import multiprocessing
import os
import pkgutil
import signal
import sys
import types

# What Windows lacks of these modules; the package is to use it only if it is there.
KEPT_SIGNALS = {"SIGABRT", "SIGFPE", "SIGILL", "SIGINT", "SIGSEGV", "SIGTERM", "SIG_DFL", "SIG_IGN"}
HIDDEN = {
    signal: {name for name in dir(signal) if name.startswith("SIG")} - KEPT_SIGNALS,
    os: set(
        "sched_getaffinity fork setsid killpg getuid geteuid getgid getpgid getpgrp getloadavg nice sysconf"
        " mkfifo statvfs O_DIRECTORY".split()
    ),
    sys: set(),
}
MISSING = ("resource", "fcntl", "pwd", "grp", "termios", "tty")
SAID = {sys: {"platform": "win32"}, os: {"name": "nt"}}


class Windowed(types.ModuleType):
    """A module without some of its names."""

    def __init__(self, module):
        super().__init__(module.__name__)
        self.__dict__["_module"] = module

    def __getattr__(self, name):
        module = self.__dict__["_module"]
        if name in HIDDEN[module]:
            raise AttributeError(f"this system's {module.__name__} has no {name}")
        return SAID.get(module, {}).get(name) or getattr(module, name)


def open_file(path, *args, **kwargs):
    """Open as Windows does: no folder."""
    if os.path.isdir(path):  # noqa: PTH112
        raise PermissionError(13, "Permission denied", path)
    return os.open(path, *args, **kwargs)


def import_package():
    """Import every module of the package anew, each without what this system lacks."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "hotdog_hf"]:
        del sys.modules[name]
    stand_ins = {module.__name__: Windowed(module) for module in HIDDEN}
    stand_ins["os"].__dict__["open"] = open_file
    before = {name: sys.modules.get(name) for name in (*stand_ins, *MISSING)}
    sys.modules.update(stand_ins | dict.fromkeys(MISSING))  # None: the import fails
    try:
        package = importlib.import_module("hotdog_hf")
        for module in pkgutil.walk_packages(package.__path__, "hotdog_hf."):
            importlib.import_module(module.name)
    finally:
        sys.modules.update({name: module for name, module in before.items() if module})
        for name in MISSING:
            if not before[name]:
                del sys.modules[name]


def main(flags):
    """Import and train."""
    # All that the package uses is imported already, so that it keeps its own names.
    for name in [name for name in list(sys.modules) if name.startswith("hotdog_hf")]:
        importlib.import_module(name)
    import_package()
    multiprocessing.set_start_method("spawn", force=True)
    from hotdog_hf import machine
    from hotdog_hf.config import parse_train_config
    from hotdog_hf.training import launch, loop

    assert [signal.name for signal in machine.stop_signals()] == ["SIGTERM", "SIGINT"]
    config = parse_train_config(flags)
    accelerator = launch.build_accelerator("no", num_threads=1)
    print("trained in", loop.train(config, accelerator, launch.StopSignal()))


if __name__ == "__main__":
    main(sys.argv[1:])
