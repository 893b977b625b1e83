"""A training as a Hugging Face Job: photos and this package go up, the run's folder comes back.

All of it lies in one private bucket of the user's, which the job sees as folders (volumes): the photos, the
inputs (this package as a wheel, train.py, weights and tables of labels) and the run's folder.
"""

import contextlib
import difflib
import hashlib
import importlib.metadata
import io
import math
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
from huggingface_hub import Volume

from hotdog_hf import hub
from hotdog_hf.config import TrainConfig, check_new_run, command_of, default_run_dir, override
from hotdog_hf.data.folder import check_data_dir, find_photos
from hotdog_hf.errors import UserError
from hotdog_hf.model.places import check_weights

ROOT = Path(__file__).resolve().parents[2]
BUCKET = "hotdog_hf-jobs"
# Where the job finds its volumes: photos, or shards to stream; the inputs; the run's folder.
PHOTOS, SHARDS, INPUTS, RUN = "/mnt/photos", "/mnt/shards", "/mnt/inputs", "/mnt/run"
# An empty file that makes an empty folder of a bucket exist.
PLACEHOLDER = ".keep"
# Bars of progress write one line of the log each time; libraries are asked to do so seldom.
ENVIRONMENT = {"PYTHONUNBUFFERED": "1", "TQDM_MININTERVAL": "30"}
HOURS = {"second": 1 / 3600, "minute": 1 / 60, "hour": 1.0, "day": 24.0}
# The job works on its own disk: a volume is slow for many small files, and takes no locks. Shards may be
# larger than the disk. Before its time is up, the training is asked to stop: its state is saved and copied.
SCRIPT = f"""
cd "$(mktemp -d)" || exit
python -m pip install --quiet --root-user-action ignore "$0" || exit
cp -r {RUN} run || exit
if [ -d {PHOTOS} ]; then cp -rp {PHOTOS} photos || exit; fi
seconds=$(($1 - SECONDS)); shift
[ $seconds -gt 0 ] || {{ echo "no time is left for the training: use a longer --timeout"; exit 124; }}
timeout --signal TERM $seconds "$@"
code=$?
cp -r run/. {RUN} || exit
exit $code
"""


@dataclass(frozen=True)
class Plan:
    """A job before it starts; its paths are this machine's."""

    train: TrainConfig
    hardware: huggingface_hub.JobHardwareInfo
    seconds: int
    image: str
    user: str

    @property
    def bucket(self) -> str:
        """Return the name of the bucket that everything goes through."""
        return f"{self.user}/{BUCKET}"

    @property
    def run_dir(self) -> Path:
        """Return the run's folder on this machine."""
        return Path(self.train.run.output_dir)

    @property
    def margin(self) -> int:
        """Return how many seconds before its time-out the training is stopped, to save what it has."""
        return max(20, min(600, self.seconds // 10))

    def folder(self, kind: str, path: str | Path) -> str:
        """Return the folder of the bucket for a folder here: the same one for every job."""
        path = Path(path).resolve()
        digest = hashlib.sha256(f"{platform.node()}:{path}".encode()).hexdigest()[:8]
        return f"{kind}/{path.name}-{digest}"

    def address(self, kind: str, path: str | Path) -> str:
        """Return the address of the bucket's folder for a folder here."""
        return f"hf://buckets/{self.bucket}/{self.folder(kind, path)}"

    @property
    def photos_dir(self) -> str | None:
        """Return the data folder, if it is one of this machine's that the job does not make itself."""
        data_dir = self.train.data.data_dir
        return data_dir if "://" not in data_dir and Path(data_dir).is_dir() else None

    def describe(self) -> str:
        """Return what will run, where the files go, and what it costs at most."""
        hardware, hours = self.hardware, self.seconds / 3600
        machine = f"{hardware.name} ({hardware.pretty_name}, {hardware.cpu}, {hardware.ram})"
        price = hardware.unit_cost_usd / HOURS[hardware.unit_label]
        photos = f"{self.photos_dir} to {self.address('photos', self.photos_dir)}" if self.photos_dir else "-"
        return "\n".join(
            [
                f"job:     {command_of(self.train)}",
                f"machine: {machine}, {self.image}",
                f"upload:  {photos} (private)",
                f"results: {self.run_dir}, through {self.address('runs', self.run_dir)}",
                f"time:    at most {_duration(self.seconds)} (--timeout); the training is stopped"
                f" {_duration(self.margin)} earlier, to save its state",
                f"cost:    ${price:.2f} an hour, at most ${_cents_up(price * hours):.2f}",
            ]
        )


def make_plan(train: TrainConfig, flavor: str, seconds: int, image: str) -> Plan:
    """Check what can be checked before anything is uploaded, here and at the Hub.

    Raises `UserError`: photos, tables or weights that are missing, a folder that holds a run already, not
    logged in, a token that may only read, a flavor that the Hub does not have.
    """
    train = check_inputs(train)
    if not (ROOT / "pyproject.toml").is_file():
        raise UserError("a job takes this project along, which needs a checkout: git clone it, and run there")
    api, user = huggingface_hub.HfApi(), hub.require_login("a job")
    if hub.may_only_read(user):
        raise UserError(f"no permission to start a job: the token of {user['name']} may only read")
    if train.hub.push_to_hub:
        hub.check_can_push(train.hub.push_to_hub)
    with hub.hub_errors("the list of machines"):
        offered = {hardware.name: hardware for hardware in api.list_jobs_hardware()}
    if flavor not in offered:
        close = difflib.get_close_matches(flavor, offered, n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        raise UserError(f"--flavor {flavor}: the Hub has no such machine{hint}; it has {', '.join(offered)}")
    plan = Plan(train, offered[flavor], seconds, image, user["name"])
    if plan.margin >= seconds:
        raise UserError(f"--timeout {seconds}s is too short: {plan.margin} seconds are kept for saving")
    return plan


def check_inputs(train: TrainConfig) -> TrainConfig:
    """Check the flags that name files of this machine; return them with the run's folder set."""
    data_dir, run_dir = train.data.data_dir, train.run.output_dir
    if train.run.resume not in (None, "auto") or (train.run.resume and run_dir is None):
        raise UserError("a job resumes with --resume auto and the run's --output-dir")
    run_dir = run_dir or default_run_dir(train.recipe)
    if not train.run.resume:
        check_new_run(run_dir)
    check_data_dir(data_dir)
    if Path(data_dir).is_dir():
        if linked := [path for path in _folders(Path(data_dir)) if path.is_symlink()]:
            raise UserError(f"{linked[0]} is a link to a folder, and not uploaded: copy that folder there")
        if not (train.data.streaming or train.data.labels):
            find_photos(data_dir)
    for path in train.data.labels:
        if not Path(path).is_file():
            raise UserError(f"--labels {path}: no such file")
    check_weights(train.model.weights)
    return override(train, output_dir=run_dir)


def _folders(data_dir: Path) -> list[Path]:
    """Return the folders of splits and classes."""
    return [path for pattern in ("*", "*/*") for path in data_dir.glob(pattern) if path.is_dir()]


def start(plan: Plan) -> huggingface_hub.JobInfo:
    """Upload photos, inputs and the run's folder, and start the job."""
    api = huggingface_hub.HfApi()
    with tempfile.TemporaryDirectory() as scratch, hub.hub_errors(plan.bucket):
        _prepare_bucket(api, plan)
        inputs = Path(scratch) / "inputs"
        wheel, words = pack(plan, inputs)
        volumes = [_send(api, plan, "inputs", inputs, INPUTS)]
        if plan.photos_dir:
            mount = SHARDS if plan.train.data.streaming else PHOTOS
            volumes.append(_send(api, plan, "photos", plan.photos_dir, mount))
        volumes.append(_send(api, plan, "runs", plan.run_dir, RUN))
        return api.run_job(
            image=plan.image,
            command=["bash", "-c", SCRIPT, wheel, str(plan.seconds - plan.margin), *words],
            env=ENVIRONMENT,
            secrets=_secrets(plan.train),
            flavor=plan.hardware.name,
            timeout=plan.seconds,
            volumes=volumes,
            namespace=plan.user,
        )


def _prepare_bucket(api: huggingface_hub.HfApi, plan: Plan) -> None:
    """Create the bucket if needed; `UserError` if it is public, or holds a run that was not fetched."""
    api.create_bucket(plan.bucket, private=True, exist_ok=True)
    if not api.bucket_info(plan.bucket).private:
        raise UserError(f"the bucket {plan.bucket} is public: make it private or delete it, and try again")
    if not plan.train.run.resume and _run_files(api, plan):
        raise UserError(
            f"the Hub still holds a run of {plan.run_dir}: fetch it with `{fetch_command(plan)}`,"
            " or give another --output-dir"
        )


def _run_files(api: huggingface_hub.HfApi, plan: Plan) -> list[huggingface_hub.BucketFile]:
    """List the files of the run's folder in the bucket."""
    found = api.list_bucket_tree(plan.bucket, plan.folder("runs", plan.run_dir), recursive=True)
    return [file for file in found if file.type == "file" and Path(file.path).name != PLACEHOLDER]


def pack(plan: Plan, inputs: Path) -> tuple[str, list[str]]:
    """Fill the folder that travels along; return the wheel to install and the command to run in the job."""
    inputs.mkdir()
    shutil.copy(ROOT / "scripts/train.py", inputs)
    wheel, train = build_wheel(inputs), plan.train
    knobs = {"output_dir": "run"}
    if plan.photos_dir:
        knobs["data_dir"] = SHARDS if train.data.streaming else "photos"
    if train.data.labels:
        names = [f"{number}-{Path(path).name}" for number, path in enumerate(train.data.labels)]
        for name, path in zip(names, train.data.labels, strict=True):
            shutil.copy(path, inputs / name)
        knobs["labels"] = tuple(f"{INPUTS}/{name}" for name in names)
    weights = Path(train.model.weights)
    if weights.exists():
        copy = shutil.copytree if weights.is_dir() else shutil.copy
        copy(weights, inputs / f"weights{weights.suffix}")
        knobs["weights"] = f"{INPUTS}/weights{weights.suffix}"
    several = plan.hardware.accelerator is not None and plan.hardware.accelerator.quantity != "1"
    flags = shlex.split(command_of(override(train, **knobs)))[3:]  # after: accelerate launch scripts/train.py
    extras = "heic" if train.run.tracker == "none" else f"heic,{train.run.tracker}"
    launcher = ["accelerate", "launch"] if several else ["python"]
    return f"{INPUTS}/{wheel.name}[{extras}]", [*launcher, f"{INPUTS}/train.py", *flags]


def build_wheel(folder: Path) -> Path:
    """Build this project's wheel from a clean copy of its sources; return its file."""
    with tempfile.TemporaryDirectory() as scratch:
        for name in ("pyproject.toml", "requirements.txt", "README.md"):
            shutil.copy(ROOT / name, scratch)
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / "hotdog_hf", Path(scratch, "hotdog_hf"), ignore=ignored)
        command = [sys.executable, "-m", "pip", "wheel", scratch, "--no-deps", "--wheel-dir", str(folder)]
        if _has_setuptools():  # else pip downloads it
            command.append("--no-build-isolation")
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        reason = next(reversed(done.stderr.strip().splitlines()), f"exit code {done.returncode}")
        raise UserError(f"pip cannot build this project's wheel: {reason}")
    return wheels[0]


def _has_setuptools() -> bool:
    try:
        return int(importlib.metadata.version("setuptools").partition(".")[0]) >= 70
    except importlib.metadata.PackageNotFoundError:
        return False


def _send(api: huggingface_hub.HfApi, plan: Plan, kind: str, folder: str | Path, mount: str) -> Volume:
    """Upload what is new in a folder; return how the job finds it, which may write to the run's folder."""
    writable, path = kind == "runs", plan.run_dir if kind == "inputs" else folder
    if Path(folder).is_dir():
        # What was deleted here is deleted there, but never of a run.
        with _bars_only():
            api.sync_bucket(str(folder), plan.address(kind, path), delete=not writable)
    if writable:
        placeholder = f"{plan.folder(kind, path)}/{PLACEHOLDER}"
        api.batch_bucket_files(plan.bucket, add=[(b"", placeholder)])
    return Volume(
        type="bucket",
        source=plan.bucket,
        mount_path=mount,
        path=plan.folder(kind, path),
        read_only=not writable,
    )


def _bars_only() -> contextlib.AbstractContextManager:
    """Hide the plan that a transfer prints, not its bars."""
    return contextlib.redirect_stdout(io.StringIO())


def _secrets(train: TrainConfig) -> dict[str, str]:
    """Return the keys that the job needs: the Hub's only to read photos or weights there, or to push."""
    names = [train.data.data_dir, train.model.weights, train.hub.push_to_hub or ""]
    secrets = {}
    if train.hub.push_to_hub or any(name.startswith(("hf://", "hf-hub:")) for name in names):
        secrets["HF_TOKEN"] = huggingface_hub.get_token()
    if train.run.tracker == "wandb" and (key := os.environ.get("WANDB_API_KEY")):
        secrets["WANDB_API_KEY"] = key
    return secrets


def follow(plan: Plan, job: huggingface_hub.JobInfo) -> str | None:
    """Print the job's log until it ends, and return the stage it ended in; None if Ctrl-C came before."""
    api = huggingface_hub.HfApi()
    try:
        with hub.hub_errors(f"the job {job.id}"):
            for line in api.fetch_job_logs(job_id=job.id, namespace=plan.user, follow=True):
                print(line, flush=True)
            return str(api.wait_for_job(job.id, namespace=plan.user).status.stage)
    except KeyboardInterrupt:
        return None
    except UserError as error:
        raise UserError(f"{error}. The job continues: `{logs_command(job)}` shows its log") from error


def fetch_run(plan: Plan) -> None:
    """Download the run's folder, as far as the job has written it, and delete it from the bucket."""
    api, address = huggingface_hub.HfApi(), plan.address("runs", plan.run_dir)
    try:
        with hub.hub_errors(plan.bucket):
            with _bars_only():
                api.sync_bucket(address, str(plan.run_dir), exclude=[PLACEHOLDER, ".lock"])
            if files := _run_files(api, plan):
                api.batch_bucket_files(plan.bucket, delete=[file.path for file in files])
    except UserError as error:
        raise UserError(f"{error}. Nothing is lost: fetch the run with `{fetch_command(plan)}`") from error


def check_ended_well(plan: Plan, stage: str) -> None:
    """Raise `UserError`, saying what to do, if the job did not end as it should."""
    if stage == "COMPLETED":
        return
    left = f"what it saved is in {plan.run_dir}" if plan.run_dir.is_dir() else "it saved nothing"
    again = ""
    if (plan.run_dir / "checkpoints").is_dir() and not (plan.run_dir / "model").is_dir():
        again = "; the same command with --resume auto and a longer --timeout continues it"
    raise UserError(f"the job ended as {stage}, see its log above; {left}{again}")


def describe_detached(plan: Plan, job: huggingface_hub.JobInfo) -> str:
    """Return what can be done with a job that nobody waits for."""
    return "\n".join(
        [
            f"detached: the job continues until it ends, and is paid for until then: {job.url}",
            f"  its log:     {logs_command(job)}",
            f"  stop it:     hf jobs cancel {job.id}",
            f"  its results: {fetch_command(plan)}",
        ]
    )


def logs_command(job: huggingface_hub.JobInfo) -> str:
    """Return the command that shows a job's log."""
    return f"hf jobs logs --follow {job.id}"


def fetch_command(plan: Plan) -> str:
    """Return the command that downloads the run's folder."""
    return shlex.join(["hf", "buckets", "sync", plan.address("runs", plan.run_dir), str(plan.run_dir)])


def _cents_up(dollars: float) -> float:
    """Round up to whole cents, so that what is shown as the most is the most."""
    return math.ceil(round(100 * dollars, 3)) / 100


def _duration(seconds: int) -> str:
    """Return a time in the largest unit that divides it."""
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds % length == 0:
            return f"{seconds // length} {unit}"
    return f"{seconds} s"
