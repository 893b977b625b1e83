"""Machines that are not the one where this was written: containers, other systems, other users."""

import io
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY_MODEL, run
from test_resume import numbers_of, train_here

from hotdog_hf import machine
from hotdog_hf.classification import ClassificationReport
from hotdog_hf.data import loaders
from hotdog_hf.errors import exit_on_user_error
from hotdog_hf.training import launch

FLAGS = ("--model", TINY_MODEL, "--image-size", 64, "--batch-size", 8, "--num-threads", 1, "--epochs", 1)


def control_groups(root, groups, files):
    """Draw `/proc/self/cgroup` and the files below `/sys/fs/cgroup` in a folder that stands for the root."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(groups)
    for name, text in files.items():
        file = root / "sys/fs/cgroup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return root


@pytest.mark.parametrize(
    ("groups", "files", "quota"),
    [
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 1.5),
        ("0::/\n", {"cpu.max": "max 100000\n"}, None),
        ("0::/\n", {}, None),
        # The tightest of the groups around it counts.
        ("0::/a/b\n", {"a/cpu.max": "200000 100000\n", "a/b/cpu.max": "max 100000\n"}, 2.0),
        ("0::/a/b\n", {"a/cpu.max": "200000 100000\n", "a/b/cpu.max": "50000 100000\n"}, 0.5),
        # Version 1: in a container the path is the host's, and the files lie at the root.
        (
            "3:memory:/docker/x\n2:cpu,cpuacct:/docker/x\n0::/\n",
            {"cpu/cpu.cfs_quota_us": "300000\n", "cpu/cpu.cfs_period_us": "100000\n"},
            3.0,
        ),
        (
            "2:cpuset:/\n1:cpu:/\n",
            {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"},
            None,
        ),
    ],
)
def test_a_cpu_quota_is_read_as_the_kernel_writes_it(tmp_path, groups, files, quota):
    assert machine.cpu_quota(control_groups(tmp_path, groups, files)) == quota


def test_a_system_without_control_groups_has_no_quota(tmp_path):
    assert machine.cpu_quota(tmp_path) is None


@pytest.mark.parametrize(
    ("quota", "cores", "threads", "gpu_workers"),
    [(None, 64, 60, 16), (32.0, 32, 30, 16), (2.5, 3, 3, 2), (0.2, 1, 1, 1)],
)
def test_threads_and_workers_follow_a_quota(monkeypatch, quota, cores, threads, gpu_workers):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(64)))
    monkeypatch.setattr("psutil.cpu_count", lambda logical: 64)
    monkeypatch.setattr(machine, "cpu_quota", lambda: quota)
    assert machine.allowed_cores() == cores
    set_threads = []
    monkeypatch.setattr(torch, "set_num_threads", set_threads.append)
    accelerator = launch.build_accelerator("no")
    assert set_threads == [threads]
    assert launch.default_workers(accelerator) == cores // 16
    monkeypatch.setattr(type(accelerator), "device", torch.device("cuda"))
    assert launch.default_workers(accelerator) == gpu_workers


def unshared(*command):
    """Return the command that runs another as a user without a name, who may write only what is their own."""
    return ("unshare", "--user", "--map-user=12345", "--map-group=12345", *command)


def can_unshare():
    try:
        return subprocess.run(unshared("true"), capture_output=True, check=False).returncode == 0
    except OSError:
        return False


@pytest.fixture(scope="module")
def usual(tiny_weights, photos_dir, tmp_path_factory):
    """A run on this machine as it is."""
    run_dir = tmp_path_factory.mktemp("usual") / "run"
    train_here(tiny_weights, photos_dir, run_dir, "--epochs", 1)
    return run_dir


@pytest.mark.skipif(not can_unshare(), reason="this system makes no user namespaces")
def test_a_container_that_lacks_nearly_everything_trains_the_same(usual, photos_dir, tiny_weights, tmp_path):
    """No HOME, a uid without a name, no git nor any program, a read-only folder to work in, ASCII alone."""
    cwd = tmp_path / "read-only"
    cwd.mkdir(mode=0o555)
    words = (sys.executable, ROOT / "scripts/train.py", "--data-dir", photos_dir, "--weights", tiny_weights)
    words = [str(word) for word in (*unshared(*words), *FLAGS, "--output-dir", tmp_path / "run")]
    done = subprocess.run(
        [f"/usr/bin/{words[0]}", *words[1:]],
        cwd=cwd,
        env={
            "PATH": str(tmp_path),
            "PYTHONPATH": str(ROOT),  # in a checkout that is not installed
            "PYTHONSAFEPATH": "1",
            "PYTHONUTF8": "0",
            "PYTHONCOERCECLOCALE": "0",
            "LC_ALL": "C",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        check=False,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr.decode()
    assert numbers_of(tmp_path / "run") == numbers_of(usual)
    assert list(cwd.iterdir()) == [], "nothing is written to the working folder"


def test_a_home_that_cannot_be_written_costs_the_caches_alone(
    tiny_weights, photos_dir, tmp_path, monkeypatch
):
    # Nobody, not even root, makes a folder there.
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nobody")
    monkeypatch.setattr("evaluate.config.HF_METRICS_CACHE", "/proc/nobody/metrics")
    ClassificationReport(["a", "b"])
    for name in ("one", "two"):
        train_here(tiny_weights, photos_dir, tmp_path / name, "--recipe", "probe")
    assert numbers_of(tmp_path / "one") == numbers_of(tmp_path / "two")


def test_a_user_without_a_home_has_no_cache(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")

    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    with pytest.raises(OSError):
        machine.cache_dir().mkdir(parents=True)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_characters_that_the_output_lacks_are_escaped(monkeypatch, encoding):
    output = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(output, encoding=encoding))
    with exit_on_user_error():
        print("класс")
        sys.stdout.flush()
    assert output.getvalue() == rb"\u043a\u043b\u0430\u0441\u0441" + b"\n"


def test_names_in_a_locale_without_utf8_are_refused_with_the_way_out(tmp_path, tiny_weights):
    from conftest import draw_photos

    for split in ("train", "test"):
        draw_photos(tmp_path / "photos" / split, {"süß": 2, "salzig": 2})
    script = ROOT / "scripts/check_data.py"
    env = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"}
    done = run("python", script, tmp_path / "photos", fresh=True, **env)
    assert "Traceback" not in done.stderr
    assert "set PYTHONUTF8=1 if ascii is not its encoding" in done.stdout


def test_without_what_only_linux_has_the_training_is_the_same(usual, photos_dir, tiny_weights, tmp_path):
    flags = ("--data-dir", photos_dir, "--weights", tiny_weights, *FLAGS, "--num-workers", 1)
    done = run("python", ROOT / "tests/elsewhere.py", *flags, "--output-dir", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert f"trained in {tmp_path / 'run'}" in done.stdout
    assert numbers_of(tmp_path / "run") == numbers_of(usual)


HOST_PROGRAM = """
    import multiprocessing, os, signal, sys, time
    import torch
    from hotdog_hf.data import loaders

    class Two(torch.utils.data.Dataset):
        def __len__(self):
            return 2

        def __getitem__(self, index):
            return index

    def outlive(path):
        with open(path, "w") as file:
            file.write(str(os.getpid()))
        time.sleep(1)
        os.rename(path, path + ".done")

    if __name__ == "__main__":
        child = multiprocessing.get_context("fork").Process(target=outlive, args=(sys.argv[1],))
        child.start()
        batches = iter(loaders._loader(Two(), 1, batch_size=1, persistent_workers=True))
        next(batches)
        [worker] = [process for process in multiprocessing.active_children() if process.pid != child.pid]
        os.kill(worker.pid, signal.SIGTERM)  # ignored, so that at exit Python alone would wait for ever
        raise SystemExit(f"worker {worker.pid}")
"""


def test_at_exit_our_loader_processes_end_and_the_programs_own_live_on(tmp_path):
    program = tmp_path / "host.py"
    program.write_text(textwrap.dedent(HOST_PROGRAM))
    done = run("python", program, tmp_path / "child", timeout=60)
    worker = int(done.stderr.rpartition("worker ")[2])
    assert (tmp_path / "child.done").is_file(), "the program's own process was killed"
    with pytest.raises(ProcessLookupError):
        os.kill(worker, 0)


def test_a_worker_is_known_until_it_ends():
    context = loaders._worker_context()
    process = context.Process(target=int)
    process.start()
    assert process in loaders._workers and isinstance(context, multiprocessing.context.BaseContext)
    process.join()


@pytest.fixture
def a_gpu(monkeypatch):
    """Let torch say that there is a GPU with bf16, of which nothing may be used."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda *_: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)


def test_a_launch_for_the_cpu_leaves_a_gpu_alone(a_gpu, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")  # what `accelerate launch --cpu` says
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    accelerator = launch.build_accelerator("auto", num_threads=1)
    assert accelerator.device.type == "cpu" and launch.precision_of(accelerator) == "no"
    loader = loaders.eval_loader(torch.utils.data.TensorDataset(torch.zeros(2)), 1)
    assert not loader.pin_memory
    monkeypatch.setenv("ACCELERATE_USE_CPU", "False")
    assert loaders.eval_loader(torch.utils.data.TensorDataset(torch.zeros(2)), 1).pin_memory


def test_the_stop_signals_are_those_of_the_system(monkeypatch):
    assert machine.stop_signals() == [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1]
    monkeypatch.delattr(signal, "SIGUSR1")
    assert machine.stop_signals() == [signal.SIGTERM, signal.SIGINT]
