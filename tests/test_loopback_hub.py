"""The loopback Hub against the real client libraries.

The clients read `HF_ENDPOINT` and their token when they are imported, so each `client_*` function runs in a
process of its own, with its imports inside, and hands its findings back as JSON.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from loopback_hub import LoopbackHub

USERS = {"hf_test_token": "tester", "hf_read_token": "tester", "hf_guest_token": "guest"}
WEIGHTS_BYTES = 45 * 1024 * 1024
LABELS = ["hotdog", "not-hotdog"]
CARD = """---
library_name: timm
pipeline_tag: image-classification
tags: [image-classification]
model-index:
- name: x
  results:
  - task: {type: image-classification}
    dataset: {type: imagefolder, name: hotdog}
    metrics: [{type: accuracy, value: 0.75}]
---
# A model
"""


@pytest.fixture
def hub() -> Iterator[LoopbackHub]:
    with LoopbackHub(USERS, read_only={"hf_read_token"}) as running:
        yield running


def run_client(hub: LoopbackHub, folder: Path, client: Callable[..., Any], **arguments: Any) -> Any:
    """Return what a `client_*` function finds in a fresh process that talks to `hub`."""
    token = arguments.pop("token", "hf_test_token")
    home = folder / f"home-{token}"
    finished = subprocess.run(
        [sys.executable, __file__, client.__name__, json.dumps(arguments)],
        env=hub.environment(home, token),
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    return json.loads(finished.stdout.splitlines()[-1])


def ask(
    hub: LoopbackHub, method: str, path: str, body: Any = None, **headers: str
) -> tuple[HTTPResponse, bytes]:
    """Return the response and body of one plain HTTP request by the owner."""
    connection = HTTPConnection(hub.url.removeprefix("http://"), timeout=30)
    payload = body if isinstance(body, bytes) else json.dumps(body)
    connection.request(method, path, payload, {"Authorization": "Bearer hf_test_token", **headers})
    response = connection.getresponse()
    content = response.read()
    connection.close()
    return response, content


def failure(call: Callable[[], object]) -> list[Any]:
    """Return the name and HTTP status of the error that a client call ends in."""
    try:
        call()
    except (OSError, ValueError, RuntimeError) as error:
        return [type(error).__name__, getattr(getattr(error, "response", None), "status_code", None)]
    return ["no error", None]


def digests(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file in a folder, by relative path."""
    files = (path for path in folder.rglob("*") if path.is_file() and ".cache" not in path.parts)
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files
    }


def model_folder(parent: Path) -> Path:
    """Return a folder with a card, a configuration and a weights file that is large enough to cut in half."""
    folder = parent / "model"
    folder.mkdir()
    (folder / "README.md").write_text(CARD)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(hashlib.sha256(b"weights").digest() * (WEIGHTS_BYTES // 32))
    return folder


# What runs in the client's process


def client_pushes_twice() -> dict[str, Any]:
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download

    api = HfApi()
    urls = [str(api.create_repo("tester/x")), str(api.create_repo("tester/x", exist_ok=True))]
    commits = [api.upload_folder(repo_id="tester/x", folder_path="model") for _ in range(2)]
    info = api.model_info("tester/x", files_metadata=True)
    results = info.card_data.eval_results
    (entry,) = info.model_index
    return {
        "role": api.whoami()["auth"]["accessToken"]["role"],
        "urls": urls,
        "commits": [commit.oid for commit in commits],
        "commit_url": commits[0].commit_url,
        "sha": info.sha,
        "blobs": {sibling.rfilename: sibling.blob_id for sibling in info.siblings},
        "lfs": {sibling.rfilename: sibling.lfs.sha256 for sibling in info.siblings if sibling.lfs},
        "index": [info.pipeline_tag, info.library_name, entry["name"]],
        "metrics": [[result.metric_type, result.metric_value] for result in results],
        "titles": [commit.title for commit in api.list_repo_commits("tester/x")],
        "config": Path(hf_hub_download("tester/x", "config.json")).read_text(),
        "snapshot": digests(Path(snapshot_download("tester/x", local_dir="snapshot"))),
    }


def client_is_refused() -> dict[str, list[Any]]:
    from huggingface_hub import HfApi, hf_hub_download

    api = HfApi()
    first = api.create_repo("tester/x") and api.model_info("tester/x").sha

    def upload(name: str, content: str = "{}", repo_id: str = "tester/x", **options: Any) -> object:
        data = content.encode()
        return api.upload_file(path_or_fileobj=data, path_in_repo=name, repo_id=repo_id, **options)

    upload("config.json")
    calls: dict[str, Callable[[], object]] = {
        "create, exists": lambda: api.create_repo("tester/x"),
        "create, no token": lambda: api.create_repo("tester/y", token=False),
        "create, unknown token": lambda: api.create_repo("tester/y", token="hf_unknown"),
        "create, read token": lambda: api.create_repo("tester/y", token="hf_read_token"),
        "create, foreign namespace": lambda: api.create_repo("guest/y"),
        "create, read token, exists": lambda: api.create_repo(
            "tester/x", token="hf_read_token", exist_ok=True
        ),
        "create, bad name": lambda: api.create_repo("tester/hot dog"),
        "whoami, unknown token": lambda: api.whoami(token="hf_unknown"),
        "may write": lambda: api.auth_check("tester/x", write=True),
        "may write, read token": lambda: api.auth_check("tester/x", write=True, token="hf_read_token"),
        "upload, no token": lambda: upload("a.txt", token=False),
        "upload, unknown token": lambda: upload("a.txt", token="hf_unknown"),
        "upload, read token": lambda: upload("a.txt", token="hf_read_token"),
        "upload, foreign user": lambda: upload("a.txt", token="hf_guest_token"),
        "upload, no repo": lambda: upload("a.txt", repo_id="tester/none"),
        "upload, no branch": lambda: upload("a.txt", revision="none"),
        "upload, stale parent": lambda: upload("a.txt", parent_commit=first),
        "upload, bad card": lambda: upload("README.md", "---\ntags: [a\n---\n"),
        "download, no repo": lambda: hf_hub_download("tester/none", "config.json"),
        "download, no revision": lambda: hf_hub_download("tester/x", "config.json", revision="none"),
        "download, no file": lambda: hf_hub_download("tester/x", "none.json"),
        "delete, no file": lambda: api.delete_file("none.json", "tester/x"),
    }
    return {name: failure(call) for name, call in calls.items()}


def client_pushes_over_a_bad_line(tries: int) -> list[Any]:
    from huggingface_hub import HfApi

    api = HfApi()
    api.create_repo("tester/x", exist_ok=True)
    outcomes = []
    # The client's own retries stay, only their waiting of 23 seconds goes.
    with mock.patch.object(time, "sleep"):
        for _ in range(tries):
            outcome = failure(lambda: api.upload_folder(repo_id="tester/x", folder_path="model"))
            outcomes.append([*outcome, sorted(api.list_repo_files("tester/x"))])
    return outcomes


def client_looks_at_a_private_repo(create: bool) -> list[Any]:
    from huggingface_hub import HfApi, file_exists, hf_hub_download

    api = HfApi()
    if create:
        api.create_repo("tester/secret", private=True)
        api.upload_file(path_or_fileobj=b"{}", path_in_repo="config.json", repo_id="tester/secret")
    return [
        failure(lambda: api.model_info("tester/secret")),
        failure(lambda: hf_hub_download("tester/secret", "config.json")),
        file_exists("tester/secret", "config.json"),
    ]


def client_works_on_a_branch() -> dict[str, Any]:
    from huggingface_hub import HfApi, hf_hub_download

    api = HfApi()
    api.create_repo("tester/x")
    start = api.upload_file(path_or_fileobj=b"1", path_in_repo="weights/a.txt", repo_id="tester/x").oid
    api.create_branch("tester/x", branch="runs/one")
    api.create_branch("tester/x", branch="fresh", revision=api.list_repo_commits("tester/x")[-1].commit_id)
    branched = {"repo_id": "tester/x", "revision": "runs/one"}
    api.upload_file(path_or_fileobj=b"2", path_in_repo="weights/a.txt", **branched)
    api.upload_file(path_or_fileobj=b"3", path_in_repo="deep/er/b.txt", **branched)
    tree = [entry.path for entry in api.list_repo_tree("tester/x", recursive=True, revision="runs/one")]
    found = [entry.path for entry in api.get_paths_info("tester/x", ["deep", "none"], revision="runs/one")]
    api.delete_folder("deep", **branched)
    api.upload_file(path_or_fileobj=b"4", path_in_repo="weights/a.txt", repo_id="tester/x")
    revisions = ("main", "runs/one", start)
    return {
        "tree": tree,
        "top": [entry.path for entry in api.list_repo_tree("tester/x", revision="runs/one")],
        "found": found,
        "fresh": api.list_repo_files("tester/x", revision="fresh"),
        "branches": [branch.name for branch in api.list_repo_refs("tester/x").branches],
        "texts": [
            Path(hf_hub_download("tester/x", "weights/a.txt", revision=r)).read_text() for r in revisions
        ],
    }


def client_shares_a_model() -> dict[str, Any]:
    import timm
    import torch
    from huggingface_hub import HfApi
    from PIL import Image
    from transformers import pipeline

    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=len(LABELS)).eval()
    timm.models.save_for_hf(model, "model", safe_serialization=True, model_config={"label_names": LABELS})
    # transformers 5.23 passes num_classes itself and fails on the second one that timm 1.0.31 writes.
    config_path = Path("model/config.json")
    config = json.loads(config_path.read_text())
    del config["model_args"]["num_classes"]
    config_path.write_text(json.dumps(config))

    api = HfApi()
    api.create_repo("tester/x")
    api.upload_folder(repo_id="tester/x", folder_path="model")
    images = torch.rand(2, *model.default_cfg["input_size"])
    loaded = timm.create_model("hf-hub:tester/x", pretrained=True).eval()
    with torch.inference_mode():
        equal = torch.equal(model(images), loaded(images))
    answers = pipeline("image-classification", model="tester/x")(Image.new("RGB", (80, 60), "red"))
    return {"equal": equal, "labels": sorted(answer["label"] for answer in answers)}


def client_shares_photos() -> dict[str, Any]:
    from datasets import DatasetDict, load_dataset
    from huggingface_hub import HfApi
    from PIL import Image

    for place in ("train/hotdog", "train/not-hotdog", "test/hotdog", "test/not-hotdog"):
        Path("photos", place).mkdir(parents=True)
        for number in range(2):
            Image.new("RGB", (8, 8), (len(place), number, 0)).save(f"photos/{place}/{number}.png")

    def rows(dataset: DatasetDict) -> dict[str, list[Any]]:
        names = dataset["train"].features["label"].names
        splits = {split: dataset[split] for split in sorted(dataset)}
        return {
            s: [[names[row["label"]], *row["image"].getpixel((0, 0))] for row in splits[s]] for s in splits
        }

    api = HfApi()
    api.create_repo("tester/photos", repo_type="dataset")
    api.upload_folder(repo_id="tester/photos", folder_path="photos", repo_type="dataset")
    raw = load_dataset("tester/photos")
    raw.push_to_hub("tester/parquet")
    files = api.list_repo_files("tester/parquet", repo_type="dataset")
    return {"raw": rows(raw), "parquet": rows(load_dataset("tester/parquet")), "files": files}


def client_deletes_a_repo() -> list[Any]:
    from huggingface_hub import HfApi

    api = HfApi()
    api.create_repo("tester/x")
    foreign = failure(lambda: api.delete_repo("tester/x", token="hf_guest_token"))
    api.delete_repo("tester/x")
    return [foreign, failure(lambda: api.delete_repo("tester/x"))]


# The tests


def test_upload_is_one_commit_and_is_not_repeated(hub: LoopbackHub, tmp_path: Path) -> None:
    sent = digests(model_folder(tmp_path))
    found = run_client(hub, tmp_path, client_pushes_twice)

    assert found["role"] == "write"
    assert found["urls"] == [f"{hub.url}/tester/x"] * 2
    assert found["commits"] == [found["sha"]] * 2
    assert found["commit_url"] == f"{hub.url}/tester/x/commit/{found['sha']}"
    assert found["titles"] == ["Upload folder using huggingface_hub", "initial commit"]
    assert found["config"] == "{}"
    assert found["snapshot"].pop(".gitattributes")
    assert found["snapshot"] == sent
    assert found["index"] == ["image-classification", "timm", "x"]
    assert found["metrics"] == [["accuracy", 0.75]]
    # `git hash-object` gives this id for a file that holds "{}".
    assert found["blobs"]["config.json"] == "9e26dfeeb6e641a33dae4961196235bdb965b21b"
    assert found["lfs"] == {"model.safetensors": sent["model.safetensors"]}
    assert (hub.count("PUT", "/lfs/"), hub.count("POST", "/commit/")) == (1, 1)


def test_refusals_reach_the_caller(hub: LoopbackHub, tmp_path: Path) -> None:
    assert run_client(hub, tmp_path, client_is_refused) == {
        "create, exists": ["HfHubHTTPError", 409],
        "create, no token": ["HfHubHTTPError", 401],
        "create, unknown token": ["HfHubHTTPError", 401],
        "create, read token": ["HfHubHTTPError", 403],
        "create, foreign namespace": ["HfHubHTTPError", 403],
        # The client takes a 403 for success if the repository can be read.
        "create, read token, exists": ["no error", None],
        "create, bad name": ["HFValidationError", None],
        "whoami, unknown token": ["HfHubHTTPError", 401],
        "may write": ["no error", None],
        "may write, read token": ["HfHubHTTPError", 403],
        "upload, no token": ["RepositoryNotFoundError", 401],
        "upload, unknown token": ["HfHubHTTPError", 401],
        "upload, read token": ["HfHubHTTPError", 403],
        "upload, foreign user": ["HfHubHTTPError", 403],
        "upload, no repo": ["RepositoryNotFoundError", 404],
        "upload, no branch": ["RevisionNotFoundError", 404],
        "upload, stale parent": ["HfHubHTTPError", 412],
        "upload, bad card": ["ValueError", None],
        "download, no repo": ["RepositoryNotFoundError", 404],
        "download, no revision": ["RevisionNotFoundError", 404],
        "download, no file": ["RemoteEntryNotFoundError", 404],
        "delete, no file": ["RemoteEntryNotFoundError", 404],
    }
    assert list(hub.repos) == [("model", "tester/x")]
    assert sorted(hub.repos["model", "tester/x"].at().files) == [".gitattributes", "config.json"]


def test_upload_cut_off_for_good_leaves_no_commit(hub: LoopbackHub, tmp_path: Path) -> None:
    model_folder(tmp_path)
    # The client tries each upload six times.
    hub.fail_next("PUT", "/lfs/", cut_after=WEIGHTS_BYTES // 2, times=6)
    broken, whole = run_client(hub, tmp_path, client_pushes_over_a_bad_line, tries=2)

    assert broken == ["RuntimeError", None, [".gitattributes"]]
    assert whole == ["no error", None, [".gitattributes", "README.md", "config.json", "model.safetensors"]]
    assert [request.status for request in hub.requests if request.method == "PUT"] == [0] * 6 + [200]
    assert len(hub.repos["model", "tester/x"].history()) == 2


def test_upload_cut_off_once_is_repeated_by_the_client(hub: LoopbackHub, tmp_path: Path) -> None:
    model_folder(tmp_path)
    hub.fail_next("POST", "/preupload/", status=503)
    hub.fail_next("PUT", "/lfs/", cut_after=0)
    ((name, *_),) = run_client(hub, tmp_path, client_pushes_over_a_bad_line, tries=1)

    assert name == "no error"
    assert [request.status for request in hub.requests if "/preupload/" in request.path] == [503, 200]
    assert [request.status for request in hub.requests if request.method == "PUT"] == [0, 200]


def test_failed_commit_is_not_repeated_and_its_upload_is_kept(hub: LoopbackHub, tmp_path: Path) -> None:
    model_folder(tmp_path)
    hub.fail_next("POST", "/commit/", status=500)
    broken, whole = run_client(hub, tmp_path, client_pushes_over_a_bad_line, tries=2)

    assert broken == ["HfHubHTTPError", 500, [".gitattributes"]]
    assert whole[0] == "no error"
    assert (hub.count("PUT", "/lfs/"), hub.count("POST", "/commit/")) == (1, 2)


def test_private_repo_is_for_its_owner(hub: LoopbackHub, tmp_path: Path) -> None:
    owner = run_client(hub, tmp_path, client_looks_at_a_private_repo, create=True)
    guest = run_client(hub, tmp_path, client_looks_at_a_private_repo, create=False, token="hf_guest_token")
    nobody = run_client(hub, tmp_path, client_looks_at_a_private_repo, create=False, token=None)

    assert hub.repos["model", "tester/secret"].private
    assert owner == [["no error", None], ["no error", None], True]
    assert guest == [["RepositoryNotFoundError", 404], ["RepositoryNotFoundError", 404], False]
    assert nobody == [["RepositoryNotFoundError", 401], ["RepositoryNotFoundError", 401], False]


def test_branches_and_commits_are_revisions(hub: LoopbackHub, tmp_path: Path) -> None:
    assert run_client(hub, tmp_path, client_works_on_a_branch) == {
        "tree": [".gitattributes", "deep", "deep/er", "deep/er/b.txt", "weights", "weights/a.txt"],
        "top": [".gitattributes", "weights"],
        "found": ["deep"],
        "fresh": [".gitattributes"],
        "branches": ["main", "runs/one", "fresh"],
        "texts": ["4", "2", "1"],
    }


def test_model_loads_in_timm_and_transformers(hub: LoopbackHub, tmp_path: Path) -> None:
    assert run_client(hub, tmp_path, client_shares_a_model) == {"equal": True, "labels": LABELS}


def test_photos_load_as_a_folder_and_as_parquet(hub: LoopbackHub, tmp_path: Path) -> None:
    found = run_client(hub, tmp_path, client_shares_photos)
    expected = {
        split: [[label, len(f"{split}/{label}"), number, 0] for label in LABELS for number in range(2)]
        for split in ("test", "train")
    }
    assert found["raw"] == expected
    assert found["parquet"] == expected
    shards = [f"data/{split}-00000-of-00001.parquet" for split in ("test", "train")]
    assert sorted(found["files"]) == [".gitattributes", "README.md", *shards]


def test_only_the_owner_deletes_a_repo(hub: LoopbackHub, tmp_path: Path) -> None:
    refused, gone = run_client(hub, tmp_path, client_deletes_a_repo)
    assert (refused, gone) == (["HfHubHTTPError", 403], ["RepositoryNotFoundError", 404])
    assert hub.repos == {}


def test_commit_needs_complete_lfs_objects_and_a_sound_card(hub: LoopbackHub) -> None:
    assert ask(hub, "POST", "/api/repos/create", {"name": "x"})[0].status == 200
    content = b"weights"
    oid = hashlib.sha256(content).hexdigest()

    def commit_status(key: str, value: dict[str, Any]) -> int:
        header = {"key": "header", "value": {"summary": "s", "description": ""}}
        lines = "\n".join(json.dumps(line) for line in (header, {"key": key, "value": value}))
        return ask(hub, "POST", "/api/models/tester/x/commit/main", lines.encode())[0].status

    weights = {"path": "model.safetensors", "algo": "sha256", "oid": oid, "size": len(content)}
    assert commit_status("lfsFile", weights) == 400
    assert ask(hub, "PUT", f"/lfs/models/tester/x/{oid}", content[:4])[0].status == 400
    assert ask(hub, "POST", f"/lfs/models/tester/x/{oid}/verify", {"oid": oid, "size": 7})[0].status == 400
    assert ask(hub, "PUT", f"/lfs/models/tester/x/{oid}", content)[0].status == 200
    assert commit_status("lfsFile", weights | {"size": 8}) == 400
    assert commit_status("file", {"path": "README.md", "content": "LS0tCmE6IFsKLS0tCg=="}) == 400
    assert len(hub.repos["model", "tester/x"].history()) == 1
    assert commit_status("lfsFile", weights) == 200
    assert len(hub.repos["model", "tester/x"].history()) == 2


def test_kind_and_size_of_a_file_decide_how_it_is_sent(hub: LoopbackHub) -> None:
    assert ask(hub, "POST", "/api/repos/create", {"name": "x"})[0].status == 200
    limit = 10 * 1024 * 1024
    sizes = {"a/b.json": limit, "big.json": limit + 1, "w.safetensors": 1, "a/b.png": 1, "model.onnx": 1}
    files = [{"path": path, "size": size, "sample": ""} for path, size in sizes.items()]
    content = ask(hub, "POST", "/api/models/tester/x/preupload/main", {"files": files})[1]
    modes = {file["path"]: file["uploadMode"] for file in json.loads(content)["files"]}
    assert modes == {path: "regular" if path == "a/b.json" else "lfs" for path in sizes}


def test_plain_http(hub: LoopbackHub) -> None:
    assert ask(hub, "GET", "/api/agent-harnesses")[0].status == 404
    assert ask(hub, "POST", "/api/repos/create", {"name": "hot dog"})[0].status == 400
    assert ask(hub, "POST", "/api/repos/create", {"name": "x"})[0].status == 200

    path = "/tester/x/resolve/main/.gitattributes"
    whole, content = ask(hub, "GET", path)
    head, nothing = ask(hub, "HEAD", path)
    assert (head.status, head.getheader("Content-Length"), nothing) == (200, str(len(content)), b"")
    assert head.getheader("ETag") == whole.getheader("ETag")
    assert head.getheader("X-Repo-Commit") == hub.repos["model", "tester/x"].at().oid

    part, tail = ask(hub, "GET", path, Range="bytes=10-")
    assert (part.status, tail) == (206, content[10:])
    assert part.getheader("Content-Range") == f"bytes 10-{len(content) - 1}/{len(content)}"
    assert ask(hub, "GET", path, Range="bytes=2-5")[1] == content[2:6]
    assert ask(hub, "GET", path, Range=f"bytes={len(content)}-")[0].status == 416


def test_environment_replaces_what_the_caller_has(
    hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_TOKEN", "https_proxy"):
        monkeypatch.setenv(name, "1")
    env = hub.environment(tmp_path, token=None)
    assert (env["HF_ENDPOINT"], env["HF_HOME"], env["HF_HUB_OFFLINE"]) == (hub.url, str(tmp_path), "0")
    assert not {"TRANSFORMERS_OFFLINE", "HF_TOKEN", "https_proxy"} & env.keys()
    assert hub.environment(tmp_path)["HF_TOKEN"] == "hf_test_token"


def test_leaving_the_block_closes_the_port() -> None:
    before = set(threading.enumerate())
    with LoopbackHub() as hub:
        pass
    assert set(threading.enumerate()) <= before
    with pytest.raises(ConnectionRefusedError):
        ask(hub, "GET", "/")


if __name__ == "__main__":
    print(json.dumps(globals()[sys.argv[1]](**json.loads(sys.argv[2]))))
