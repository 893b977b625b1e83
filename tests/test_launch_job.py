"""Trainings as jobs of a Hub on this machine, which really runs them, through the real clients."""

import os
import re
import runpy
import signal
import subprocess
import time
import types
import zipfile
from pathlib import Path

import pytest
import safetensors.torch
import torch
from conftest import ROOT, TINY_MODEL, begin, run
from loopback_jobs import Bucket, JobsHub

from hotdog_hf.config import parse_train_config
from hotdog_hf.deploy import remote_job
from hotdog_hf.errors import UserError

LAUNCH = ROOT / "scripts/launch_job.py"
USERS = {"hf_test_token": "tester", "hf_read_token": "tester"}


@pytest.fixture(scope="module")
def server():
    with JobsHub(USERS, read_only=["hf_read_token"]) as running:
        yield running


@pytest.fixture
def env(server, tmp_path):
    return server.environment(tmp_path / "home")


def flags(photos_dir, weights, run_dir, epochs=1):
    small = ("--model", TINY_MODEL, "--image-size", 64, "--batch-size", 8, "--num-threads", 1)
    given = ("--data-dir", photos_dir, "--weights", weights, "--output-dir", run_dir, "--epochs", epochs)
    return (*given, *small)


def test_a_job_trains_what_this_machine_would(server, env, photos_dir, tiny_weights, tmp_path):
    given = flags(photos_dir, tiny_weights, tmp_path / "run")
    launch = ("python", LAUNCH, "--flavor", "cpu-basic", "--timeout", "30m", "--yes", "--", *given)
    done = run(*launch, **env)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "$0.01 an hour, at most $0.01" in done.stdout and "at most 30 min" in done.stdout
    assert "epoch 1: train loss" in done.stdout, "the job's log"
    here = run("python", ROOT / "scripts/train.py", *flags(photos_dir, tiny_weights, tmp_path / "here"))
    assert here.returncode == 0, here.stderr
    ours, theirs = (
        safetensors.torch.load_file(tmp_path / name / "model/model.safetensors") for name in ("here", "run")
    )
    assert all(torch.equal(theirs[name], value) for name, value in ours.items())
    assert (tmp_path / "run/metrics.jsonl").is_file() and (tmp_path / "run/predictions.csv").is_file()
    bucket = server.buckets["tester/hotdog_hf-jobs"]
    assert bucket.private and sum(path.startswith("photos/") for path in bucket.files) == 36
    made = list(server.jobs.values())[-1]
    assert made.spec["timeoutSeconds"] == 1800 and "secrets" not in made.spec
    installed = next((made.folder / "env/lib").glob("*/site-packages/hotdog_hf"))
    assert not installed.is_symlink(), "the wheel was installed"

    left = [path for path in bucket.files if path.startswith("runs/")]
    assert [Path(path).name for path in left] == [".keep"], "what was fetched is deleted there"


def test_ctrl_c_leaves_the_job_running_and_says_how_to_stop_it(
    server, env, photos_dir, tiny_weights, tmp_path
):
    given, seen = flags(photos_dir, tiny_weights, tmp_path / "run", epochs=1000), server.count("GET", "/logs")
    process = begin("python", LAUNCH, "--flavor", "cpu-basic", "--yes", "--", *given, **env)
    end = time.monotonic() + 120
    while server.count("GET", "/logs") == seen and process.poll() is None and time.monotonic() < end:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(60)
    assert process.returncode == 0, errors
    job = list(server.jobs.values())[-1]
    assert job.stage == "RUNNING" and f"hf jobs logs --follow {job.id}" in output
    [cancel] = re.findall(r"hf jobs cancel \S+", output)
    done = run(*cancel.split(), **env)
    assert done.returncode == 0, done.stderr
    assert job.ended.wait(60) and job.stage == "CANCELED"
    # Had it written something, the next job would not overwrite it.
    bucket, volume = server.buckets["tester/hotdog_hf-jobs"], job.spec["volumes"][-1]
    [empty] = [path for path in bucket.files if path.startswith(f"{volume['path']}/")]
    bucket.files[f"{volume['path']}/config.json"] = bucket.files[empty]
    done = run("python", LAUNCH, "--flavor", "cpu-basic", "--yes", "--", *given, **env)
    assert done.returncode == 2 and "the Hub still holds a run of" in done.stderr, done.stderr
    [fetch] = re.findall(r"`(hf buckets sync .*?)`", done.stderr)
    assert fetch in output and run(*fetch.split(), **env).returncode == 0
    assert (tmp_path / "run/config.json").is_file()


@pytest.mark.parametrize(
    ("token", "words", "message"),
    [
        (None, ["--flavor", "a10g-small"], "not logged in to the Hub: run `hf auth login`"),
        ("hf_wrong_token", ["--flavor", "a10g-small"], "a job: the token is not valid"),
        ("hf_read_token", ["--flavor", "a10g-small"], "the token of tester may only read"),
        ("hf_test_token", ["--flavor", "a10g-smal"], "no such machine (did you mean a10g-small?)"),
        ("hf_test_token", ["--flavor", "a10g-small"], "nothing was started: add --yes"),
        ("hf_test_token", ["--flavor", "a10g-small", "--timeout", "20s"], "--timeout 20s is too short"),
    ],
)
def test_what_cannot_start_is_one_line(server, photos_dir, tmp_path, token, words, message):
    env = server.environment(tmp_path / "home", token) | ({} if token else {"HF_TOKEN": ""})
    before = server.count("POST", "")
    done = run("python", LAUNCH, *words, "--", "--data-dir", photos_dir, **env)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) == 1 and server.count("POST", "") == before


def test_wrong_flags_and_files_are_found_before_the_hub_is_asked(photos_dir, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.json").touch()
    for split in ("train", "test"):
        (tmp_path / "photos" / split).parent.mkdir(exist_ok=True)
        (tmp_path / "photos" / split).symlink_to(photos_dir / split)
    good = ("--data-dir", str(photos_dir))
    for given, message in {
        ("--data-dir", "missing"): "no such data folder: missing",
        ("--data-dir", str(tmp_path / "run")): f"no train/ in {tmp_path}",
        ("--data-dir", str(tmp_path / "photos")): "is a link to a folder",
        (*good, "--labels", "gone.csv"): "--labels gone.csv: no such file",
        (*good, "--weights", "gone.pth"): "--weights gone.pth: no such file",
        (*good, "--output-dir", str(tmp_path / "run")): "already holds a run",
        (*good, "--resume", "runs/x"): "a job resumes with --resume auto",
    }.items():
        with pytest.raises(UserError, match=re.escape(message)):
            remote_job.check_inputs(parse_train_config(list(given)))
    done = run("python", LAUNCH, "--flavor", "cpu-basic", "--", "--epochs", "-1")
    assert done.returncode == 2 and "--epochs must be 0 or more" in done.stderr


@pytest.mark.parametrize("answer", ["no", "", EOFError])
def test_nothing_starts_without_a_yes(monkeypatch, answer):
    def asked(_question):
        if answer is EOFError:  # Ctrl-D
            raise EOFError
        return answer

    monkeypatch.setattr("builtins.input", asked)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    with pytest.raises(UserError, match=r"^nothing was started$"):
        runpy.run_path(str(LAUNCH))["confirm"](yes=False)


def test_a_public_bucket_is_refused(env, server, photos_dir, tmp_path):
    server.buckets["tester/hotdog_hf-jobs"] = Bucket("tester/hotdog_hf-jobs", private=False)
    given = ("--data-dir", photos_dir, "--output-dir", tmp_path / "run")
    done = run("python", LAUNCH, "--flavor", "cpu-basic", "--yes", "--", *given, **env)
    assert done.returncode == 2 and "tester/hotdog_hf-jobs is public" in done.stderr
    assert not server.buckets["tester/hotdog_hf-jobs"].files


def test_weights_and_labels_travel_and_several_gpus_get_a_launcher(photos_dir, tiny_weights, tmp_path):
    table = tmp_path / "labels.csv"
    table.write_text("path,label\n")
    given = ["--data-dir", str(photos_dir), "--weights", str(tiny_weights), "--labels", str(table)]
    train = remote_job.check_inputs(parse_train_config([*given, "--tracker", "tensorboard"]))
    hardware = types.SimpleNamespace(accelerator=types.SimpleNamespace(quantity="2"))
    plan = remote_job.Plan(train, hardware, 3600, "python:3.12", "tester")
    wheel, words = remote_job.pack(plan, tmp_path / "inputs")
    file, _, extras = Path(wheel).name.partition("[")
    assert extras == "heic,tensorboard]"
    sent = {path.name for path in (tmp_path / "inputs").iterdir()}
    assert sent == {"train.py", "0-labels.csv", "weights.safetensors", file}
    assert words[:3] == ["accelerate", "launch", "/mnt/inputs/train.py"]
    there = parse_train_config(words[3:])
    assert (there.data.data_dir, there.run.output_dir) == ("photos", "run")
    assert there.data.labels == ("/mnt/inputs/0-labels.csv",)
    assert there.model.weights == "/mnt/inputs/weights.safetensors"
    with zipfile.ZipFile(tmp_path / "inputs" / file) as archive:
        packed = {*archive.namelist()}
    assert {"hotdog_hf/config.py", "hotdog_hf/page.css.j2", "hotdog_hf/deploy/page/app.js"} <= packed


def test_before_its_time_is_up_the_training_is_stopped_and_its_state_kept(tmp_path):
    for name in ("run", "bin"):
        (tmp_path / name).mkdir()
    (tmp_path / "run/earlier").touch()
    pip = tmp_path / "bin/python"  # has nothing to install here
    pip.write_text("#!/bin/sh\n")
    pip.chmod(0o755)
    script = remote_job.SCRIPT.replace(remote_job.RUN, str(tmp_path / "run"))
    training = "trap 'touch run/state; exit 143' TERM; ls run; sleep 60 & wait"
    done = subprocess.run(
        ["bash", "-c", script, "x.whl", "2", "sh", "-c", training],
        env={"PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}", "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert (done.returncode, done.stdout.split()) == (124, ["earlier"]), done.stderr
    assert (tmp_path / "run/state").is_file()
