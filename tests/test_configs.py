"""The launcher's files: each is read as accelerate reads it, and what a CPU can run is run."""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import time
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import timm
import torch
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.dataclasses import DistributedType
from conftest import ROOT, TINY_MODEL, begin, run
from test_scripts import metrics_of

from hotdog_hf.config import override, parse_train_config
from hotdog_hf.errors import UserError
from hotdog_hf.model.saved import load_model
from hotdog_hf.training import checkpoint, job, sharding

CONFIGS = ROOT / "configs"
LAUNCH = ("accelerate", "launch", "--config_file")
FILES = sorted(CONFIGS.glob("*.yaml"))


def launch_args(*flags):
    """Return what `accelerate launch` makes of a command line, as far as to start processes."""
    args, *_ = _validate_launch_command(launch_command_parser().parse_args([*flags, "scripts/train.py"]))
    return args


@pytest.mark.parametrize("path", [*FILES, ROOT / "accelerate_config.yaml"], ids=lambda path: path.stem)
def test_accelerate_reads_every_file(path):
    config = load_config_from_file(str(path))  # refuses keys that it does not know
    assert isinstance(config, ClusterConfig) and config.mixed_precision == "no"
    several = config.num_processes != 1 or path.stem == "accelerate_config"
    kind = DistributedType.FSDP if path.stem == "fsdp" else DistributedType.MULTI_GPU
    assert (config.distributed_type == kind) is several
    # Two runs on one machine must not meet on a port; two machines must.
    assert config.main_process_port == (29500 if config.num_machines > 1 else 0 if several else None)


def test_every_file_shows_how_it_is_used():
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        assert f"accelerate launch --config_file configs/{path.name}" in text, path


def test_cpu_hides_the_gpus_and_one_gpu_takes_the_first():
    assert launch_args("--config_file", str(CONFIGS / "cpu.yaml")).gpu_ids == "-1,-1"
    assert launch_args("--config_file", str(CONFIGS / "one_gpu.yaml")).gpu_ids == "0"


@pytest.mark.parametrize("name", ["multi_gpu", "two_nodes"])
def test_a_number_of_processes_that_depends_on_the_machine_has_to_be_given(name):
    flags = ("--config_file", str(CONFIGS / f"{name}.yaml"))
    with pytest.raises(ValueError, match="manually pass in `--num_processes`"):
        launch_args(*flags)
    args = launch_args(*flags, "--num_processes", "4")
    assert (args.num_processes, args.multi_gpu, args.num_machines) == (4, True, 1 + (name == "two_nodes"))


def training(photos_dir, tiny_weights, *launcher, train_flags=()):
    """Return the command of a training on a tiny model."""
    # BatchNorm statistics of the source: by the batch they would depend on how many processes share it.
    return [
        *launcher, ROOT / "scripts/train.py", "--data-dir", photos_dir,
        "--model", TINY_MODEL, "--weights", tiny_weights, "--batch-norm", "source", "--image-size", 64,
        "--batch-size", 8, "--num-threads", 1, "--epochs", 2, "--output-dir", "runs/it", *train_flags,
    ]  # fmt: skip


def train_in(cwd, *command, train_flags=()):
    """Train in a working folder, and return what was printed."""
    cwd.mkdir(exist_ok=True)
    done = run(*training(*command, train_flags=train_flags), cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout


def start(cwd, *command, train_flags=()):
    """Start a training in a working folder, as a user would; `wait` writes a log beside the folder."""
    cwd.mkdir(exist_ok=True)
    process = begin(*training(*command, train_flags=train_flags), cwd=cwd)
    process.log = cwd.parent / f"{cwd.name}.log"
    return process


def wait(*processes, seconds=120):
    """Wait until all have ended well; where one fails, end the others, which would wait for it."""
    deadline = time.monotonic() + seconds
    while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
        if any(process.poll() for process in processes):
            break
        time.sleep(0.05)
    # A launcher whose partner has gone waits for it for minutes.
    for process in processes:
        if process.poll() is None:
            kill(family(process))
    for process in processes:
        process.log.write_text("".join(process.communicate()))
    return [process.returncode for process in processes]


def family(process):
    """Return a process and all that it started."""
    parent = psutil.Process(process.pid)
    return [*parent.children(recursive=True), parent]


def kill(processes):
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def assert_same_numbers(rows, expected):
    assert len(rows) == len(expected) > 0
    for row, other in zip(rows, expected, strict=True):
        assert row.keys() == other.keys()
        for name in (name for name in row if not re.search("second|share_of_limit", name)):
            np.testing.assert_allclose(row[name], other[name], rtol=1e-4, atol=1e-6, err_msg=name)


@pytest.fixture(scope="module")
def alone(tmp_path_factory, photos_dir, tiny_weights):
    """The metrics of three epochs of a single process."""
    cwd = tmp_path_factory.mktemp("alone") / "work"
    train_in(cwd, photos_dir, tiny_weights, "python", train_flags=("--epochs", 3))
    return metrics_of(cwd / "runs/it")


def test_two_cpu_processes_compute_as_one(alone, tmp_path, photos_dir, tiny_weights):
    cwd = tmp_path / "work"
    printed = train_in(cwd, photos_dir, tiny_weights, *LAUNCH, CONFIGS / "cpu.yaml")
    assert "2 x cpu (1 threads)" in printed
    assert_same_numbers(metrics_of(cwd / "runs/it")[:2], alone[:2])


# A fitted head, AdamW, an average of the weights, accumulation, a saved epoch: everything that is sharded.
LIGHT = (
    *("--recipe", "light", "--frozen-share", 0, "--val-fraction", 0.25, "--label-smoothing", 0.1),
    *("--learning-rate", 0.003, "--schedule", "constant", "--warmup-fraction", 0),
    # Five and four photos: without care three pieces for the one process, two for the other.
    *("--batch-size", 9, "--gradient-accumulation-steps", 3),
)
MORE_EPOCHS = ("--epochs", 3, "--resume", "auto", "--resume-anyway")


def launch_in_pieces(cwd, photos_dir, tiny_weights, *flags):
    """Train a network sharded over two CPU processes, as a cluster's GPUs would."""
    fsdp = (*LAUNCH, CONFIGS / "fsdp.yaml", "--num_processes", 2, "--fsdp_min_num_params", 5000)
    printed = train_in(cwd, photos_dir, tiny_weights, *fsdp, train_flags=(*LIGHT, *flags))
    assert "2 x cpu (1 threads), float32, sharded (FSDP)" in printed


@pytest.fixture(scope="module")
def light_alone(tmp_path_factory, photos_dir, tiny_weights):
    """The metrics of three epochs of the recipe light, by a single process."""
    cwd = tmp_path_factory.mktemp("light") / "work"
    train_in(cwd, photos_dir, tiny_weights, "python", train_flags=(*LIGHT, "--epochs", 3))
    rows = metrics_of(cwd / "runs/it")
    assert rows[3]["validation_loss"] != pytest.approx(rows[0]["validation_loss"], rel=0.01)
    return rows


@pytest.fixture(scope="module")
def in_pieces(tmp_path_factory, photos_dir, tiny_weights):
    """The working folder of two epochs of it in pieces."""
    cwd = tmp_path_factory.mktemp("pieces") / "work"
    launch_in_pieces(cwd, photos_dir, tiny_weights)
    return cwd


def test_a_network_in_pieces_computes_as_one_process(in_pieces, light_alone):
    assert_same_numbers(metrics_of(in_pieces / "runs/it")[:3], light_alone[:3])
    assert (in_pieces / "runs/it/model/neighbors.safetensors").exists()


@pytest.mark.parametrize(
    ("flags", "flag"), [((), "--frozen-share 0.5"), (("--frozen-share", 0, "--freeze-body"), "--freeze-body")]
)
def test_pieces_above_frozen_layers_do_not_accumulate_gradients(flags, flag):
    config = parse_train_config(["--recipe", "light", "--gradient-accumulation-steps", "2", *map(str, flags)])
    with pytest.raises(UserError, match=f"{flag}: FSDP does not accumulate"):
        job.check_sharded(config)
    job.check_sharded(override(config, gradient_accumulation_steps=1))
    job.check_sharded(override(config, frozen_share=0.0, freeze_body=False))


@pytest.mark.parametrize(
    ("name", "least", "kinds"),
    [
        ("resnet18", 5_000_000, ["BasicBlock"]),
        ("resnet18", 50_000_000, []),
        ("vit_tiny_patch16_224", 5_000_000, ["Block"]),  # in a Sequential
        ("xcit_nano_12_p16_224", 500_000, ["XCABlock"]),  # in a ModuleList, which cannot be a piece
        (
            "densenet121",
            2_000_000,
            ["BatchNormAct2d", "Conv2d", "DenseLayer", "MaxPool2d"],
        ),  # in a ModuleDict
    ],
)
def test_pieces_are_a_networks_blocks(name, least, kinds):
    with torch.device("meta"):
        assert sharding.block_kinds(timm.create_model(name), least) == kinds


def test_what_a_network_in_pieces_saves_is_whole(in_pieces):
    saved = load_model(in_pieces / "runs/it/model").state_dict()
    weights, _ = checkpoint.read(checkpoint.latest(in_pieces / "runs/it"))
    shapes = {name.removeprefix("model."): value.shape for name, value in weights.items() if "model." in name}
    assert shapes == {name: value.shape for name, value in saved.items()}
    # Each process has random numbers of its own, for the masks of dropout.
    assert not torch.equal(weights["random.0.torch"], weights["random.1.torch"])


def test_a_network_in_pieces_goes_on(in_pieces, light_alone, tmp_path, photos_dir, tiny_weights):
    shutil.copytree(in_pieces, tmp_path / "work")
    launch_in_pieces(tmp_path / "work", photos_dir, tiny_weights, *MORE_EPOCHS)
    assert_same_numbers(metrics_of(tmp_path / "work/runs/it"), light_alone)


def test_whole_copies_go_on_from_a_checkpoint_of_pieces(
    in_pieces, light_alone, tmp_path, photos_dir, tiny_weights
):
    shutil.copytree(in_pieces, tmp_path / "work")
    cpu, flags = (*LAUNCH, CONFIGS / "cpu.yaml"), (*LIGHT, *MORE_EPOCHS)
    train_in(tmp_path / "work", photos_dir, tiny_weights, *cpu, train_flags=flags)
    assert_same_numbers(metrics_of(tmp_path / "work/runs/it"), light_alone)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launch_on_two_nodes(folder, photos_dir, tiny_weights, train_flags=()):
    """Train by two launches that share nothing but an address: the exit codes of both."""
    port = free_port()
    return wait(
        *(
            start(
                folder / f"node{rank}",
                photos_dir,
                tiny_weights,
                *(*LAUNCH, CONFIGS / "two_nodes.yaml", "--num_processes", 2),
                *("--machine_rank", rank, "--main_process_ip", "127.0.0.1", "--main_process_port", port),
                train_flags=train_flags,
            )
            for rank in range(2)
        )
    )


@pytest.fixture(scope="module")
def two_nodes(tmp_path_factory, photos_dir, tiny_weights):
    """The folder of a run on two nodes, each with a working folder of its own, and the exit codes."""
    folder = tmp_path_factory.mktemp("nodes")
    return folder, launch_on_two_nodes(folder, photos_dir, tiny_weights)


def test_two_nodes_compute_as_one_process_and_the_second_writes_nothing(two_nodes, alone):
    folder, codes = two_nodes
    assert codes == [0, 0], (folder / "node0.log").read_text() + (folder / "node1.log").read_text()
    assert "2 x cpu" in (folder / "node1.log").read_text()
    assert_same_numbers(metrics_of(folder / "node0/runs/it")[:2], alone[:2])
    assert list((folder / "node1").iterdir()) == []


def test_two_nodes_go_on_from_the_first_ones_checkpoint(two_nodes, alone, photos_dir, tiny_weights):
    folder, _ = two_nodes
    flags = ("--epochs", 3, "--resume", "auto", "--resume-anyway")
    assert launch_on_two_nodes(folder, photos_dir, tiny_weights, flags) == [0, 0]
    assert_same_numbers(metrics_of(folder / "node0/runs/it")[:3], alone[:3])
    assert list((folder / "node1").iterdir()) == []


def test_two_nodes_with_different_photos_are_refused(photos_dir, tiny_weights, tmp_path):
    for node in ("node0", "node1"):
        shutil.copytree(photos_dir, tmp_path / node / "photos")
    next((tmp_path / "node1/photos/train/hotdog").iterdir()).unlink()
    codes = launch_on_two_nodes(tmp_path, "photos", tiny_weights)
    assert 0 not in codes and not (tmp_path / "node0/runs").exists()
    for node in ("node0", "node1"):
        assert (
            "process 1 finds other photos in photos than process 0" in (tmp_path / f"{node}.log").read_text()
        )


def test_the_slurm_script_asks_for_the_signal_in_time_and_is_valid_bash():
    script = CONFIGS / "slurm.sh"
    assert subprocess.run(["bash", "-n", script], check=False).returncode == 0
    options = dict(re.findall(r"^#SBATCH --([a-z-]+)=?(\S*)", script.read_text(), flags=re.MULTILINE))
    assert options["signal"] == "B:USR1@120" and options["ntasks-per-node"] == "1" and "requeue" in options


# SLURM as far as the script uses it: the task of each node in an environment of its own, signals passed on to
# the task and to what it started.
SRUN = """#!/usr/bin/env bash
for ((node = 0; node < SLURM_JOB_NUM_NODES; node++)); do SLURM_NODEID=$node "$@" & tasks+=($!); done
trap 'kill -USR1 "${tasks[@]}" $(pgrep -P "$(IFS=,; echo "${tasks[*]}")")' USR1
code=0
for task in "${tasks[@]}"; do
    while wait "$task"; status=$?; kill -0 "$task" 2>/dev/null; do :; done
    [ "$status" -eq 0 ] || code=$status
done
exit "$code"
"""
SCONTROL = """#!/usr/bin/env bash
if [ "$1" = show ]; then echo 127.0.0.1; else echo "$@" >> scontrol.log; fi
"""


@pytest.fixture
def slurm(tmp_path, photos_dir, tiny_weights):
    """A cluster of one node with two GPUs, as it says; `start(*flags)` submits the script, as job 7."""
    for name in ("configs", "scripts"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "bin").mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        path = tmp_path / "bin" / name
        path.write_text(text)
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    env = os.environ | {
        "PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_GPUS_ON_NODE": "2",
        "SLURM_JOB_NODELIST": "node0",
    }

    def start(*flags):
        words = [
            "bash", "configs/slurm.sh", "--data-dir", photos_dir, "--model", TINY_MODEL, "--image-size", 64,
            "--weights", tiny_weights, "--batch-size", 8, "--num-threads", 1, *flags,
        ]  # fmt: skip
        with (tmp_path / "job.log").open("a") as log:
            return subprocess.Popen(
                [str(word) for word in words], cwd=tmp_path, env=env, stdout=log, stderr=log
            )

    return SimpleNamespace(start=start, folder=tmp_path, log=tmp_path / "job.log")


@pytest.mark.skipif(not shutil.which("pkill"), reason="the nodes of a cluster have pkill")
def test_a_slurm_job_saves_before_its_time_is_over_and_queues_itself_again(slurm):
    job = slurm.start("--epochs", 10000, "--checkpoint-every", 1000)
    run_dir = slurm.folder / "runs/slurm-7"
    deadline = time.monotonic() + 100
    while not (run_dir / "metrics.jsonl").exists() and time.monotonic() < deadline:
        assert job.poll() is None, slurm.log.read_text()
        time.sleep(0.05)
    processes = family(job)
    job.send_signal(signal.SIGUSR1)
    try:
        assert job.wait(timeout=60) != 0
    finally:
        kill(processes)
    text = slurm.log.read_text()
    assert "stopped in epoch" in text, text
    assert (slurm.folder / "scontrol.log").read_text() == "requeue 7\n"
    # The launcher outlived the signal: when it ends, SLURM ends all that it started.
    assert "2 x cpu" in text and re.search(r"exitcode +: 138", text)
    rows, state = metrics_of(run_dir), checkpoint.latest(run_dir) / "state.json"
    assert json.loads(state.read_text())["progress"]["epoch"] == len(rows) + 1
