"""The whole state of a run on disk, so that a killed run goes on to the very bit.

A checkpoint is a folder of plain data: `state.safetensors` holds every tensor (weights, optimizer, torch's
random state), `state.json` the rest (optimizer hyperparameters, schedule, gradient scaler, Python's and
numpy's random state, progress). Nothing in it is pickled. The position in the data needs no state of its own:
order and augmentation follow from (seed, epoch, photo), see `hotdog_hf.data.loaders`.
"""

import dataclasses
import json
import math
import os
import random
import shutil
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from hotdog_hf.errors import UserError
from hotdog_hf.training import sharding
from hotdog_hf.training.state import Progress, TrainState


def save(run_dir: Path, accelerator: Accelerator, state: TrainState, keep: int) -> Path:
    """Write `run_dir/checkpoints/step-NNNNNNNN`, whole or not at all, and drop all but the newest `keep`.

    To be called by every process. Raises `UserError` where the loss or the disk does not allow it; the
    earlier checkpoints stay.
    """
    python_state, numpy_state = random.getstate(), np.random.get_state()
    own = {
        "totals": state.totals.tolist(),
        "python": [python_state[0], list(python_state[1]), python_state[2]],
        "numpy": [numpy_state[0], numpy_state[1].tolist(), *numpy_state[2:]],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(accelerator.device) if accelerator.device.type == "cuda" else None,
    }
    processes = gather_object([own])
    progress = dataclasses.replace(state.progress, totals=[process.pop("totals") for process in processes])
    folder = run_dir / "checkpoints" / f"step-{progress.total_steps:08}"
    if not all(math.isfinite(value) for row in progress.totals for value in row):
        raise UserError("the loss is not finite, so no checkpoint is written")
    optimizer_state, model = state.optimizer.state_dict(), accelerator.unwrap_model(state.model)
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    if state.average is not None:
        tensors |= {f"average.{name}": value for name, value in state.average.state_dict().items()}
    plain: dict[str, dict] = {}
    for index, values in optimizer_state["state"].items():
        for name, value in values.items():
            if isinstance(value, torch.Tensor):
                tensors[f"optimizer.{index}.{name}"] = value
            else:
                plain.setdefault(str(index), {})[name] = value
    tensors = sharding.full_tensors(tensors, keep=accelerator.is_main_process)
    if accelerator.is_main_process:
        for rank, process in enumerate(processes):
            tensors |= {f"random.{rank}.{name}": process.pop(name) for name in ("torch", "cuda")}
        content = {
            "progress": dataclasses.asdict(progress),
            "optimizer": {"param_groups": optimizer_state["param_groups"], "state": plain},
            "schedule": state.schedule.state_dict(),
            "scaler": accelerator.scaler.state_dict() if accelerator.scaler else None,
            "random": processes,
        }
        tensors = {name: value.cpu().contiguous() for name, value in tensors.items() if value is not None}
        try:
            _write(folder, tensors, content)
            _prune(folder.parent, keep)
        except (OSError, safetensors.SafetensorError) as error:
            raise UserError(f"cannot write the checkpoint {folder}: {error}") from error
    accelerator.wait_for_everyone()
    return folder


def _write(folder: Path, tensors: dict[str, torch.Tensor], content: dict) -> None:
    """Write beside the place, flush to the disk, and move there."""
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    safetensors.torch.save_file(tensors, part / "state.safetensors")
    (part / "state.json").write_text(json.dumps(content), encoding="utf-8")
    for path in (*part.iterdir(), part):
        _flush(path)
    if folder.exists():  # the same step again, after a resume from an earlier checkpoint
        shutil.rmtree(folder)
    part.rename(folder)
    _flush(folder.parent)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _prune(checkpoints: Path, keep: int) -> None:
    for old in _finished(checkpoints)[:-keep]:
        # Renamed first, so that one that is half removed is never taken for a checkpoint.
        shutil.rmtree(old.rename(old.with_name(f"{old.name}.part")))


def _finished(checkpoints: Path) -> list[Path]:
    return sorted(path for path in checkpoints.glob("step-*") if path.suffix != ".part")


def latest(run_dir: str | os.PathLike) -> Path | None:
    """Return the newest checkpoint of a run, or None."""
    return next(reversed(_finished(Path(run_dir) / "checkpoints")), None)


def find(resume: str | None, output_dir: str | None) -> Path | None:
    """Return the checkpoint that `--resume` means: "auto", a run's folder, or a checkpoint's folder.

    "auto" is the newest one in `--output-dir`, or None where there is none yet. Raises `UserError` for a path
    without a checkpoint.
    """
    if resume is None:
        return None
    if resume == "auto":
        if output_dir is None:
            raise UserError("--resume auto looks into --output-dir; give that, or --resume RUN_FOLDER")
        return latest(output_dir)
    path = Path(resume)
    found = path if (path / "state.json").is_file() else latest(path)
    if found is None:
        raise UserError(f"--resume {resume}: no checkpoint there (a run's folder has them in checkpoints/)")
    if output_dir is not None and Path(output_dir).resolve() != run_dir_of(found).resolve():
        raise UserError(
            f"--resume {resume} goes on in {run_dir_of(found)}; leave out --output-dir {output_dir}"
        )
    return found


def run_dir_of(checkpoint: Path) -> Path:
    """Return the run that a checkpoint belongs to."""
    return checkpoint.parent.parent


def read(folder: Path) -> tuple[dict[str, torch.Tensor], dict]:
    """Return the tensors and the plain state of a checkpoint. Raises `UserError` where it cannot be read."""
    try:
        tensors = safetensors.torch.load_file(folder / "state.safetensors")
        return tensors, json.loads((folder / "state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise UserError(f"the checkpoint {folder} cannot be read: {error}") from error


def load(content: tuple[dict[str, torch.Tensor], dict], accelerator: Accelerator, state: TrainState) -> None:
    """Put everything back into `state` as `read` found it."""
    tensors, plain = content
    parts: dict[str, dict[str, torch.Tensor]] = {"model": {}, "average": {}, "optimizer": {}, "random": {}}
    for name, value in tensors.items():
        part, _, rest = name.partition(".")
        parts[part][rest] = value
    sharding.load_state(accelerator.unwrap_model(state.model), parts["model"])
    if state.average is not None:
        sharding.load_state(state.average, parts["average"])

    optimizer, saved = state.optimizer, plain["optimizer"]
    optimizer_state = {int(index): values for index, values in saved["state"].items()}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for name, value in parts["optimizer"].items():
        index, _, key = name.partition(".")
        optimizer_state.setdefault(int(index), {})[key] = sharding.shard_like(value, parameters[int(index)])
    optimizer.load_state_dict({"state": optimizer_state, "param_groups": saved["param_groups"]})
    state.schedule.load_state_dict(plain["schedule"])
    if accelerator.scaler:
        accelerator.scaler.load_state_dict(plain["scaler"])

    rank = accelerator.process_index
    own = plain["random"][rank]
    random.setstate((own["python"][0], tuple(own["python"][1]), own["python"][2]))
    np.random.set_state((own["numpy"][0], np.array(own["numpy"][1], np.uint32), *own["numpy"][2:]))
    torch.set_rng_state(parts["random"][f"{rank}.torch"])
    if f"{rank}.cuda" in parts["random"]:
        torch.cuda.set_rng_state(parts["random"][f"{rank}.cuda"], accelerator.device)
    state.progress = Progress(**plain["progress"])
    state.totals = torch.tensor(state.progress.totals[rank], device=accelerator.device)
