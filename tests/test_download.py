import contextlib
import hashlib
import http.server
import io
import stat
import subprocess
import threading
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import ROOT, run

from hotdog_hf import data, download
from hotdog_hf.errors import UserError


def zip_bytes(entries):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, content in entries.items():
            file.writestr(name, content)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def good_zip(photos_dir):
    return zip_bytes(
        {f"hotdog/{path.relative_to(photos_dir)}": path.read_bytes() for path in photos_dir.rglob("*.png")}
    )


@contextlib.contextmanager
def serve(body, status=200, cut=None, wait=0):
    """Answer every GET on 127.0.0.1 with `body`; yields the address and the list of requested paths.

    The first answer ends after `cut` bytes; every answer begins after `wait` seconds.
    """
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            time.sleep(wait)
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body if len(asked) > 1 else body[:cut])

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/hotdog.zip", asked
        server.shutdown()


def sha1(body):
    return hashlib.sha1(body).hexdigest()


def test_the_script_fetches_checks_and_unpacks(good_zip, photos_dir, tmp_path):
    with serve(good_zip) as (url, asked):
        command = ("python", ROOT / "scripts/download.py", "--url", url, "--sha1", sha1(good_zip))
        done = run(*command, "--data-dir", tmp_path / "data/photos")
        assert done.returncode == 0, done.stderr
        assert "100%" in done.stderr and str(tmp_path / "data/photos") in done.stdout
        assert len(data.load_photos(tmp_path / "data/photos")["train"]) == 25
        run(*command, "--data-dir", tmp_path / "data/photos")
        assert run(*command, "--data-dir", tmp_path / "data/again").returncode == 0
    assert asked == ["/hotdog.zip"], "the folder and the zip beside it are found again"


def test_a_zip_put_there_by_hand_is_found(good_zip, tmp_path):
    (tmp_path / "hotdog.zip").write_bytes(good_zip)
    download.download_photos(tmp_path / "photos", "http://127.0.0.1:9/hotdog.zip", sha1(good_zip))
    assert (tmp_path / "photos/train/hotdog").is_dir()


def leaves_nothing(tmp_path):
    return [path.name for path in tmp_path.iterdir() if path.name != "hotdog.zip"] == []


@pytest.mark.parametrize("status", [404, 500])
def test_a_server_error_is_one_clear_line(tmp_path, status):
    with serve(b"", status) as (url, _), pytest.raises(UserError, match=f"{status}.*--data-dir.*make demo"):
        download.download_photos(tmp_path / "photos", url)
    assert leaves_nothing(tmp_path)


def test_another_file_than_the_chapters_is_refused(good_zip, tmp_path):
    with serve(good_zip) as (url, _), pytest.raises(UserError, match="hash"):
        download.download_photos(tmp_path / "photos", url)
    assert leaves_nothing(tmp_path)


def test_without_a_network_the_script_says_what_to_do(tmp_path):
    url = "http://127.0.0.1:9/hotdog.zip"  # the discard port: nobody listens
    done = run("python", ROOT / "scripts/download.py", "--url", url, "--data-dir", tmp_path / "photos")
    assert done.returncode == 2
    assert f"error: could not get {url}" in done.stderr and "make demo" in done.stderr
    assert "Traceback" not in done.stderr and leaves_nothing(tmp_path)


def link(name):
    entry = zipfile.ZipInfo(name)
    entry.external_attr = (stat.S_IFLNK | 0o777) << 16
    return entry


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"hotdog/../../escape.txt": b"x"}, "unsafe entry"),
        ({"/absolute.txt": b"x"}, "unsafe entry"),
        ({"hotdog\\..\\..\\escape.txt": b"x"}, "unsafe entry"),
        ({link("hotdog/link"): b"/etc"}, "unsafe entry"),
        ({"a/1": b"x", "b/1": b"x"}, "holds 2 entries"),
    ],
)
def test_an_unsafe_archive_is_refused_whole(tmp_path, entries, message):
    body = zip_bytes(entries)
    with serve(body) as (url, _), pytest.raises(UserError, match=message):
        download.download_photos(tmp_path / "deep/photos", url, sha1(body))
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["hotdog.zip"]
    assert not (tmp_path / "escape.txt").exists()


def test_a_download_cut_off_half_way_leaves_nothing_and_works_the_next_time(good_zip, tmp_path):
    with serve(good_zip, cut=len(good_zip) // 2) as (url, asked):
        with pytest.raises(UserError, match="could not get"):
            download.download_photos(tmp_path / "photos", url, sha1(good_zip))
        assert list(tmp_path.iterdir()) == []
        download.download_photos(tmp_path / "photos", url, sha1(good_zip))
    assert len(asked) == 2 and len(data.load_photos(tmp_path / "photos")["train"]) == 25


def test_a_server_that_does_not_answer_is_given_up(good_zip, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "CONNECT_SECONDS", 0.2)
    with serve(good_zip, wait=1) as (url, _), pytest.raises(UserError, match="timed out"):
        download.download_photos(tmp_path / "photos", url, sha1(good_zip))
    assert leaves_nothing(tmp_path)


def test_two_processes_downloading_at_once_end_with_one_whole_folder(good_zip, tmp_path):
    with serve(good_zip, wait=0.2) as (url, _), ThreadPoolExecutor(2) as pool:
        command = ("python", ROOT / "scripts/download.py", "--url", url, "--sha1", sha1(good_zip))
        runs = [pool.submit(run, *command, "--data-dir", tmp_path / "data/photos") for _ in range(2)]
        assert [started.result().returncode for started in runs] == [0, 0], runs[0].result().stderr
    assert len(data.load_photos(tmp_path / "data/photos")["train"]) == 25
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == ["hotdog.zip", "photos"]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 64 KB, where the tests may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], capture_output=True
    ).returncode:
        pytest.skip("mounting a small tmpfs needs root")
    yield disk
    subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize("zip_fits", [True, False])
def test_a_full_disk_is_one_clear_line(small_disk, zip_fits):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED if zip_fits else zipfile.ZIP_STORED) as file:
        file.writestr("hotdog/large", b"x" * 200_000)
    body = buffer.getvalue()
    with serve(body) as (url, _), pytest.raises(UserError, match="No space left on device"):
        download.download_photos(small_disk / "photos", url, sha1(body))
    assert leaves_nothing(small_disk)


def test_a_zip_bomb_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(download, "MAX_UNPACKED_BYTES", 10)
    body = zip_bytes({"hotdog/large": b"x" * 11})
    with serve(body) as (url, _), pytest.raises(UserError, match="unpacks to more than"):
        download.download_photos(tmp_path / "photos", url, sha1(body))
    assert leaves_nothing(tmp_path)


def test_what_is_no_zip_is_refused(tmp_path):
    body = b"<html>captive portal</html>"
    with serve(body) as (url, _), pytest.raises(UserError, match="not a zip"):
        download.download_photos(tmp_path / "photos", url, sha1(body))
    assert leaves_nothing(tmp_path)
