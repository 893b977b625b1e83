"""The complete state of a run on disk, so that a killed run resumes bit for bit.

A checkpoint is a folder of plain data: `state.safetensors` holds every tensor (weights, optimizer, torch's
random state), `state.json` the rest (optimizer hyperparameters, schedule, gradient scaler, Python's and
numpy's random state, progress). Nothing in it is pickled. The position in the data needs no state of its own:
order and augmentation follow from (seed, epoch, photo), see `hotdog_hf.data.loaders`.
"""

import contextlib
import dataclasses
import json
import math
import os
import random
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from hotdog_hf.errors import UserError
from hotdog_hf.files import REPLACED, replacing_folder
from hotdog_hf.training import sharding
from hotdog_hf.training.state import Progress, TrainState


def save(run_dir: Path, accelerator: Accelerator, state: TrainState, keep: int) -> Path:
    """Write `run_dir/checkpoints/step-NNNNNNNN` atomically, and delete all but the newest `keep`.

    Must be called by every process. Raises `UserError` if the state is not finite or cannot be written; the
    earlier checkpoints stay.
    """
    if state.check_finite:
        state.check_finite()
    tensors, optimizer_content = _split_state(accelerator, state)
    python_state, numpy_state = random.getstate(), np.random.get_state()
    own = {
        "totals": state.totals.tolist(),
        "not_finite": _first_not_finite(tensors, accelerator.unwrap_model(state.model)),
        "python": [python_state[0], list(python_state[1]), python_state[2]],
        "numpy": [numpy_state[0], numpy_state[1].tolist(), *numpy_state[2:]],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(accelerator.device) if accelerator.device.type == "cuda" else None,
    }
    processes = gather_object([own])
    progress = dataclasses.replace(
        state.progress,
        totals=[process.pop("totals") for process in processes],
        run_seconds=time.perf_counter() - state.started,
    )
    folder = run_dir / "checkpoints" / f"step-{progress.total_steps:08}"
    not_finite = [name for process in processes if (name := process.pop("not_finite"))]
    if not all(math.isfinite(value) for row in progress.totals for value in row):
        not_finite.insert(0, "the loss")
    if not_finite:
        if state.check_finite:
            state.check_finite(not_finite[0])
        raise UserError(f"{not_finite[0]} is not finite, so no checkpoint is written")
    tensors = sharding.full_tensors(tensors, keep=accelerator.is_main_process)
    if accelerator.is_main_process:
        for rank, process in enumerate(processes):
            tensors |= {f"random.{rank}.{name}": process.pop(name) for name in ("torch", "cuda")}
        content = {
            "progress": dataclasses.asdict(progress),
            "optimizer": optimizer_content,
            "schedule": state.schedule.state_dict(),
            "scaler": accelerator.scaler.state_dict() if accelerator.scaler else None,
            "random": processes,
        }
        tensors = {name: value.cpu().contiguous() for name, value in tensors.items() if value is not None}
        try:
            _write(folder, tensors, content)
            _prune(folder, keep)
        except (OSError, safetensors.SafetensorError) as error:
            raise UserError(f"cannot write the checkpoint {folder}: {error}") from error
    accelerator.wait_for_everyone()
    return folder


def _split_state(accelerator: Accelerator, state: TrainState) -> tuple[dict[str, torch.Tensor], dict]:
    """Return the named tensors of model, average and optimizer, and the rest of the optimizer's state."""
    model = accelerator.unwrap_model(state.model)
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    if state.average is not None:
        tensors |= {f"average.{name}": value for name, value in state.average.state_dict().items()}
    optimizer_state, plain = state.optimizer.state_dict(), {}
    for index, values in optimizer_state["state"].items():
        for name, value in values.items():
            if isinstance(value, torch.Tensor):
                tensors[f"optimizer.{index}.{name}"] = value
            else:
                plain.setdefault(str(index), {})[name] = value
    return tensors, {"param_groups": optimizer_state["param_groups"], "state": plain}


def _first_not_finite(tensors: dict[str, torch.Tensor], model: torch.nn.Module) -> str | None:
    """Return the name of a tensor that holds NaN or infinity on this process, or None."""
    # Infinity is allowed in buffers, as a bound or a mask, but not in weights or BatchNorm statistics.
    buffers = (name for name, _ in model.named_buffers() if not name.endswith(("_mean", "_var")))
    constants = {f"{prefix}{name}" for name in buffers for prefix in ("model.", "average.module.")}
    local = zip(tensors, sharding.local(list(tensors.values())), strict=True)
    return next((name for name, value in local if name not in constants and not value.isfinite().all()), None)


def _write(folder: Path, tensors: dict[str, torch.Tensor], content: dict) -> None:
    with replacing_folder(folder) as part:
        safetensors.torch.save_file(tensors, part / "state.safetensors")
        (part / "state.json").write_text(json.dumps(content), encoding="utf-8")


def _prune(newest: Path, keep: int) -> None:
    """Delete all checkpoints but `newest` and those before it, `keep` in total.

    Later ones are left over from before a resume from an earlier checkpoint.
    """
    finished = _finished(newest.parent)
    position = finished.index(newest) + 1
    for left in (*newest.parent.glob("step-*.part"), *newest.parent.glob(f"step-*{REPLACED}")):
        if left not in finished:
            shutil.rmtree(left)
    for old in [*reversed(finished[position:]), *finished[: max(position - keep, 0)]]:
        # Renamed first, so that a half-deleted one is never taken for a checkpoint.
        shutil.rmtree(old.rename(old.with_suffix(".part")))


def _finished(checkpoints: Path) -> list[Path]:
    """Return the complete checkpoints, oldest first; `.replaced` counts if no successor has its place yet."""
    return sorted(
        path
        for path in checkpoints.glob("step-*")
        if not path.suffix or (path.suffix == REPLACED and not path.with_suffix("").exists())
    )


def steps_of(checkpoint: Path) -> int:
    """Return the number of optimizer steps before a checkpoint."""
    return int(checkpoint.stem.removeprefix("step-"))


def latest(run_dir: str | os.PathLike, before: float = math.inf) -> Path | None:
    """Return the newest checkpoint of a run with less than `before` steps, or None."""
    found = [path for path in _finished(Path(run_dir) / "checkpoints") if steps_of(path) < before]
    return found[-1] if found else None


def _newest_readable(run_dir: str | os.PathLike) -> Path | None:
    """Return the newest checkpoint that can be read, or None; warn if a newer one cannot be read.

    Raises `UserError` if there are checkpoints and none of them can be read.
    """
    problem = None
    for folder in reversed(_finished(Path(run_dir) / "checkpoints")):
        try:
            # The header and the length of the tensors' file only: they may be gigabytes.
            with _reading(folder), safetensors.safe_open(folder / "state.safetensors", framework="pt"):
                _read_plain(folder)
        except UserError as error:
            problem = problem or str(error)
            continue
        if problem:
            print(f"warning: {problem}; resuming from an older one, {folder}", file=sys.stderr, flush=True)
        return folder
    if problem:
        raise UserError(f"{problem}. No older one is left: start a new run with another --output-dir")
    return None


def find(resume: str | None, output_dir: str | None) -> Path | None:
    """Return the checkpoint that `--resume` means: "auto", a run's folder, or a checkpoint's folder.

    "auto" is the newest one in `--output-dir`, or None if there is none yet. Raises `UserError` for a path
    without a checkpoint.
    """
    if resume is None:
        return None
    if resume == "auto":
        if output_dir is None:
            raise UserError("--resume auto needs --output-dir; give that, or --resume RUN_FOLDER")
        return _newest_readable(output_dir)
    path = Path(resume)
    found = path if (path / "state.json").is_file() else _newest_readable(path)
    if found is None:
        raise UserError(f"--resume {resume}: no checkpoint there (a run's folder has them in checkpoints/)")
    if output_dir is not None and Path(output_dir).resolve() != run_dir_of(found).resolve():
        raise UserError(
            f"--resume {resume} continues in {run_dir_of(found)}; leave out --output-dir {output_dir}"
        )
    return found


def run_dir_of(checkpoint: Path) -> Path:
    """Return the run that a checkpoint belongs to."""
    return checkpoint.parent.parent


@contextlib.contextmanager
def _reading(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise UserError(f"the checkpoint {folder} cannot be read: {error}") from error


def _read_plain(folder: Path) -> dict:
    return json.loads((folder / "state.json").read_text(encoding="utf-8"))


def read(folder: Path) -> tuple[dict[str, torch.Tensor], dict]:
    """Return the tensors and the plain state of a checkpoint. Raises `UserError` if it cannot be read."""
    with _reading(folder):
        return safetensors.torch.load_file(folder / "state.safetensors"), _read_plain(folder)


def epoch_of(folder: Path) -> int:
    """Return the epoch, from 1, that a run had begun or was about to begin when it wrote a checkpoint."""
    with _reading(folder):
        return _read_plain(folder)["progress"]["epoch"]


def load(
    content: tuple[dict[str, torch.Tensor], dict] | None, accelerator: Accelerator, state: TrainState
) -> None:
    """Load `content`, as returned by `read` on the first process, into `state`.

    Must be called by every process. Tensors are broadcast one at a time, so that only the first process
    holds all of them.
    """
    tensors, plain = content or ({}, None)
    [plain] = broadcast_object_list([plain])
    optimizer, saved, random_states = state.optimizer, plain["optimizer"], {}
    optimizer_state = {int(index): values for index, values in saved["state"].items()}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    modules = {"model": accelerator.unwrap_model(state.model), "average": state.average}
    targets = {part: module.state_dict() for part, module in modules.items() if module is not None}
    for name, value in sharding.broadcast_each(accelerator, tensors):
        part, _, rest = name.partition(".")
        if part in targets:
            sharding.copy_into(targets[part].pop(rest), value)
        elif part == "optimizer":
            index, _, key = rest.partition(".")
            optimizer_state.setdefault(int(index), {})[key] = (
                value.cpu() if key == "step" else _laid_out_like(value, parameters[int(index)])
            )
        elif part == "random":
            random_states[rest] = value.cpu()
    if missing := [f"{part}.{name}" for part, left in targets.items() for name in left]:
        raise UserError(f"the checkpoint has no {missing[0]}, so it belongs to another network")
    optimizer.load_state_dict({"state": optimizer_state, "param_groups": saved["param_groups"]})
    state.schedule.load_state_dict(plain["schedule"])
    if accelerator.scaler:
        accelerator.scaler.load_state_dict(plain["scaler"])

    rank = accelerator.process_index
    own = plain["random"][rank]
    random.setstate((own["python"][0], tuple(own["python"][1]), own["python"][2]))
    np.random.set_state((own["numpy"][0], np.array(own["numpy"][1], np.uint32), *own["numpy"][2:]))
    torch.set_rng_state(random_states[f"{rank}.torch"])
    if f"{rank}.cuda" in random_states:
        torch.cuda.set_rng_state(random_states[f"{rank}.cuda"], accelerator.device)
    state.progress = Progress(**plain["progress"])
    state.started -= state.progress.run_seconds
    state.totals = torch.tensor(state.progress.totals[rank], device=accelerator.device)


def _laid_out_like(value: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """Return this process's part of a full state tensor, with the memory layout of its parameter.

    Fused kernels walk through a weight and its state in memory order, so both must have the same layout.
    """
    value = sharding.shard_like(value, parameter)
    return torch.empty_like(parameter, dtype=value.dtype).copy_(value)
