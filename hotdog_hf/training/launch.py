"""The processes of a run: the Accelerator, devices, threads, precision, trackers, stop signals."""

import contextlib
import datetime
import gc
import importlib.util
import itertools
import os
import platform
import signal
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import psutil
import timm
import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list
from torch.optim.swa_utils import AveragedModel

from hotdog_hf.errors import UserError
from hotdog_hf.machine import (
    allowed_cores,
    cpu_has_bf16,
    cpu_requested,
    keep_freed_memory,
    stop_signals,
)
from hotdog_hf.training import sharding

# At most so many loader processes per GPU: 16 cores decoded 3,500 photos of 500 pixels a second.
MAX_WORKERS = 16
# On a CPU, one loader process per so many cores; with fewer cores the loop itself decodes between steps.
CORES_A_WORKER = 16
# How long processes wait for one that checks or downloads photos for all of them; NCCL's own is 10 minutes.
PATIENCE = datetime.timedelta(hours=6)


def build_accelerator(
    precision: str = "auto",
    tracker: str = "none",
    num_threads: int | None = None,
    deterministic: bool = False,
    may_shard: bool = False,
) -> Accelerator:
    """Create the Accelerator for the hardware at hand, with exactly the processes that were launched.

    `precision` "auto" is that of `accelerate launch`, else bf16 on a GPU with bf16 units, else float32: on a
    CPU without such units bf16 was 60 times slower. Raises `UserError` if processes do not see each other.
    """
    on_cpu = cpu_requested() or not torch.accelerator.is_available()
    if precision == "auto":
        precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        if precision == "no" and not on_cpu and gpu_has_bf16():
            precision = "bf16"
    if precision in ("fp16", "tf32") and on_cpu:
        raise UserError(
            f"--precision {precision} does nothing on a CPU; use --precision no, or bf16 on CPUs with bf16"
        )
    if os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower() != "no":
        raise UserError("instead of the launcher's --dynamo_backend give --compile to scripts/train.py")
    for way in ("DEEPSPEED", "MEGATRON_LM"):
        if os.environ.get(f"ACCELERATE_USE_{way}", "false").lower() == "true":
            raise UserError(
                f"the launcher's {way} is not supported; for a large network use configs/fsdp.yaml"
            )
    fsdp_plugin = sharding.plugin()
    if fsdp_plugin and not may_shard:
        raise UserError("only scripts/train.py shards a network (FSDP); launch this without it")
    if fsdp_plugin and precision == "fp16":
        raise UserError("--precision fp16 does not work with FSDP; use bf16 or no")
    # Torch's default is TF32 in convolutions and float32 elsewhere.
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    if tracker != "none" and importlib.util.find_spec(tracker) is None:
        # accelerate itself would continue without it
        raise UserError(f'--tracker {tracker} is not installed: pip install -e ".[{tracker}]"')
    accelerator = Accelerator(
        cpu=on_cpu,  # without it, processes launched for a machine that has no GPU would not find each other
        mixed_precision="no" if precision == "tf32" else precision,
        fsdp_plugin=fsdp_plugin,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
        log_with=None if tracker == "none" else tracker,
        project_dir=".",  # until the run's folder is known
    )
    wanted = _launched_processes()
    if wanted != accelerator.num_processes:
        raise UserError(
            f"{wanted} processes were asked for, but this one sees {accelerator.num_processes}; use"
            " `accelerate launch --config_file accelerate_config.yaml --num_processes N scripts/train.py`"
        )
    if fsdp_plugin and accelerator.num_processes == 1:
        raise UserError("FSDP shards a network over several processes: use --num_processes 2 or more")
    if fsdp_plugin and on_cpu:
        sharding.shard_on_cpu(accelerator, fsdp_plugin)
    if precision == "fp16":  # its first steps are skipped until the loss scale fits; the schedule counts them
        warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # required by cuBLAS
        torch.use_deterministic_algorithms(True)
    if on_cpu:
        torch.set_num_threads(num_threads or _default_threads())
        keep_freed_memory()
    return accelerator


def _default_threads() -> int:
    """Return this process's share of the cores; `accelerate launch` sets OMP_NUM_THREADS=1 everywhere."""
    cores = min(psutil.cpu_count(logical=False) or allowed_cores(), allowed_cores())
    return max((cores - _cpu_workers()) // _local_processes(), 1)


def _cpu_workers() -> int:
    """Return how many cores decode photos while the others compute."""
    return allowed_cores() // CORES_A_WORKER


def _local_processes() -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _launched_processes() -> int:
    """Return how many processes the launcher was asked for.

    `accelerate launch --cpu --num_processes 2` starts one and tells it nothing: its command line is read.
    """
    if "WORLD_SIZE" in os.environ:
        return int(os.environ["WORLD_SIZE"])
    launcher = psutil.Process().parent()
    with contextlib.suppress(psutil.Error):
        words = launcher.cmdline() if launcher else []
        if any("accelerate" in word for word in words[:3]) and "launch" in words[:4]:
            for flag, value in itertools.pairwise(words):
                if flag in ("--num_processes", "--num-processes") and value.isdigit():
                    return max(int(value), 1)
    return 1


def gpu_has_bf16() -> bool:
    """Return whether there is a GPU with native bf16 arithmetic."""
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)


def precision_of(accelerator: Accelerator) -> str:
    """Return the precision of this run: "no" (float32), "tf32", "bf16" or "fp16"."""
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else accelerator.mixed_precision


def describe_hardware(accelerator: Accelerator) -> str:
    """Return the hardware of the run in words: device, processes, precision."""
    device = accelerator.device
    name = (
        torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    )
    precision = {"no": "float32"}.get(precision_of(accelerator), precision_of(accelerator))
    sharded = ", sharded (FSDP)" if accelerator.is_fsdp2 else ""
    return f"{accelerator.num_processes} x {device.type} ({name}), {precision}{sharded}"


def bf16_hint(accelerator: Accelerator) -> str | None:
    """Return a hint if the CPU supports bf16 and this run does not use it, as results would differ."""
    if accelerator.device.type == "cpu" and precision_of(accelerator) == "no" and cpu_has_bf16():
        return (
            "this CPU supports bf16: --precision bf16 can be up to twice as fast, or slower,"
            " depending on the network"
        )
    return None


def describe_versions() -> str:
    """Return the versions that the results depend on."""
    return f"Python {platform.python_version()}, torch {torch.__version__}, timm {timm.__version__}"


def default_workers(accelerator: Accelerator) -> int:
    """Return the number of loader processes: a CPU's few spare cores, or this GPU's share of all cores."""
    if accelerator.device.type == "cpu":
        return _cpu_workers() // _local_processes()
    # One core is left to the loop, which would otherwise wait for it.
    return min(MAX_WORKERS, max(allowed_cores() // _local_processes() - 1, 1))


def start_tracker(accelerator: Accelerator, run_dir: Path, knobs: dict) -> None:
    """Start the tracker the accelerator was built with, if any, in the run's folder."""
    accelerator.project_configuration.logging_dir = str(run_dir)
    # Trackers reject values that are not plain.
    simple = {name: value if isinstance(value, (int, float)) else str(value) for name, value in knobs.items()}
    accelerator.init_trackers("hotdog_hf", config=simple)


def finish(accelerator: Accelerator, *prepared: object) -> list:
    """End the run: close the trackers and release the prepared objects in time.

    With a distributed model still alive at exit, about one run in ten of two CPU processes aborts after its
    work is done ("terminate called without an active exception"): assign the result over the last references.
    """
    released = accelerator.free_memory(*prepared)
    gc.collect()
    accelerator.end_training()
    return released


def release(accelerator: Accelerator) -> None:
    """Release what was prepared for one training run, before the next in the same process."""
    accelerator.free_memory()
    gc.collect()
    if accelerator.scaler:  # its loss scale (fp16) is that of the run before
        accelerator.scaler = torch.amp.GradScaler(accelerator.device.type)


def prepare(
    accelerator: Accelerator,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    average: AveragedModel | None,
) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """Return model and optimizer prepared for the launch: one process, copies (DDP), or shards (FSDP)."""
    if accelerator.is_fsdp2:
        return sharding.prepare(accelerator, model, optimizer, average)
    return accelerator.prepare(model, optimizer)


def log(accelerator: Accelerator, row: dict, step: int) -> None:
    """Send metrics to the tracker; if it fails, print a warning and continue."""
    try:
        accelerator.log(row, step=step)
    except Exception as error:  # whatever a tracker's network client raises
        accelerator.print(f"warning: the tracker accepted no metrics: {type(error).__name__}: {error}")


def run_on_main(accelerator: Accelerator, function: Callable[[], object], share: bool = True) -> object:
    """Call `function` on the first process, which alone may have the run's folder; return its result on all.

    Its `UserError` is raised on every process, so that none waits for one that has exited. Without `share`
    the other processes get None: a large result is better broadcast in parts.
    """
    output = error = None
    if accelerator.is_main_process:
        try:
            output = function()
        except UserError as raised:
            error = str(raised)
    shared, error = broadcast_object_list([output if share else None, error])
    if error is not None:
        raise UserError(error)
    return shared if share else output


def any_process(accelerator: Accelerator, flag: bool) -> bool:
    """Return whether any process has `flag` set, with the same result on every process."""
    return sum_processes(accelerator, int(flag)) > 0


def sum_processes(accelerator: Accelerator, number: int) -> int:
    """Return the sum over all processes."""
    if accelerator.num_processes == 1:
        return number
    return int(accelerator.reduce(torch.tensor(number, device=accelerator.device)).item())


class StoppedError(Exception):
    """Ends a run that was told to stop, once its state is saved."""


# Steps or batches between two checks for a stop signal, with several GPUs.
STOP_EVERY = 10


def stop_requested(accelerator: Accelerator, stop: "StopSignal", step: int) -> bool:
    """Return after a step or batch whether any process was told to stop, the same on all processes.

    With several GPUs this is checked only after every tenth, as each check waits for the queued work.
    """
    waits_for_gpus = accelerator.num_processes > 1 and accelerator.device.type != "cpu"
    return not (waits_for_gpus and step % STOP_EVERY) and any_process(accelerator, bool(stop.number))


# A launcher forwards a signal that the terminal has already sent: two within this time count as one.
SAME_SIGNAL_SECONDS = 1.0


class StopSignal:
    """Handles SIGTERM, Ctrl-C and SIGUSR1 (SLURM): stop after the step; a second signal exits at once."""

    def __init__(self) -> None:
        self.number, self.time = 0, 0.0
        for number in stop_signals():
            signal.signal(number, self._receive)

    def _receive(self, number: int, _frame: object) -> None:
        now = time.monotonic()
        if self.number and now - self.time > SAME_SIGNAL_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        elif not self.number:
            self.number, self.time = int(number), now
            said = "stopping after the current step; a second signal exits immediately"
            print(f"\n{signal.Signals(number).name}: {said}", file=sys.stderr, flush=True)

    @property
    def exit_code(self) -> int:
        """The shell's exit code for a process ended by a signal: 143 for SIGTERM, 130 for Ctrl-C."""
        return 128 + self.number
