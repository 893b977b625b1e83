"""A Hugging Face Hub on 127.0.0.1, in memory, that the unmodified client libraries push to and load from.

It speaks the part of the Hub's HTTP interface that `huggingface_hub`, `timm`, `transformers` and `datasets`
use to create a repository, upload with Git LFS, commit and download. It has no Xet storage, pull requests,
tags, organisations, gated repositories, multi-part uploads or paging.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote

import yaml

# The part of the Hub's own .gitattributes that matters for images, and its limit for plain git files.
LFS_SUFFIXES = "safetensors|bin|pt|pth|ckpt|onnx|npz|parquet|arrow|zip|tar|gz|jpg|jpeg|png|webp"
LFS_NAME = re.compile(rf".+\.({LFS_SUFFIXES})")
GITATTRIBUTES = "".join(f"*.{end} filter=lfs diff=lfs merge=lfs -text\n" for end in LFS_SUFFIXES.split("|"))
MAX_REGULAR_BYTES = 10 * 1024 * 1024

REPO_NAME = re.compile(r"(?!.*(?:--|\.\.))[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?")
CARD_METADATA = re.compile(r"\A\s*---\s*\n(.*?)^---\s*$", re.DOTALL | re.MULTILINE)
CLIENT_VARIABLES = re.compile(r"HF_|HUGGING|TRANSFORMERS_|.*_PROXY", re.IGNORECASE)


class LoggedRequest(NamedTuple):
    """One request in the order of arrival; status 0 stands for a connection that was cut."""

    method: str
    path: str
    status: int


class Reply(NamedTuple):
    """The answer to one request; a body that is not bytes is sent as JSON."""

    body: Any
    status: int = 200
    headers: Mapping[str, str] = MappingProxyType({})


class HubError(Exception):
    """A refusal, as the status, message and `X-Error-Code` that the client reads."""

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        # A header value is one line of Latin-1, and a message may quote anything.
        headers = {"X-Error-Message": " ".join(message.split()).encode("ascii", "replace").decode()}
        self.reply = Reply({"error": message}, status, headers | ({"X-Error-Code": code} if code else {}))


@dataclass(frozen=True)
class File:
    """The content of one file in a commit, stored as a plain git blob or through LFS."""

    content: bytes
    lfs: bool

    @property
    def size(self) -> int:
        """Return the number of bytes of the content."""
        return len(self.content)

    @cached_property
    def sha256(self) -> str:
        """Return the LFS object id of the content."""
        return hashlib.sha256(self.content).hexdigest()

    @cached_property
    def blob_oid(self) -> str:
        """Return the git blob id: of the content, or of the pointer that stands for an LFS file."""
        blob = self.pointer if self.lfs else self.content
        return hashlib.sha1(b"blob %d\0" % len(blob) + blob).hexdigest()

    @property
    def pointer(self) -> bytes:
        """Return the text that git itself stores for an LFS file."""
        version = "version https://git-lfs.github.com/spec/v1"
        return f"{version}\noid sha256:{self.sha256}\nsize {self.size}\n".encode()

    @property
    def etag(self) -> str:
        """Return the id by which the client sees whether a file changed."""
        return self.sha256 if self.lfs else self.blob_oid

    @property
    def lfs_info(self) -> dict[str, Any] | None:
        """Return the LFS part of a listing; the two kinds of listing call the hash `oid` and `sha256`."""
        if not self.lfs:
            return None
        hashes = {"oid": self.sha256, "sha256": self.sha256}
        return hashes | {"size": self.size, "pointerSize": len(self.pointer)}


@dataclass(frozen=True)
class Commit:
    """One immutable state of a repository."""

    oid: str
    parent: str | None
    title: str
    message: str
    author: str
    date: str
    files: dict[str, File]

    def listing(self) -> dict[str, dict[str, Any]]:
        """Return the tree entry of every file and folder, by path."""
        entries: dict[str, dict[str, Any]] = {}
        for path, file in sorted(self.files.items()):
            for folder in map(str, list(PurePosixPath(path).parents)[-2::-1]):
                oid = hashlib.sha1(f"{self.oid}/{folder}".encode()).hexdigest()
                entries[folder] = {"type": "directory", "path": folder, "oid": oid, "size": 0}
            entries[path] = {"type": "file", "path": path, "oid": file.blob_oid, "size": file.size}
            entries[path] |= {"lfs": file.lfs_info} if file.lfs else {}
        return entries


@dataclass
class Repo:
    """A model or dataset repository: its commits, its branches and its complete LFS objects."""

    kind: str
    id: str
    private: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)

    @property
    def owner(self) -> str:
        """Return the namespace, which is the one user that may write."""
        return self.id.partition("/")[0]

    @property
    def page(self) -> str:
        """Return the path of the repository's page below the Hub's address."""
        return f"/{self.id}" if self.kind == "model" else f"/{self.kind}s/{self.id}"

    def at(self, revision: str = "main") -> Commit:
        """Return the commit that a branch name or a commit id stands for."""
        commit = self.commits.get(self.branches.get(revision, revision))
        if commit is None:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    def history(self, revision: str = "main") -> list[Commit]:
        """Return the commits that lead to a revision, newest first."""
        commits = [self.at(revision)]
        while (parent := commits[-1].parent) is not None:
            commits.append(self.commits[parent])
        return commits

    def commit(self, branch: str, files: dict[str, File], author: str, title: str, text: str = "") -> Commit:
        """Append a commit to a branch."""
        parent = self.branches.get(branch)
        date = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        # The count keeps two otherwise equal commits of one moment apart.
        identity = [self.kind, self.id, parent, len(self.commits), author, title, text, date]
        identity += [(path, file.blob_oid) for path, file in sorted(files.items())]
        oid = hashlib.sha1(json.dumps(identity).encode()).hexdigest()
        self.commits[oid] = Commit(oid, parent, title, text, author, date, files)
        self.branches[branch] = oid
        return self.commits[oid]

    def uploaded(self, oid: str, size: int) -> bytes:
        """Return an LFS object, provided that it arrived completely."""
        content = self.objects.get(oid)
        if content is None or len(content) != size:
            raise HubError(400, f"LFS object {oid} of {size} bytes was not uploaded")
        return content


@dataclass
class Fault:
    """A failure for the next `times` matching requests to meet."""

    method: str
    path_part: str
    status: int | None
    cut_after: int | None
    times: int


@dataclass(frozen=True)
class Call:
    """What a handler sees of one request: who asks, the named parts of the path, query, headers and body."""

    user: str | None
    may_write: bool
    parts: dict[str, str]
    query: dict[str, list[str]]
    headers: Mapping[str, str]
    body: bytes

    @property
    def repo(self) -> tuple[str, str]:
        """Return the kind and id of the repository that the path names."""
        return self.parts["kind"].rstrip("/").removesuffix("s") or "model", self.parts["id"]

    @property
    def revision(self) -> str:
        """Return the revision that the path names, or the default branch."""
        return self.parts["revision"] or "main"

    def json(self) -> dict[str, Any]:
        """Return the body as a JSON object."""
        return json.loads(self.body or b"{}")

    def asks(self, flag: str) -> bool:
        """Return whether a boolean query parameter is set."""
        return self.query.get(flag, [""])[-1].lower() in ("1", "true")


class LoopbackHub:
    """A Hub on a free port of 127.0.0.1 that serves from a thread for the length of a `with` block."""

    # What it answers, and how; the first match wins.
    routes: list[tuple[str, re.Pattern[str], Callable[[LoopbackHub, Call], Reply]]]

    def __init__(self, users: dict[str, str] | None = None, read_only: Iterable[str] = ()) -> None:
        self.users = {"hf_test_token": "tester"} if users is None else users
        self.read_only = frozenset(read_only)
        self.requests: list[LoggedRequest] = []
        self.repos: dict[tuple[str, str], Repo] = {}
        self._faults: list[Fault] = []
        self._lock = threading.Lock()
        self._server = _Server(self)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> LoopbackHub:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def environment(self, home: Path, token: str | None = "hf_test_token") -> dict[str, str]:
        """Return the environment for a subprocess whose clients talk to this Hub and cache below `home`."""
        env = {name: value for name, value in os.environ.items() if not CLIENT_VARIABLES.match(name)}
        env |= {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "OMP_NUM_THREADS": "1",
        }
        return env if token is None else env | {"HF_TOKEN": token}

    def fail_next(
        self,
        method: str,
        path_part: str,
        status: int | None = None,
        cut_after: int | None = None,
        times: int = 1,
    ) -> None:
        """Answer the next matching requests with `status`, or cut the connection after some body bytes."""
        if (status is None) == (cut_after is None):
            raise ValueError("give either status or cut_after")
        self._faults.append(Fault(method, path_part, status, cut_after, times))

    def count(self, method: str, path_part: str) -> int:
        """Return how many requests of a method had `path_part` in their path."""
        return sum(request.method == method and path_part in request.path for request in self.requests)

    def take_fault(self, method: str, path: str) -> Fault | None:
        """Return the failure that this request has to meet, and use it up."""
        with self._lock:
            for fault in self._faults:
                if fault.method == method and fault.path_part in path and fault.times > 0:
                    fault.times -= 1
                    return fault
        return None

    def answer(self, method: str, target: str, headers: Mapping[str, str], body: bytes) -> Reply:
        """Return the reply to one request."""
        path, _, query = target.partition("?")
        try:
            handler, parts = _route(self.routes, method, path)
            # One lock for all state, so that a commit is seen as a whole or not at all.
            with self._lock:
                user, may_write = self._authenticate(headers.get("Authorization"))
                return handler(self, Call(user, may_write, parts, parse_qs(query), headers, body))
        except HubError as error:
            return error.reply

    # Access

    def _authenticate(self, authorization: str | None) -> tuple[str | None, bool]:
        if authorization is None:
            return None, False
        token = authorization.removeprefix("Bearer ")
        if token not in self.users:
            raise HubError(401, "Invalid credentials in Authorization header")
        return self.users[token], token not in self.read_only

    def _readable(self, call: Call) -> Repo:
        """Return the repository of the path if the caller may know that it exists."""
        repo = self.repos.get(call.repo)
        if repo is None or (repo.private and call.user != repo.owner):
            # Like the Hub, ask an unknown caller to sign in rather than say that nothing is there.
            raise HubError(401 if call.user is None else 404, "Repository not found", "RepoNotFound")
        return repo

    def _writable(self, call: Call) -> Repo:
        """Return the repository of the path if the caller may change it."""
        repo = self._readable(call)
        # The client takes any 401 from a repository's https address for "not found". The code makes it do so
        # at this http address too.
        self._require_write(call, repo.owner, "RepoNotFound")
        return repo

    def _require_write(self, call: Call, namespace: str, code: str | None = None) -> None:
        if call.user is None:
            raise HubError(401, "Invalid username or password.", code)
        if call.user != namespace or not call.may_write:
            raise HubError(403, f"You don't have the rights to write under the namespace {namespace}")

    def _whoami(self, call: Call) -> Reply:
        if call.user is None:
            raise HubError(401, "Invalid username or password.")
        token = {"displayName": "loopback", "role": "write" if call.may_write else "read"}
        auth = {"type": "access_token", "accessToken": token}
        return Reply({"type": "user", "name": call.user, "fullname": call.user, "orgs": [], "auth": auth})

    def _auth_check(self, call: Call) -> Reply:
        require = self._writable if call.parts["write"] else self._readable
        require(call)
        return Reply({})

    # Repositories

    def _create_repo(self, call: Call) -> Reply:
        wanted = call.json()
        namespace, name = wanted.get("organization") or call.user or "", wanted["name"]
        self._require_write(call, namespace)
        if not REPO_NAME.fullmatch(name):
            raise HubError(400, f"Invalid repo name: {name}")
        if wanted.get("type") == "space" and wanted.get("sdk") not in ("gradio", "static", "docker"):
            raise HubError(400, "A Space needs an sdk")
        repo = Repo(wanted.get("type", "model"), f"{namespace}/{name}", wanted.get("visibility") == "private")
        url = self.url + repo.page
        if (repo.kind, repo.id) in self.repos:
            return Reply({"error": f"You already created this {repo.kind} repo", "url": url}, 409)
        self.repos[repo.kind, repo.id] = repo
        attributes = File(GITATTRIBUTES.encode(), lfs=False)
        repo.commit("main", {".gitattributes": attributes}, namespace, "initial commit")
        return Reply({"url": url, "name": repo.id})

    def _delete_repo(self, call: Call) -> Reply:
        wanted = call.json()
        repo_id = f"{wanted.get('organization') or call.user}/{wanted['name']}"
        repo = self._writable(replace(call, parts={"kind": wanted.get("type", "model"), "id": repo_id}))
        del self.repos[repo.kind, repo.id]
        return Reply({})

    def _repo_info(self, call: Call) -> Reply:
        repo = self._readable(call)
        commit = repo.at(call.revision)
        siblings: list[dict[str, Any]] = [{"rfilename": path} for path in sorted(commit.files)]
        if call.asks("blobs"):
            for sibling in siblings:
                file = commit.files[sibling["rfilename"]]
                sibling |= {"size": file.size, "blobId": file.blob_oid, "lfs": file.lfs_info}
        card = commit.files.get("README.md")
        metadata = _card_metadata(card.content.decode()) if card else {}
        info = {"id": repo.id, "author": repo.owner, "sha": commit.oid, "lastModified": commit.date}
        info |= {"private": repo.private, "gated": False, "disabled": False, "downloads": 0, "likes": 0}
        info |= {"tags": metadata.get("tags") or [], "cardData": metadata, "siblings": siblings}
        shown = ("pipeline_tag", "library_name", "model-index")
        return Reply(info | {key: metadata[key] for key in shown if key in metadata})

    def _refs(self, call: Call) -> Reply:
        branches = self._readable(call).branches.items()
        heads = [{"name": name, "ref": f"refs/heads/{name}", "targetCommit": oid} for name, oid in branches]
        return Reply({"branches": heads, "converts": [], "tags": []})

    def _create_branch(self, call: Call) -> Reply:
        repo = self._writable(call)
        if call.revision in repo.branches:
            raise HubError(409, f"Reference {call.revision} already exists")
        repo.branches[call.revision] = repo.at(call.json().get("startingPoint", "main")).oid
        return Reply({}, 201)

    # Reading

    def _commits(self, call: Call) -> Reply:
        listed = []
        for commit in self._readable(call).history(call.revision):
            entry = {"id": commit.oid, "title": commit.title, "message": commit.message, "date": commit.date}
            listed.append(entry | {"authors": [{"user": commit.author}]})
        return Reply(listed)

    def _tree(self, call: Call) -> Reply:
        listing = self._readable(call).at(call.revision).listing()
        folder = call.parts["path"]
        if folder and listing.get(folder, {}).get("type") != "directory":
            raise HubError(404, f"{folder} does not exist", "EntryNotFound")
        start = f"{folder}/" if folder else ""
        below = [entry for path, entry in listing.items() if path.startswith(start)]
        if not call.asks("recursive"):
            below = [entry for entry in below if "/" not in entry["path"].removeprefix(start)]
        return Reply(below)

    def _paths_info(self, call: Call) -> Reply:
        listing = self._readable(call).at(call.revision).listing()
        wanted = parse_qs(call.body.decode()).get("paths", [])
        return Reply([listing[path] for path in wanted if path in listing])

    def _resolve(self, call: Call) -> Reply:
        commit = self._readable(call).at(call.revision)
        file = commit.files.get(call.parts["path"])
        headers = {"X-Repo-Commit": commit.oid}
        if file is None:
            # This refusal names its commit: the client remembers that the commit lacks the file.
            return Reply({"error": "Entry not found"}, 404, headers | {"X-Error-Code": "EntryNotFound"})
        headers |= {"Content-Type": "application/octet-stream", "ETag": f'"{file.etag}"'}
        if file.lfs:
            headers |= {"X-Linked-Etag": f'"{file.etag}"', "X-Linked-Size": str(file.size)}
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", call.headers.get("Range", ""))
        if span is None:
            return Reply(file.content, 200, headers)
        first, last = int(span[1]), min(int(span[2] or file.size), file.size - 1)
        if first > last:
            return Reply(b"", 416, {"Content-Range": f"bytes */{file.size}"})
        headers["Content-Range"] = f"bytes {first}-{last}/{file.size}"
        return Reply(file.content[first : last + 1], 206, headers)

    # Writing

    def _validate_yaml(self, call: Call) -> Reply:
        try:
            metadata = _card_metadata(call.json()["content"])
        except ValueError as problem:
            return Reply({"errors": [{"message": str(problem)}], "warnings": []}, 400)
        warnings = [] if metadata else [{"message": "empty or missing yaml metadata in repo card"}]
        return Reply({"errors": [], "warnings": warnings})

    def _preupload(self, call: Call) -> Reply:
        present = self._writable(call).at(call.revision).files
        answers = []
        for wanted in call.json()["files"]:
            path = wanted["path"]
            mode = "lfs" if wanted["size"] > MAX_REGULAR_BYTES or LFS_NAME.fullmatch(path) else "regular"
            oid = present[path].etag if path in present else None
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return Reply({"files": answers})

    def _lfs_batch(self, call: Call) -> Reply:
        repo = self._writable(call)
        objects = [{"oid": wanted["oid"], "size": wanted["size"]} for wanted in call.json()["objects"]]
        for wanted in objects:
            # An object without actions tells the client that nothing is left to send.
            if wanted["oid"] not in repo.objects:
                href = f"{self.url}/lfs/{repo.kind}s/{repo.id}/{wanted['oid']}"
                wanted["actions"] = {"upload": {"href": href}, "verify": {"href": f"{href}/verify"}}
        return Reply({"transfer": "basic", "objects": objects})

    def _lfs_put(self, call: Call) -> Reply:
        # No token comes with this request: at the real Hub, the address itself is signed.
        if hashlib.sha256(call.body).hexdigest() != call.parts["oid"]:
            raise HubError(400, "The content does not match the object id")
        self.repos[call.repo].objects[call.parts["oid"]] = call.body
        return Reply({})

    def _lfs_verify(self, call: Call) -> Reply:
        wanted = call.json()
        self._writable(call).uploaded(wanted["oid"], wanted["size"])
        return Reply({})

    def _commit(self, call: Call) -> Reply:
        repo = self._writable(call)
        if call.asks("create_pr"):
            raise HubError(501, "Pull requests are not supported")
        if call.revision not in repo.branches:
            raise HubError(404, f"Invalid rev id: {call.revision}", "RevisionNotFound")
        header, *changes = [json.loads(line) for line in call.body.splitlines()]
        head, about = repo.at(call.revision), header["value"]
        if not head.oid.startswith(about.get("parentCommit", "")):
            raise HubError(412, "A commit has happened since. Please refresh and try again.")
        files = dict(head.files)
        for change in changes:
            _apply(change["key"], change["value"], files, repo)
        commit = repo.commit(call.revision, files, call.user or "", about["summary"], about["description"])
        url = f"{self.url}{repo.page}/commit/{commit.oid}"
        return Reply({"success": True, "commitOid": commit.oid, "commitUrl": url})


def _apply(key: str, value: dict[str, Any], files: dict[str, File], repo: Repo) -> None:
    """Carry out one line of a commit on `files`, a copy of what its parent holds."""
    path = value["path"]
    if key == "file":
        files[path] = File(base64.b64decode(value["content"]), lfs=False)
        if path == "README.md":
            try:
                _card_metadata(files[path].content.decode())
            except ValueError as problem:
                raise HubError(400, f"Invalid metadata in README.md: {problem}") from problem
    elif key == "lfsFile":
        files[path] = File(repo.uploaded(value["oid"], value["size"]), lfs=True)
    elif key in ("deletedFile", "deletedFolder"):
        folder = f"{path.rstrip('/')}/"
        gone = {path} & files.keys() if key == "deletedFile" else {p for p in files if p.startswith(folder)}
        if not gone:
            raise HubError(404, "A file with this name doesn't exist", "EntryNotFound")
        for name in gone:
            del files[name]
    else:
        raise HubError(400, f"Unknown operation: {key}")


def _card_metadata(text: str) -> dict[str, Any]:
    """Return the YAML block at the top of a README, or raise ValueError if it is no mapping."""
    block = CARD_METADATA.match(text)
    try:
        metadata = (yaml.safe_load(block[1]) if block else None) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"The YAML metadata does not parse: {error}") from error
    if not isinstance(metadata, dict):
        raise ValueError("The YAML metadata must be a mapping")
    return metadata


_ID = r"(?P<id>[^/]+(?:/[^/]+)?)"
_API = rf"/api/(?P<kind>models|datasets|spaces)/{_ID}"
_PAGE = rf"/(?P<kind>datasets/|spaces/)?{_ID}"
_LFS = rf"/lfs/(?P<kind>models|datasets|spaces)/{_ID}/(?P<oid>[0-9a-f]{{64}})"
_REVISION = r"(?P<revision>[^/]+)"

# The first match wins. HEAD is answered as GET without the body.
ROUTES: list[tuple[str, re.Pattern[str], Callable[[LoopbackHub, Call], Reply]]] = [
    ("GET", re.compile(r"/api/whoami-v2"), LoopbackHub._whoami),
    ("POST", re.compile(r"/api/repos/create"), LoopbackHub._create_repo),
    ("DELETE", re.compile(r"/api/repos/delete"), LoopbackHub._delete_repo),
    ("POST", re.compile(r"/api/validate-yaml"), LoopbackHub._validate_yaml),
    ("GET", re.compile(rf"{_API}/auth-check(?P<write>/write)?"), LoopbackHub._auth_check),
    ("GET", re.compile(rf"{_API}/refs"), LoopbackHub._refs),
    ("POST", re.compile(rf"{_API}/branch/{_REVISION}"), LoopbackHub._create_branch),
    ("GET", re.compile(rf"{_API}/commits/{_REVISION}"), LoopbackHub._commits),
    ("GET", re.compile(rf"{_API}/tree/{_REVISION}(?:/(?P<path>.+))?"), LoopbackHub._tree),
    ("POST", re.compile(rf"{_API}/paths-info/{_REVISION}"), LoopbackHub._paths_info),
    ("POST", re.compile(rf"{_API}/preupload/{_REVISION}"), LoopbackHub._preupload),
    ("POST", re.compile(rf"{_API}/commit/{_REVISION}"), LoopbackHub._commit),
    ("GET", re.compile(rf"{_API}(?:/revision/{_REVISION})?"), LoopbackHub._repo_info),
    ("POST", re.compile(rf"{_PAGE}\.git/info/lfs/objects/batch"), LoopbackHub._lfs_batch),
    ("PUT", re.compile(_LFS), LoopbackHub._lfs_put),
    ("POST", re.compile(rf"{_LFS}/verify"), LoopbackHub._lfs_verify),
    ("GET", re.compile(rf"{_PAGE}/resolve/{_REVISION}/(?P<path>.+)"), LoopbackHub._resolve),
]


LoopbackHub.routes = ROUTES


def _route(
    routes: list[tuple], method: str, path: str
) -> tuple[Callable[[LoopbackHub, Call], Reply], dict[str, str]]:
    """Return the handler of a request and the named parts of its path."""
    for routed, pattern, handler in routes:
        match = pattern.fullmatch(path)
        if match and routed == method.replace("HEAD", "GET"):
            # Unquoted only after the split: the clients send a slash inside a revision as %2F.
            return handler, {name: unquote(value or "") for name, value in match.groupdict().items()}
    raise HubError(404, "Not Found")


class _Server(ThreadingHTTPServer):
    """The listening socket, with a thread for each connection."""

    def __init__(self, hub: LoopbackHub) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.hub = hub

    def handle_error(self, request: object, client_address: object) -> None:
        """Report what went wrong in a handler, unless the client just went away."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    """Reads a request, lets the Hub answer it and writes the reply."""

    server: _Server
    protocol_version = "HTTP/1.1"
    # Headers and body sent apart would wait for the client's delayed acknowledgement each time.
    wbufsize = -1

    def _serve(self) -> None:
        hub, path = self.server.hub, self.path.partition("?")[0]
        length = int(self.headers.get("Content-Length", 0))
        fault = hub.take_fault(self.command, path)
        if fault and fault.cut_after is not None:
            self.rfile.read(min(fault.cut_after, length))
            self.close_connection = True
            hub.requests.append(LoggedRequest(self.command, path, 0))
            return
        body = self.rfile.read(length)
        if fault and fault.status is not None:
            reply = Reply({"error": "Injected failure"}, fault.status)
        else:
            reply = hub.answer(self.command, self.path, self.headers, body)
        # Logged first, so that a client that has its answer also finds the request in the log.
        hub.requests.append(LoggedRequest(self.command, path, reply.status))
        self._send(reply)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve

    def _send(self, reply: Reply) -> None:
        if isinstance(reply.body, Iterator):
            self._stream(reply)
            return
        body = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body, default=str).encode()
        self.send_response(reply.status)
        for name, value in {"Content-Type": "application/json", **reply.headers}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _stream(self, reply: Reply) -> None:
        """Send pieces of a body as they come; closing the connection ends it."""
        self.close_connection = True
        self.send_response(reply.status)
        for name, value in {**reply.headers, "Connection": "close"}.items():
            self.send_header(name, value)
        self.end_headers()
        for piece in reply.body:
            self.wfile.write(piece)
            self.wfile.flush()

    def log_message(self, format: str, *args: object) -> None:
        """Print nothing: `LoopbackHub.requests` is the log."""
