"""Run a training as a Hugging Face Job, on a machine of the Hub, paid by the minute.

    python scripts/launch_job.py --flavor a10g-small -- --recipe best --data-dir my/photos
    python scripts/launch_job.py --flavor t4-small --timeout 2h --yes -- --data-dir hf://datasets/user/photos

After -- come the flags of scripts/train.py. Log in once with `hf auth login`, or set HF_TOKEN.
"""

import re
import sys
from dataclasses import dataclass
from typing import Annotated

import tyro
from tyro.conf import Positional

from hotdog_hf.config import parse_train_config
from hotdog_hf.errors import UserError, exit_on_user_error

UNITS = {"s": 1, "m": 60, "h": 3600, "d": 24 * 3600}


@dataclass(frozen=True)
class JobConfig:
    """Run a training as a Hugging Face Job: photos go up, the run's folder comes back.

    The price is shown before anything is uploaded. A local data folder is uploaded to a private bucket of
    yours, and so are this project, weights and tables of labels. Ctrl-C leaves the job running.
    """

    # Machine of the Hub, such as cpu-upgrade, t4-small, a10g-small, a100-large; a wrong one lists all.
    flavor: str
    # After --: the flags of scripts/train.py. They are checked here before anything is uploaded.
    train: Annotated[Positional[tuple[str, ...]], tyro.conf.arg(metavar="-- TRAIN_FLAGS")] = ()
    # The job is ended after this time: 45m, 2h, 1d. The training is stopped a tenth of it earlier (10 minutes
    # at most), so that its state is saved and comes back.
    timeout: str = "1h"
    # Start without asking.
    yes: bool = False
    # Docker image that the job starts from: one with Python, pip and bash.
    image: str = "python:3.12"

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[1-9]\d*[smhd]", self.timeout):
            raise ValueError(f"--timeout must be like 45m, 2h or 1d, got {self.timeout!r}")

    @property
    def seconds(self) -> int:
        """Return the time-out in seconds."""
        return int(self.timeout[:-1]) * UNITS[self.timeout[-1]]


def main(config: JobConfig) -> None:
    """Check, show the price, upload, follow the log, fetch the run."""
    train = parse_train_config(list(config.train))

    from hotdog_hf.deploy import remote_job

    plan = remote_job.make_plan(train, config.flavor, config.seconds, config.image)
    print(plan.describe())
    confirm(config.yes)
    job = remote_job.start(plan)
    print(f"started: {job.url}   Ctrl-C leaves it running", flush=True)
    stage = remote_job.follow(plan, job)
    if stage is None:
        print(remote_job.describe_detached(plan, job))
        return
    remote_job.fetch_run(plan)
    remote_job.check_ended_well(plan, stage)
    print(f"model: {plan.run_dir}/model   numbers: {plan.run_dir}/metrics.jsonl")


def confirm(yes: bool) -> None:
    """Ask whether to start; without a terminal, that needs --yes."""
    if yes:
        return
    if not sys.stdin.isatty():
        raise UserError("nothing was started: add --yes to start without being asked")
    try:
        answer = input("Start it? [y/N] ")
    except EOFError:  # Ctrl-D
        answer = ""
    if answer.strip().lower() not in ("y", "yes"):
        raise UserError("nothing was started")


if __name__ == "__main__":
    with exit_on_user_error():
        main(tyro.cli(JobConfig))
