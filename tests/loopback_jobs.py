"""Buckets and Jobs for the Hub of loopback_hub.py: a job's command really runs, in a folder of its own.

Files go through the real Xet client, into stores that it keeps in local folders. A store is locked by the
process that uses it, so each upload has a store of its own, which is copied before it is read.

As a script, for a process that the lock ends with: `loopback_jobs.py get STORE FOLDER HASH:SIZE...` and
`loopback_jobs.py put STORE FILE...`, which prints the hashes.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from loopback_hub import _ID, ROUTES, Call, HubError, LoopbackHub, Reply

TIME_FORMAT = "%Y-%m-%dT%H:%M:%S.%fZ"
NOW = datetime.now(timezone.utc).strftime(TIME_FORMAT)
# Name, GPUs, dollars a minute.
MACHINES = [("cpu-basic", 0, 0.0001666667), ("a10g-small", 1, 0.0166666667), ("a10g-largex2", 2, 0.05)]


@dataclass
class Bucket:
    """Files by path: the hash, the size and the time in milliseconds of each."""

    id: str
    private: bool
    files: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass
class Job:
    """A command that was asked for, and what became of it."""

    id: str
    owner: str
    spec: dict[str, Any]
    folder: Path
    stage: str = "RUNNING"
    message: str | None = None
    process: subprocess.Popen | None = None
    ended: threading.Event = field(default_factory=threading.Event)

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text(errors="replace")

    def info(self) -> dict[str, Any]:
        shown = {key: self.spec.get(key) for key in ("command", "environment", "flavor", "volumes")}
        owner = {"id": self.owner, "name": self.owner, "type": "user"}
        status = {"stage": self.stage, "message": self.message}
        return {"id": self.id, "createdAt": NOW, "owner": owner, "status": status, **shown}


class JobsHub(LoopbackHub):
    """A Hub that also has buckets and runs jobs; without a network, on this machine's libraries."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._scratch = tempfile.TemporaryDirectory()
        self.root = Path(self._scratch.name)
        self.buckets: dict[str, Bucket] = {}
        self.jobs: dict[str, Job] = {}
        self._contents: dict[str, Path] = {}
        self._stores: list[Path] = []

    def __exit__(self, *error: object) -> None:
        for job in self.jobs.values():
            self._end(job)
            job.ended.wait(60)
        super().__exit__(*error)
        self._scratch.cleanup()

    # Buckets

    def _bucket(self, call: Call, write: bool = False) -> Bucket:
        bucket = self.buckets.get(call.parts["id"])
        if bucket is None or (bucket.private and call.user != bucket.id.partition("/")[0]):
            raise HubError(404, "Bucket not found", "BucketNotFound")
        if write:
            self._require_write(call, bucket.id.partition("/")[0])
        return bucket

    def _create_bucket(self, call: Call) -> Reply:
        self._require_write(call, call.parts["id"].partition("/")[0])
        url = f"{self.url}/buckets/{call.parts['id']}"
        if call.parts["id"] in self.buckets:
            return Reply({"error": "This bucket exists already", "url": url}, 409)
        wanted = call.json()
        private = wanted.get("visibility") == "private" or wanted.get("private", False)
        self.buckets[call.parts["id"]] = Bucket(call.parts["id"], private)
        return Reply({"url": url})

    def _bucket_info(self, call: Call) -> Reply:
        bucket = self._bucket(call)
        size = sum(file["size"] for file in bucket.files.values())
        info = {"id": bucket.id, "private": bucket.private, "createdAt": NOW}
        return Reply(info | {"size": size, "totalFiles": len(bucket.files)})

    def _bucket_tree(self, call: Call) -> Reply:
        start = f"{call.parts['path']}/" if call.parts["path"] else ""
        files = {path: file for path, file in self._bucket(call).files.items() if path.startswith(start)}
        below = [_entry(path, file) for path, file in files.items()]
        if not call.asks("recursive"):
            below = [entry for entry in below if "/" not in entry["path"].removeprefix(start)]
            folders = {start + path.removeprefix(start).partition("/")[0] for path in files}
            below += [{"type": "directory", "path": path} for path in sorted(folders - files.keys())]
        return Reply(below)

    def _bucket_batch(self, call: Call) -> Reply:
        bucket = self._bucket(call, write=True)
        changes = [json.loads(line) for line in call.body.splitlines()]
        added = {change["xetHash"] for change in changes if change["type"] == "addFile"}
        self._read_stores(added - self._contents.keys())
        for change in changes:
            if change["type"] == "addFile":
                content = self._contents[change["xetHash"]]
                file = {"hash": change["xetHash"], "size": content.stat().st_size, "mtime": change["mtime"]}
                bucket.files[change["path"]] = file
            else:
                del bucket.files[change["path"]]
        return Reply({"success": True, "processed": len(changes), "succeeded": len(changes), "failed": []})

    def _bucket_resolve(self, call: Call) -> Reply:
        bucket = self._bucket(call)
        file = bucket.files[call.parts["path"]]
        route = f"{self.url}/api/buckets/{bucket.id}/xet-read-token"
        headers = {"X-Xet-Hash": file["hash"], "X-Xet-Refresh-Route": route}
        return Reply(b"", 200, headers | {"X-Linked-Size": str(file["size"])})

    def _xet_token(self, call: Call) -> Reply:
        bucket = self._bucket(call, write=call.parts["what"] == "write")
        store = Path(tempfile.mkdtemp(prefix="store-", dir=self.root))
        if call.parts["what"] == "write":
            self._stores.append(store)
        else:
            hashes = {file["hash"] for file in bucket.files.values() if file["size"]}
            _in_a_process("put", store, *(self._contents[each] for each in hashes))
        expires = int(time.time()) + 24 * 3600
        return Reply({"casUrl": f"local://{store}", "accessToken": "xet", "exp": expires})

    def _read_stores(self, hashes: set[str]) -> None:
        """Take what clients have uploaded out of their stores."""
        for store in self._stores:
            out = Path(tempfile.mkdtemp(prefix="contents-", dir=self.root))
            _in_a_process("get", store, out, *sorted(hashes))
            for file in out.iterdir():
                self._contents[file.name] = file
                hashes.discard(file.name)
        if hashes:
            raise HubError(400, f"Not uploaded: {', '.join(sorted(hashes))}")

    # Jobs

    def _hardware(self, call: Call) -> Reply:
        offered = []
        for name, gpus, cost in MACHINES:
            gpu = {
                "type": "gpu",
                "model": "A10G",
                "quantity": str(gpus),
                "vram": "24 GB",
                "manufacturer": "Nvidia",
            }
            about = {"name": name, "prettyName": f"The {name}", "cpu": "4 vCPU", "ram": "15 GB"}
            price = {"unitCostMicroUSD": round(cost * 1e6), "unitCostUSD": cost, "unitLabel": "minute"}
            offered.append(
                about | price | {"accelerator": gpu | {"manufacturer": "Nvidia"} if gpus else None}
            )
        return Reply(offered)

    def _run_job(self, call: Call) -> Reply:
        self._require_write(call, call.parts["user"])
        job_id = f"{len(self.jobs):024x}"
        folder = self.root / "jobs" / job_id
        (folder / "cwd").mkdir(parents=True)
        (folder / "log").touch()
        job = self.jobs[job_id] = Job(job_id, call.parts["user"], call.json(), folder)
        for volume in job.spec.get("volumes", []):
            self._mount(job, volume)
        threading.Thread(target=self._work, args=(job,), daemon=True).start()
        return Reply(job.info())

    def _mount(self, job: Job, volume: dict[str, Any]) -> None:
        start = f"{volume['path']}/"
        inside = {p: f for p, f in self.buckets[volume["source"]].files.items() if p.startswith(start)}
        if not inside:
            raise HubError(400, f"{volume['source']} has no folder {volume['path']}")
        for path, file in inside.items():
            copy = _mounted(job, volume) / path.removeprefix(start)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(self._contents[file["hash"]], copy)
            os.utime(copy, (file["mtime"] / 1000,) * 2)

    def _work(self, job: Job) -> None:
        """Run a job's command on its volumes, and put what it wrote into the bucket."""
        python = _make_environment(job.folder / "env")
        command = [self._inside(job, word) for word in job.spec["command"]]
        env = {
            "PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}",
            "HOME": str(job.folder / "cwd"),
            "TMPDIR": str(job.folder / "cwd"),
            # What this machine lacks, a job has: the network would be asked for libraries and weights.
            **{"PIP_NO_INDEX": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"},
            **job.spec["environment"],
            **job.spec.get("secrets", {}),
        }
        with (job.folder / "log").open("wb") as log:
            job.process = subprocess.Popen(
                command, env=env, cwd=job.folder / "cwd", stdout=log, stderr=log, start_new_session=True
            )
            try:
                code = job.process.wait(job.spec["timeoutSeconds"])
                stage, message = ("COMPLETED", None) if code == 0 else ("ERROR", f"exit code {code}")
            except subprocess.TimeoutExpired:
                self._end(job)
                stage, message = "ERROR", "Job timeout"
        with self._lock:
            for volume in job.spec.get("volumes", []):
                if not volume["readOnly"]:
                    self._unmount(job, volume)
            if job.stage != "CANCELED":
                job.stage, job.message = stage, message
        job.ended.set()

    def _unmount(self, job: Job, volume: dict[str, Any]) -> None:
        folder, bucket = _mounted(job, volume), self.buckets[volume["source"]]
        files = [path for path in folder.rglob("*") if path.is_file()]
        store = Path(tempfile.mkdtemp(prefix="store-", dir=self.root))
        hashes = _in_a_process("put", store, *files)
        for path, each in zip(files, hashes, strict=True):
            self._contents[each] = path
            entry = {"hash": each, "size": path.stat().st_size, "mtime": path.stat().st_mtime * 1000}
            bucket.files[f"{volume['path']}/{path.relative_to(folder).as_posix()}"] = entry

    def _inside(self, job: Job, word: str) -> str:
        for volume in job.spec.get("volumes", []):
            word = word.replace(volume["mountPath"], str(_mounted(job, volume)))
        return word

    def _job(self, call: Call) -> Job:
        job = self.jobs.get(call.parts["job"])
        if job is None or call.user != job.owner:
            raise HubError(404, "Job not found")
        return job

    def _inspect_job(self, call: Call) -> Reply:
        return Reply(self._job(call).info())

    def _cancel_job(self, call: Call) -> Reply:
        job = self._job(call)
        job.stage = "CANCELED"
        self._end(job)
        return Reply(job.info())

    def _job_logs(self, call: Call) -> Reply:
        return Reply(_events(self._job(call)), 200, {"Content-Type": "text/event-stream"})

    def _end(self, job: Job) -> None:
        if job.process and job.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(job.process.pid, signal.SIGKILL)


def _entry(path: str, file: dict[str, Any]) -> dict[str, Any]:
    mtime = datetime.fromtimestamp(file["mtime"] / 1000, tz=timezone.utc).strftime(TIME_FORMAT)
    return {"type": "file", "path": path, "size": file["size"], "xetHash": file["hash"], "mtime": mtime}


def _mounted(job: Job, volume: dict[str, Any]) -> Path:
    return job.folder / "volumes" / volume["mountPath"].strip("/")


def _events(job: Job) -> Iterator[bytes]:
    """Yield a job's log as server-sent events until the job has ended."""
    yield _event("===== Job started")
    sent = 0
    while True:
        ended = job.ended.wait(0.05)
        lines = job.log.splitlines(keepends=True)
        for line in lines[sent:]:
            if not line.endswith("\n") and not ended:
                break
            yield _event(line.rstrip("\n"))
            sent += 1
        if ended:
            return


def _event(text: str) -> bytes:
    return f"data: {json.dumps({'data': text, 'timestamp': NOW})}\n\n".encode()


def _make_environment(folder: Path) -> Path:
    """Make a virtual environment with this one's libraries, but without this project; return its Python."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    python = folder / "bin/python"
    name = f"lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages"
    for path in Path(sysconfig.get_path("purelib")).iterdir():
        if "hotdog_hf" not in path.name:
            (folder / name / path.name).symlink_to(path)
    return python


def _in_a_process(*words: object) -> list[str]:
    """Run this file as a script; return the lines that it prints."""
    command = [sys.executable, __file__, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def _get(store: str, out: str, *hashes: str) -> None:
    """Write those of the contents that a store has to files named by their hash."""
    import hf_xet

    with tempfile.TemporaryDirectory() as copy:
        shutil.copytree(store, copy, dirs_exist_ok=True)
        session = hf_xet.XetSession()
        for each in hashes:
            file = Path(out, each)
            with session.new_file_download_group(endpoint=f"local://{copy}") as group:
                group.start_download_file(hf_xet.XetFileInfo(each, None), str(file))
            # What a store lacks comes out empty, without an error; of what is empty, the hash is 0.
            if not file.stat().st_size and set(each) != {"0"}:
                file.unlink()


def _put(store: str, *files: str) -> None:
    import hf_xet

    with hf_xet.XetSession().new_upload_commit(endpoint=f"local://{store}") as commit:
        handles = [commit.start_upload_file(file, sha256=hf_xet.SKIP_SHA256) for file in files]
    for handle in handles:
        print(handle.result().xet_info.hash)


_BUCKET = rf"/api/buckets/{_ID}"
_JOB = r"/api/jobs/(?P<user>[^/]+)"
JobsHub.routes = [
    ("POST", re.compile(_BUCKET), JobsHub._create_bucket),
    ("GET", re.compile(_BUCKET), JobsHub._bucket_info),
    ("GET", re.compile(rf"{_BUCKET}/tree(?:/(?P<path>.+))?"), JobsHub._bucket_tree),
    ("POST", re.compile(rf"{_BUCKET}/batch"), JobsHub._bucket_batch),
    ("GET", re.compile(rf"{_BUCKET}/xet-(?P<what>read|write)-token"), JobsHub._xet_token),
    ("GET", re.compile(rf"/buckets/{_ID}/resolve/(?P<path>.+)"), JobsHub._bucket_resolve),
    ("GET", re.compile(r"/api/jobs/hardware"), JobsHub._hardware),
    ("POST", re.compile(_JOB), JobsHub._run_job),
    ("GET", re.compile(rf"{_JOB}/(?P<job>[^/]+)"), JobsHub._inspect_job),
    ("POST", re.compile(rf"{_JOB}/(?P<job>[^/]+)/cancel"), JobsHub._cancel_job),
    ("GET", re.compile(rf"{_JOB}/(?P<job>[^/]+)/logs"), JobsHub._job_logs),
    *ROUTES,
]

if __name__ == "__main__":
    {"get": _get, "put": _put}[sys.argv[1]](*sys.argv[2:])
