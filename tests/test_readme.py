"""Every command and snippet of the README is run here, on a tiny model and small photos, or by the gate."""

import importlib
import re
import shlex
import shutil

import pytest
import tyro
from conftest import ROOT, TINY_MODEL, run
from loopback_hub import LoopbackHub
from test_hub import target

from hotdog_hf.data import stream
from hotdog_hf.data.splits import load_photos
from hotdog_hf.model import saved

README = (ROOT / "README.md").read_text(encoding="utf-8")
GATE = (ROOT / ".ci/run").read_text(encoding="utf-8")


def commands(block_language="bash"):
    blocks = re.findall(rf"```{block_language}\n(.*?)```", README, flags=re.DOTALL)
    lines = (line.partition("#")[0].strip() for block in blocks for line in block.splitlines())
    return [line for line in lines if line]


def inline_commands():
    return re.findall(r"`((?:python|pip|accelerate|make) [^`]+)`", README)


def targets():
    return set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))


@pytest.mark.parametrize(
    "command", [line for line in commands() + inline_commands() if line.startswith("make ")]
)
def test_make_targets_exist_and_run_in_the_gate_or_have_a_command_below(command):
    name = command.split()[1]
    assert name in targets()
    # install runs before each of the others; train needs a network, style changes files, bench takes an hour.
    assert f"make {name}" in GATE or name in ("install", "train", "style", "bench")


def tiny(words, photos_dir, tiny_weights, run_dir):
    """Put small photos, a tiny model and a folder of the test's into a README command."""
    words = [str(photos_dir) if word in ("my/photos", "data/sample") else word for word in words]
    if "my/shards" in words:
        shards = run_dir.parent / "shards"
        stream.write_shards(load_photos(photos_dir), shards, 30, seed=0)
        words = [str(shards) if word == "my/shards" else word for word in words]
    words = [str(tiny_weights) if word in ("my.safetensors", "bundled") else word for word in words]
    words = [TINY_MODEL if word == "tf_efficientnet_lite0" else word for word in words]
    words = ["1" if before == "--epochs" else word for before, word in zip(["", *words], words, strict=False)]
    if "--model" not in words:
        words += ["--model", TINY_MODEL]
    if "--weights" not in words and "scratch" not in words:
        words += ["--weights", str(tiny_weights)]
    if "--epochs" not in words:
        words += ["--epochs", "1"]
    if "--output-dir" in words:
        words[words.index("--output-dir") + 1] = str(run_dir)
    else:
        words += ["--output-dir", str(run_dir)]
    return [*words, "--image-size", "64", "--num-threads", "1"]


TRAIN_COMMANDS = [line for line in commands() if "scripts/train.py" in line and "--help" not in line]


@pytest.mark.parametrize("command", TRAIN_COMMANDS)
def test_train_commands_train(command, photos_dir, tiny_weights, tmp_path):
    done = run(*tiny(shlex.split(command), photos_dir, tiny_weights, tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run/model/model.safetensors").is_file()


STUDY_COMMANDS = [line for line in commands() if "scripts/reproduce.py" in line]


@pytest.mark.parametrize("command", STUDY_COMMANDS)
def test_study_commands_are_understood(command, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    reproduce = importlib.import_module("reproduce")
    words = shlex.split(command)
    assert tyro.cli(reproduce.ReproduceConfig, args=words[words.index("scripts/reproduce.py") + 1 :])


BENCH_COMMANDS = [line for line in commands() if "scripts/benchmark.py" in line]


@pytest.mark.parametrize("command", BENCH_COMMANDS)
def test_benchmark_commands_are_understood(command, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    benchmark = importlib.import_module("benchmark")
    assert tyro.cli(benchmark.BenchmarkConfig, args=shlex.split(command)[2:])


OTHER_COMMANDS = [
    line
    for line in commands()
    if re.match(r"python scripts/(split|check_data|shard|predict|report|export|push)\.py", line)
]


def test_the_other_commands_work_one_after_the_other(photos_dir, tmp_path):
    for name in ("demo", "mine"):
        saved.save_model(target(), tmp_path / "runs" / name / "model")
    shutil.copytree(photos_dir / "train", tmp_path / "pictures")
    shutil.copy(photos_dir / "test/hotdog/000.png", tmp_path / "photo.jpg")
    with LoopbackHub({"hf_test_token": "user"}) as server:
        for command in OTHER_COMMANDS:
            words = [
                str(ROOT / word) if word.startswith("scripts/") else word for word in shlex.split(command)
            ]
            done = run(*words, cwd=tmp_path, **server.environment(tmp_path / "home"))
            assert done.returncode == 0, command + done.stderr
    assert set(server.repos) == {("model", "user/name"), ("dataset", "user/photos")}


def test_no_command_is_left_out():
    checked = {*TRAIN_COMMANDS, *STUDY_COMMANDS, *BENCH_COMMANDS, *OTHER_COMMANDS}
    others = [line for line in commands() if line not in checked]
    assert all(line.startswith("make ") or line == "python scripts/train.py --help" for line in others)
    assert len(TRAIN_COMMANDS) >= 5 and len(OTHER_COMMANDS) >= 8
    assert all((ROOT / script).is_file() for script in re.findall(r"scripts/\w+\.py", README))


@pytest.mark.parametrize("script", sorted(path.name for path in (ROOT / "scripts").glob("*.py")))
def test_every_script_explains_itself(script):
    done = run("python", ROOT / "scripts" / script, "--help")
    assert done.returncode == 0 and "--help" in done.stdout


@pytest.mark.parametrize("command", [line for line in inline_commands() if line.startswith("pip install")])
def test_pip_commands_name_what_exists(command):
    for word in shlex.split(command)[2:]:
        if extra := re.fullmatch(r"\.\[(\w+)\]", word):
            assert f"\n{extra[1]} = [" in (ROOT / "pyproject.toml").read_text()
        elif word.endswith(".txt"):
            assert (ROOT / word).is_file()


def test_the_python_snippet_runs(photos_dir, tmp_path):
    saved.save_model(target(), tmp_path / "model")
    snippet = "\n".join(re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL))
    assert "runs/demo/model" in snippet and "data/sample/test/hotdog/0000.jpg" in snippet
    snippet = snippet.replace("runs/demo/model", str(tmp_path / "model"))
    snippet = snippet.replace("data/sample/test/hotdog/0000.jpg", str(photos_dir / "test/hotdog/000.png"))
    done = run("python", "-c", snippet)
    assert done.returncode == 0, done.stderr
    assert set(eval(done.stdout)) == {"hotdog", "not-hotdog"}
