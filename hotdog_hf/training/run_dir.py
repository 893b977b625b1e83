"""The folder of one training run: its lock, its identity, and the command that resumes it."""

import json
import os
import shlex
import sys
from pathlib import Path

import filelock

from hotdog_hf.config import CHANGEABLE, HARMLESS, TrainConfig, check_new_run, flatten, to_dict
from hotdog_hf.errors import UserError
from hotdog_hf.files import write_json


def check_same_run(saved: dict, now: dict, anyway: bool) -> None:
    """Raise `UserError` naming what differs between two descriptions of a run.

    Each holds `config` (in groups), `num_processes`, `precision` (what "auto" has become) and `photos` (path
    to size and time).
    """
    differences, refused = [], False
    # A knob that the run's version did not have yet was as it is by default.
    usual = flatten(to_dict(TrainConfig()))
    knobs, knobs_now = usual | flatten(saved["config"]), usual | flatten(now["config"])
    for name in sorted(knobs.keys() | knobs_now.keys()):
        before, after = knobs.get(name), knobs_now.get(name)
        if before != after and name not in HARMLESS:
            differences.append(f"--{name.replace('_', '-')} was {before}, is {after}")
            refused |= name not in CHANGEABLE
    if saved["num_processes"] != now["num_processes"]:
        differences.append(f"{saved['num_processes']} processes were used, now {now['num_processes']}")
        refused = True
    if (precision := saved.get("precision", now["precision"])) != now["precision"]:
        differences.append(f"the precision was {precision}, is {now['precision']}")
        refused = True
    # Before there was such a cut, copies of a photo could be on both sides of it.
    if saved.get("cut_by_content", False) != now.get("cut_by_content", False):
        differences.append("the validation split was cut off by another rule: train has copies of photos")
        refused = True
    if saved.get("labels") != now.get("labels"):
        differences.append("--labels gives photos other labels, splits or groups")
        refused = True
    photos, photos_now = saved["photos"], now["photos"]
    changed = sorted(
        name for name in photos.keys() | photos_now.keys() if photos.get(name) != photos_now.get(name)
    )
    if changed:
        kind = "removed" if changed[0] not in photos_now else "changed" if changed[0] in photos else "added"
        differences.append(f"{len(changed)} photos differ, first {changed[0]} ({kind})")
        refused = True
    if differences and (refused or not anyway):
        way_out = "start a new run" if refused else "add --resume-anyway to resume all the same"
        raise UserError(f"cannot resume: {'; '.join(differences)}. {way_out.capitalize()}")


def open_run_dir(path: str | os.PathLike, resume: bool = False) -> tuple[Path, filelock.FileLock]:
    """Create the run's folder, or with `resume` open an existing one; return it with its acquired lock.

    The operating system releases the lock when the process ends; keep it referenced. Raises `UserError` if
    the folder belongs to another run or cannot be written.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(folder / ".lock")
        lock.acquire(timeout=0)
        if not resume:
            check_new_run(folder)
    except filelock.Timeout as error:
        raise UserError(f"another process is running in {folder}; give another --output-dir") from error
    except FileExistsError as error:
        raise UserError(f"--output-dir {folder} is a file") from error
    except OSError as error:
        raise UserError(f"--output-dir {folder} cannot be written: {error.strerror}") from error
    return folder, lock


def read_identity(run_dir: Path) -> dict:
    """Read what `write_identity` wrote: the config, the number of processes and the photos of a run."""
    try:
        return json.loads((run_dir / "identity.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot resume {run_dir}: {error}") from error


def write_identity(run_dir: Path, identity: dict, skipped: list[Path]) -> None:
    """Write what identifies the run, its config also as a file of its own, and the skipped photos, if any."""
    write_json(run_dir / "identity.json", identity)
    write_json(run_dir / "config.json", identity["config"])
    if skipped:
        write_json(run_dir / "skipped_images.json", [str(path) for path in skipped])


def resume_command(run_dir: Path) -> str:
    """Return the command line that resumes this run; for scripts other than train.py, their own command."""
    processes = os.environ.get("WORLD_SIZE", "1")
    launcher = ["python"]
    if processes != "1":
        config, machines = "accelerate_config.yaml", ""
        if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
            config = "configs/fsdp.yaml"
        if processes != os.environ.get("LOCAL_WORLD_SIZE", processes):
            config = "configs/two_nodes.yaml"
            machines = f" --machine_rank 0 --main_process_ip {os.environ.get('MASTER_ADDR')}"
        launcher = shlex.split(
            f"accelerate launch --config_file {config} --num_processes {processes}{machines}"
        )
    if Path(sys.argv[0]).name != "train.py":
        return shlex.join([*launcher, *sys.argv])
    words, given = [], iter(sys.argv)
    for word in given:
        if word in ("--output-dir", "--resume"):
            next(given, None)
        elif not word.startswith(("--output-dir=", "--resume=")):
            words.append(word)
    return shlex.join([*launcher, *words, "--output-dir", str(run_dir), "--resume", "auto"])
