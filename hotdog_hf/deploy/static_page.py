"""A folder with a web page that runs the model in the browser: no server computes, no photo is uploaded."""

import gzip
import hashlib
import os
import shlex
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

import hotdog_hf
from hotdog_hf.deploy.export import check_extra, export_onnx
from hotdog_hf.errors import UserError
from hotdog_hf.files import replacing_file, replacing_folder, write_json, writing_to
from hotdog_hf.machine import cache_dir
from hotdog_hf.model.neighbors import usual_limit
from hotdog_hf.model.predictor import load_predictor
from hotdog_hf.webpage import check_output_dir

PAGE = Path(__file__).parent / "page"
PAGE_FILES = ("index.html", "app.js", "classifier.js", "sw.js")
# ONNX Runtime Web, of the npm package `onnxruntime-web`: its files and their SHA-256.
RUNTIME = "onnxruntime-web"
RUNTIME_VERSION = "1.30.0"
RUNTIME_FOLDER = f"{RUNTIME}-{RUNTIME_VERSION}"
SCRIPT, WASM = "ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm"
DIGESTS = {
    SCRIPT: "11e64bd8ffe11bd1a2a2f0d6275fdfbbba7262f0b76b99b53d228a8a22ef3d90",
    WASM: "3398c10d07d229bd91b364548e130e0e51a8e5704b88c7c083ebbeb78842dee2",
}
# Compressed it is a quarter of the size, and few servers compress it themselves.
MODEL, PACKED_WASM = "model.onnx", f"{WASM}.gz"
FILES = ("model.json", MODEL, PACKED_WASM, SCRIPT, *PAGE_FILES)


def export_page(
    name: str | os.PathLike,
    out: str | os.PathLike,
    ort_dir: str | os.PathLike | None = None,
    **options: object,
) -> float:
    """Write the folder of a page that classifies photos with a saved model.

    `ort_dir` holds the files of ONNX Runtime Web; by default npm downloads them once. `options` and the
    result are those of `export_onnx`. Raises `UserError`, and leaves `out` as it was, if it cannot be done.
    """
    check_extra()
    folder = check_output_dir(out, FILES, "an exported page", "OUT")
    runtime = find_runtime(ort_dir)
    with writing_to(folder), replacing_folder(folder) as part:
        difference = export_onnx(name, part / MODEL, takes_photos=True, **options)
        (part / SCRIPT).write_bytes(runtime[SCRIPT])
        (part / PACKED_WASM).write_bytes(gzip.compress(runtime[WASM], mtime=0))
        for file in PAGE_FILES:
            shutil.copyfile(PAGE / file, part / file)
        write_json(part / "model.json", _describe(part))
    return difference


def describe_page(folder: str | os.PathLike) -> str:
    """Return the sizes of a page's files, and the command that serves it here."""
    sizes = {name: (Path(folder) / name).stat().st_size for name in (MODEL, PACKED_WASM, SCRIPT)}
    sizes["page and labels"] = sum(
        (Path(folder) / name).stat().st_size for name in ("model.json", *PAGE_FILES)
    )
    sizes["total"] = sum(sizes.values())
    lines = [f"  {name:<32} {size / 1e6:6.2f} MB" for name, size in sizes.items()]
    command = shlex.join(["python", *"-m http.server --bind 127.0.0.1 --directory".split(), str(folder)])
    return "\n".join([f"{folder}: a page that needs no server of its own", *lines, f"try it: {command}"])


def _describe(folder: Path) -> dict:
    """Return what the page needs to know: classes, files to keep for offline use, and their versions."""
    names = (MODEL, PACKED_WASM, SCRIPT, *PAGE_FILES)
    digests = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest()[:12] for name in names}
    predictor = load_predictor(folder / MODEL)
    everything = repr((sorted(digests.items()), predictor.label_names))
    return {
        "hotdog_hf": hotdog_hf.__version__,
        "version": hashlib.sha256(everything.encode()).hexdigest()[:12],
        "label_names": predictor.label_names,
        "distance_limit": usual_limit(predictor.held_out_distances),
        "bytes": sum((folder / name).stat().st_size for name in names),
        "files": {
            "model": f"{MODEL}?{digests[MODEL]}",
            "runtime": f"{PACKED_WASM}?{digests[PACKED_WASM]}",
            "page": [SCRIPT, "index.html", "app.js", "classifier.js"],
        },
    }


def find_runtime(ort_dir: str | os.PathLike | None = None) -> dict[str, bytes]:
    """Return the files of ONNX Runtime Web: from a folder, from the cache, or downloaded by npm.

    Raises `UserError` if there is no npm, or a file is not the one of `RUNTIME_VERSION`.
    """
    if ort_dir is not None:
        return {file: _read_checked(Path(ort_dir) / file) for file in DIGESTS}
    folder = cache_dir() / RUNTIME_FOLDER
    if not all((folder / file).is_file() for file in DIGESTS):
        _download(folder)
    return {file: _read_checked(folder / file) for file in DIGESTS}


def _read_checked(path: Path) -> bytes:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"cannot read {path}: {error.strerror};"
            f" --ort-dir is the folder dist/ of {RUNTIME} {RUNTIME_VERSION}"
        ) from error
    if hashlib.sha256(content).hexdigest() != DIGESTS[path.name]:
        raise UserError(
            f"{path} is not the file of {RUNTIME} {RUNTIME_VERSION}: its SHA-256 differs;"
            " delete it and try again"
        )
    return content


def _download(folder: Path) -> None:
    """Let npm download the package, and keep the files that are needed."""
    package = f"{RUNTIME}@{RUNTIME_VERSION}"
    elsewhere = f"or give the folder dist/ of {RUNTIME} {RUNTIME_VERSION} with --ort-dir DIR"
    npm = shutil.which("npm")
    if npm is None:
        raise UserError(f"--web needs npm once, to download {package}: install Node.js, {elsewhere}")
    print(f"npm downloads {package} (33 MB) once, for all pages ...", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        command = [npm, "pack", package, "--ignore-scripts", "--fetch-retries=1", "--loglevel=error"]
        done = subprocess.run(command, cwd=scratch, capture_output=True, text=True, check=False)
        archives = list(Path(scratch).glob("*.tgz"))
        if done.returncode or not archives:
            reason = next(iter(done.stderr.strip().splitlines()), f"exit code {done.returncode}")
            raise UserError(
                f"npm cannot download {package} ({reason}): try again with a network, {elsewhere}"
            )
        with tarfile.open(archives[0]) as archive, writing_to(folder):
            for file in DIGESTS:
                with replacing_file(folder / file) as part:
                    part.write_bytes(archive.extractfile(f"package/dist/{file}").read())
