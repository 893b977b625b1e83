"""The rules of who may import whom, read from the code itself; `hotdog_hf/README.md` has the map."""

import ast
from pathlib import Path

import pytest
from conftest import ROOT, TINY_MODEL, run

PACKAGE = ROOT / "hotdog_hf"
MODULES = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}
ROOMS = {"data", "model", "training", "report", "audit", "compare", "study", "bench", "deploy"}
PAGES = {"report", "audit", "compare", "study", "bench"}
# A room -> the rooms and ground files that its modules must not import, also not within a function.
NEVER = {
    "data": ROOMS - {"data"},
    "model": ROOMS - {"data", "model"},
    "training": PAGES | {"hub", "deploy"},
    "deploy": PAGES | {"training"},
    **{room: PAGES - {room} for room in PAGES},
    **{module: {"data", "hub", *ROOMS} for module in MODULES if "." not in module and module not in ROOMS},
}
# The public face and the network itself may name what they offer.
NEVER["hub"] = ROOMS
NEVER["__init__"] = set()
# Modules that scripts import before they know that torch is needed.
WITHOUT_TORCH = (
    "data.folder data.images data.check data.download data.sample model.places model.predictor"
    " bench.setup bench.processes bench.sections bench.runner bench.page"
    " compare.runs compare.page deploy.app"
).split()
MAX_LINES, MAX_PARAMETERS = 80, 7


def imports(path: Path, at_import: bool = False) -> set[str]:
    """Names of the modules that a file imports, ours as `data.splits`; optionally of its top level alone."""
    tree, found = ast.parse(path.read_text(encoding="utf-8")), set()
    for node in tree.body if at_import else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {name.removeprefix("hotdog_hf.") for name in found}


def functions() -> list[tuple[str, ast.FunctionDef]]:
    nodes = [(name, node) for name, path in MODULES.items() for node in ast.walk(ast.parse(path.read_text()))]
    return [(f"{name}.{node.name}", node) for name, node in nodes if isinstance(node, ast.FunctionDef)]


@pytest.mark.parametrize("module", sorted(MODULES))
def test_no_module_imports_what_its_room_must_not_know(module):
    room = module.partition(".")[0]
    known = {name.partition(".")[0] for name in imports(MODULES[module])}
    assert not known & NEVER[room]


def test_no_circle_among_modules():
    arrows = {module: imports(path) & MODULES.keys() for module, path in MODULES.items()}
    while free := {module for module, known in arrows.items() if not known & arrows.keys()}:
        arrows = {module: known for module, known in arrows.items() if module not in free}
    assert not arrows, f"these import each other: {sorted(arrows)}"


def test_torch_is_not_imported_before_it_is_needed():
    slow, reached = {"torch", "timm", "accelerate", "torchvision"}, set(WITHOUT_TORCH)
    while grown := {n for m in reached for n in imports(MODULES[m], True) & MODULES.keys()} - reached:
        reached |= grown
    for module in reached:
        assert not {name.partition(".")[0] for name in imports(MODULES[module], True)} & slow, module


def test_functions_stay_short_and_take_few_parameters():
    for name, node in functions():
        if name.startswith(("data.sample.", "config.")):
            continue
        assert node.end_lineno - node.lineno + 1 <= MAX_LINES, name
        if name.startswith(("data.", "model.", "training.")):
            parameters = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            assert len([p for p in parameters if p.arg not in ("self", "cls")]) <= MAX_PARAMETERS, name


def test_a_scripts_main_is_a_table_of_contents():
    for path in sorted((ROOT / "scripts").glob("*.py")):
        if path.name == "plain_loop.py":  # the chapter's own loop
            continue
        mains = [n for n in ast.parse(path.read_text()).body if getattr(n, "name", "") == "main"]
        assert all(node.end_lineno - node.lineno + 1 <= 40 for node in mains), path.name


NOT_BEFORE_THE_FIRST_STEP = set(
    "sklearn matplotlib transformers captum onnxruntime gradio evaluate scipy.stats scipy.optimize".split()
)
FIRST_STEP = """
import runpy, sys
sys.argv = sys.argv[1:]
from hotdog_hf.training import engine
def train_steps(*_, **__):
    sys.exit("imported: " + " ".join(sys.modules))
engine.train_steps = train_steps
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_training_imports_only_what_its_first_step_needs(photos_dir, tmp_path):
    flags = [
        "--data-dir",
        photos_dir,
        "--model",
        TINY_MODEL,
        "--weights",
        "none",
        "--output-dir",
        tmp_path / "run",
    ]
    first = run("python", "-c", FIRST_STEP, ROOT / "scripts/train.py", *flags)
    _, _, modules = first.stderr.partition("imported: ")
    assert "torch" in modules.split(), first.stderr
    assert not NOT_BEFORE_THE_FIRST_STEP & {*modules.split()}


NO_TORCH = """
import runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    print("torch" in sys.modules)
"""


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("train.py", "--data-dir", "missing"), "no such data folder: missing"),
        (("train.py", "--data-dir", ".", "--weights", "missing.pth"), "--weights missing.pth: no such file"),
        (("train.py", "--data-dir", ".", "--labels", "missing.csv"), "missing.csv"),
        (("audit.py", "missing"), "no such data folder: missing"),
        (("shard.py", "missing", "shards"), "no such data folder: missing"),
        (("reproduce.py", "--data-dir", "missing"), "no such data folder: missing"),
        (("predict.py", "runs/missing/model", "photo.jpg"), "runs/missing/model is not a saved model"),
        (("report.py", "runs/missing/model"), "runs/missing/model is not a saved model"),
        (("export.py", "runs/missing/model", "model.onnx"), "runs/missing/model is not a saved model"),
        (("push.py", "hf-hub:user/model", "user/copy"), "hf-hub:user/model is not a saved model"),
    ],
)
def test_what_is_missing_is_named_before_torch_is_imported(words, message):
    ended = run("python", "-c", NO_TORCH, ROOT / "scripts" / words[0], *words[1:])
    assert ended.returncode == 2 and message in ended.stderr, ended.stderr
    assert ended.stdout.splitlines() == ["False"]
