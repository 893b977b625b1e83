"""Every command and snippet of the pages is run here, on a tiny model, or listed with the reason why not."""

import ast
import importlib
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import tyro
import yaml
from accelerate.commands.launch import launch_command_parser
from conftest import ROOT, TINY_MODEL, run
from loopback_hub import LoopbackHub
from test_hub import target
from test_scripts import metrics_of

from hotdog_hf import config
from hotdog_hf.data import stream
from hotdog_hf.data.splits import load_photos
from hotdog_hf.model import saved

PAGES = [
    "README.md",
    "scripts/README.md",
    "configs/README.md",
    "hotdog_hf/README.md",
    "hotdog_hf/study/RESULTS.md",
    "hotdog_hf/bench/RESULTS.md",
]
TEXTS = {page: (ROOT / page).read_text(encoding="utf-8") for page in PAGES}
GATE = (ROOT / ".ci/run").read_text(encoding="utf-8")

# Commands that take too long to run here, or need what is not at hand, and what is tested instead. Each is
# parsed by the launcher and the script's own config, or looked up in the Makefile or pyproject.toml.
NOT_RUN = {
    r" (DIR|MODEL)\b": "says how a table was measured, on photos that are not distributed",
    r"scripts/reproduce\.py": "trains for an hour or more: test_reproduce.py runs it with tiny networks",
    r"scripts/benchmark\.py": "measures for an hour: test_benchmark.py runs it with tiny networks",
    r"scripts/compare\.py": "needs two finished runs: test_compare.py writes some",
    r"scripts/download\.py": "needs the network: test_download.py runs it against a server of its own",
    r"configs/cpu\.yaml": "test_configs.py trains with it, and compares the metrics",
    r"configs/(one|multi)_gpu\.yaml": "needs GPUs: test_configs.py reads the files as the launcher does",
    r"configs/two_nodes\.yaml": "needs two machines: test_configs.py starts both on one",
    r"configs/fsdp\.yaml": "needs several GPUs: test_configs.py runs it over two processes on the CPU",
    r"^sbatch": "needs SLURM: test_configs.py runs the script with SLURM's commands replaced",
    r"train\.py --help": "test_every_script_explains_itself runs it",
    r"^make test-gpu": "needs a GPU: make test skips its tests with that reason",
    r"^make (quality|test|demo|report)": "the gate runs it",
    r"^make (train|reproduce)": "needs the network and hours: its script's commands are tested here",
    r"push\.py .* --space": "test_space.py pushes Spaces and starts them",
    r"scripts/launch_job\.py": "needs a Hub that runs jobs: test_launch_job.py has one",
    r"scripts/app\.py": "serves until it is stopped: test_app.py uses it in a browser",
    r"^make app": "its script's command is understood",
    r"export\.py .* --web|^make web": "needs npm, or its download: test_web.py exports and opens a page",
    r"^make audit": "its script's command is run here",
    r"^pip ": "the tests run in an environment that is installed",
    r"^HOTDOG_KILLS": "takes minutes: make test runs the same test with fewer kills",
}


def commands_of(text):
    """Return the commands of a page: the lines of its bash blocks, and those within sentences."""
    blocks = re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL)
    blocks = [
        re.sub(r"\s*\\\n\s*", " ", block) for block in blocks
    ]  # a command that goes on in the next line
    lines = [line.partition(" #")[0].strip() for block in blocks for line in block.splitlines()]
    inline = r"`((?:python|pip|accelerate launch|make|sbatch|scripts/\w+\.py|HOTDOG_\w+=\S+) [^`]+)`"
    return [re.sub("^scripts/", "python scripts/", line) for line in lines + re.findall(inline, text) if line]


COMMANDS = list(dict.fromkeys(command for text in TEXTS.values() for command in commands_of(text)))
PARSED = [command for command in COMMANDS if any(re.search(pattern, command) for pattern in NOT_RUN)]
RUN = [command for command in COMMANDS if command not in PARSED]
TRAIN = [command for command in RUN if "scripts/train.py" in command]
OTHER = [command for command in RUN if command not in TRAIN]


def test_no_command_is_left_out_and_no_reason_is_stale():
    assert len(TRAIN) >= 6 and len(OTHER) >= 11
    assert all(re.match(r"python scripts/\w+\.py ", command) for command in OTHER)
    for pattern in NOT_RUN:
        assert any(re.search(pattern, command) for command in PARSED), f"no page has {pattern}"


@pytest.mark.parametrize("command", PARSED)
def test_commands_that_are_not_run_are_understood(command, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    words = shlex.split(command)
    if words[0] == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
        assert words[1] in targets
        assert f"make {words[1]}" in GATE or "the gate" not in reason_of(command)
        return
    if words[0] == "pip":
        extras = re.findall(r"^\.\[(\w+)\]$", words[-1])
        assert all(f"\n{extra} = [" in (ROOT / "pyproject.toml").read_text() for extra in extras)
        assert extras or words[-1] == "."
        return
    if words[0].startswith("HOTDOG_"):
        file, keyword = words[words.index("-n0") + 1], words[words.index("-k") + 1]
        assert words[0].partition("=")[0] in (text := (ROOT / file).read_text())
        assert re.search(rf"def test_\w*{keyword}", text)
        return
    if words[0] == "accelerate":
        launch = launch_command_parser().parse_args(words[2:])
        assert launch.config_file is None or (ROOT / launch.config_file).is_file()
        script, flags = launch.training_script, launch.training_script_args
    elif words[0] == "sbatch":
        script, flags = "scripts/train.py", words[words.index("configs/slurm.sh") + 1 :]
    else:
        script, flags = words[1], words[2:]
    if script == "scripts/train.py":
        if flags != ["--help"]:
            assert config.parse_train_config(flags)
        return
    module = importlib.import_module(Path(script).stem)
    flags_class = re.search(r"tyro\.cli\((\w+)\)", Path(module.__file__).read_text(encoding="utf-8"))[1]
    assert tyro.cli(getattr(module, flags_class), args=flags)


def reason_of(command):
    return next(reason for pattern, reason in NOT_RUN.items() if re.search(pattern, command))


def tiny(words, photos_dir, tiny_weights, run_dir):
    """Put small photos, a tiny model and a folder of the test's into a training command."""
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
    if "--epochs" not in words and "best" not in words:  # which chooses them
        words += ["--epochs", "1"]
    if "--output-dir" in words:
        words[words.index("--output-dir") + 1] = str(run_dir)
    else:
        words += ["--output-dir", str(run_dir)]
    return [*words, "--image-size", "64", "--num-threads", "1"]


@pytest.mark.parametrize("command", TRAIN)
def test_training_commands_train(command, photos_dir, tiny_weights, tmp_path):
    done = run(*tiny(shlex.split(command), photos_dir, tiny_weights, tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run/model/model.safetensors").is_file()
    keys = {key.replace("validation_", "test_") for row in metrics_of(tmp_path / "run") for key in row}
    about = TEXTS["scripts/README.md"].partition("**Numbers.**")[2].partition("**Upload.**")[0]
    assert keys <= set(re.findall(r"`(\w+)`", about))


def lay_out(folder, photos_dir):
    """Make the folder that the pages' commands and snippets find: two models and photos."""
    for name in ("demo", "mine"):
        saved.save_model(target(), folder / "runs" / name / "model")
    # What report.py reads of the run: its photos, which split.py makes.
    knobs = {"recipe": "chapter", "data": {"data_dir": "my/photos", "val_fraction": 0.0}, "run": {"seed": 0}}
    (folder / "runs/mine/config.json").write_text(json.dumps(knobs))
    shutil.copytree(photos_dir / "train", folder / "pictures")
    (folder / "data/sample/test/hotdog").mkdir(parents=True)
    for name in ("photo.jpg", "data/sample/test/hotdog/0000.jpg"):
        shutil.copy(photos_dir / "test/hotdog/000.png", folder / name)


def snippet_of(page):
    [snippet] = re.findall(r"```python\n(.*?)```", TEXTS[page], flags=re.DOTALL)
    return snippet


def test_only_the_snippets_that_are_run_are_there():
    pages = [page for page in PAGES if "```python" in TEXTS[page]]
    assert pages == ["README.md", "scripts/README.md"]


def test_the_other_commands_work_one_after_the_other(photos_dir, tiny_weights, tmp_path):
    lay_out(tmp_path, photos_dir)
    shutil.copy(tiny_weights, tmp_path / "my.safetensors")
    with LoopbackHub({"hf_test_token": "user"}) as server:
        for command in OTHER:
            words = [
                str(ROOT / word) if word.startswith("scripts/") else word for word in shlex.split(command)
            ]
            if "plain_loop.py" in command:
                words += ["--model", TINY_MODEL, "--image-size", "64", "--num-threads", "1"]
            if "audit.py" in command:
                words += ["--model", TINY_MODEL, "--image-size", "64", "--weights", "my.safetensors"]
            done = run(*words, cwd=tmp_path, **server.environment(tmp_path / "home"))
            assert done.returncode == 0, command + done.stderr
    (tmp_path / "snippet.py").write_text(snippet_of("scripts/README.md"))  # uses an exported file
    done = run("python", "snippet.py", cwd=tmp_path)
    assert set(ast.literal_eval(done.stdout)) == {"hotdog", "not-hotdog"}, done.stderr
    assert set(server.repos) == {("model", "user/name"), ("dataset", "user/photos")}


def test_the_python_snippet_runs(photos_dir, tmp_path, monkeypatch, capsys):
    lay_out(tmp_path, photos_dir)
    monkeypatch.chdir(tmp_path)
    exec(snippet_of("README.md"), {})
    probabilities = eval(capsys.readouterr().out)
    assert set(probabilities) == {"hotdog", "not-hotdog"} and sum(probabilities.values()) == pytest.approx(1)


@pytest.mark.parametrize("script", sorted(path.name for path in (ROOT / "scripts").glob("*.py")))
def test_every_script_explains_itself_and_has_a_section(script):
    done = run("python", ROOT / "scripts" / script, "--help")
    assert done.returncode == 0 and "--help" in done.stdout
    assert f"\n## {script}\n" in TEXTS["scripts/README.md"]


@pytest.mark.parametrize("page", PAGES)
def test_links_and_pictures_lead_somewhere(page):
    links = re.findall(r"\]\(([^)]+)\)|<img src=\"([^\"]+)\"", TEXTS[page])
    for link in (first or second for first, second in links):
        file, _, anchor = link.partition("#")
        if file.startswith("https://"):
            continue
        path = (ROOT / page).parent / file if file else ROOT / page
        assert path.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
            assert anchor in [re.sub(r"[^\w\- ]", "", name.lower()).replace(" ", "-") for name in headings]


def test_the_first_page_stays_short():
    assert len(TEXTS["README.md"].splitlines()) <= 130


def test_the_map_of_the_package_names_what_exists():
    [tree] = re.findall(r"```text\n(hotdog_hf/.*?)```", TEXTS["hotdog_hf/README.md"], flags=re.DOTALL)
    room, named = "", set()
    for indent, name in re.findall(r"^(\W*)([\w.]+/?)", tree, flags=re.MULTILINE)[1:]:
        if len(indent) <= 4:
            room = name if name.endswith("/") else ""
        named.add(name if name.endswith("/") else room + name)
    assert {name for name in named if not (ROOT / "hotdog_hf" / name).exists()} == set()
    rooms = {f"{path.parent.name}/" for path in (ROOT / "hotdog_hf").glob("*/__init__.py")}
    assert rooms <= named


def test_the_forks_gate_is_ours_on_every_python():
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))
    gate = workflow["jobs"]["gate"]
    made = [step["run"] for step in gate["steps"] if step.get("run", "").startswith("make ")]
    assert made == re.findall(r"^make .*", GATE, flags=re.MULTILINE)
    pythons = gate["strategy"]["matrix"]["python"]
    assert f"Python {pythons[0]} to {pythons[-1]}" in TEXTS["README.md"]
