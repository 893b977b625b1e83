import contextlib
import hashlib
import http.server
import io
import signal
import stat
import subprocess
import sys
import threading
import time
import zipfile

import pytest
import requests
from conftest import ROOT, begin, run

from hotdog_hf.data import download
from hotdog_hf.data.splits import load_photos
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
def serve(body, status=200, cut=None, wait=0, ranges=True, stall=False):
    """Answer every GET on 127.0.0.1 with `body`; yields the address and what was asked and sent.

    That is one (first byte asked for, number of bytes sent) a request. The first answer ends after `cut`
    bytes, with `stall` its connection stays open; every answer begins after `wait` seconds. Without `ranges`
    every answer is the whole.
    """
    asked, end = [], threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            first = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").removesuffix("-"))
            rest = body[first:] if ranges else body
            sent = rest if asked else rest[:cut]
            is_cut = len(sent) < len(rest)
            asked.append((first, len(sent)))
            time.sleep(wait)
            answers_range = first and ranges and status == 200
            self.send_response((206 if rest else 416) if answers_range else status)
            self.send_header("Content-Length", str(len(rest)))
            self.end_headers()
            self.wfile.write(sent)
            if is_cut and stall:
                end.wait(60)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/hotdog.zip", asked
        end.set()
        server.shutdown()


def sha1(body):
    return hashlib.sha1(body).hexdigest()


def test_the_script_fetches_checks_and_unpacks(good_zip, photos_dir, tmp_path):
    with serve(good_zip) as (url, asked):
        command = ("python", ROOT / "scripts/download.py", "--url", url, "--sha1", sha1(good_zip))
        done = run(*command, "--data-dir", tmp_path / "data/photos")
        assert done.returncode == 0, done.stderr
        assert "100%" in done.stderr and str(tmp_path / "data/photos") in done.stdout
        assert len(load_photos(tmp_path / "data/photos")["train"]) == 25
        run(*command, "--data-dir", tmp_path / "data/photos")
        assert run(*command, "--data-dir", tmp_path / "data/again").returncode == 0
    assert asked == [(0, len(good_zip))], "the folder and the zip beside it are found again"


def test_a_zip_put_there_by_hand_is_found(good_zip, tmp_path):
    (tmp_path / "hotdog.zip").write_bytes(good_zip)
    download.download_photos(tmp_path / "photos", "http://127.0.0.1:9/hotdog.zip", sha1(good_zip))
    assert (tmp_path / "photos/train/hotdog").is_dir()


def left(folder):
    return sorted(path.name for path in folder.iterdir() if path.name != ".download.lock")


@pytest.mark.parametrize("status", [404, 500])
def test_a_server_error_is_one_clear_line(tmp_path, status):
    with serve(b"", status) as (url, _), pytest.raises(UserError, match=f"{status}.*--data-dir.*make demo"):
        download.download_photos(tmp_path / "photos", url)
    assert left(tmp_path) == []


def test_a_server_error_keeps_what_an_earlier_call_fetched(tmp_path):
    (tmp_path / "hotdog.zip.part").write_bytes(b"abc")
    with (
        serve(b"", 503) as (url, _),
        pytest.raises(UserError, match=r"503.*keeps 3 bytes.*resumes from there"),
    ):
        download.download_photos(tmp_path / "photos", url)
    assert (tmp_path / "hotdog.zip.part").read_bytes() == b"abc"


def test_another_file_than_the_chapters_is_refused(good_zip, tmp_path):
    with serve(good_zip) as (url, _), pytest.raises(UserError, match="hash"):
        download.download_photos(tmp_path / "photos", url)
    assert left(tmp_path) == []


def test_without_a_network_the_script_says_what_to_do(tmp_path):
    url = "http://127.0.0.1:9/hotdog.zip"  # the discard port: nobody listens
    done = run("python", ROOT / "scripts/download.py", "--url", url, "--data-dir", tmp_path / "photos")
    assert done.returncode == 2
    assert f"error: could not get {url}" in done.stderr and "make demo" in done.stderr
    assert "Traceback" not in done.stderr and left(tmp_path) == []


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
    assert left(tmp_path / "deep") == ["hotdog.zip"]
    assert not (tmp_path / "escape.txt").exists()


@pytest.mark.parametrize("cut", [0, 1, download.CHUNK_BYTES + 1, 0.5, -1])
def test_a_download_cut_off_goes_on_where_it_ended(good_zip, tmp_path, cut):
    whole = len(good_zip)
    cut = whole // 2 if cut == 0.5 else cut % whole
    part = tmp_path / "hotdog.zip.part"
    with serve(good_zip, cut=cut) as (url, asked):
        with pytest.raises(
            UserError, match=r"could not get .* keeps [\d,]+ bytes.*resumes from there"
        ) as raised:
            download.download_photos(tmp_path / "photos", url, sha1(good_zip))
        size = part.stat().st_size
        assert cut - download.CHUNK_BYTES < size <= cut and f"keeps {size:,} bytes" in str(raised.value)
        assert left(tmp_path) == ["hotdog.zip.part"] and part.read_bytes() == good_zip[:size]
        download.download_photos(tmp_path / "photos", url, sha1(good_zip))
    assert asked == [(0, cut), (size, whole - size)]
    assert left(tmp_path) == ["hotdog.zip", "photos"]
    assert len(load_photos(tmp_path / "photos")["train"]) == 25


def test_the_progress_bar_of_a_resumed_download_starts_where_it_ended(good_zip, tmp_path, capfd):
    (tmp_path / "hotdog.zip.part").write_bytes(good_zip[: len(good_zip) // 2])
    with serve(good_zip) as (url, _):
        download.download_photos(tmp_path / "photos", url, sha1(good_zip))
    assert "hotdog.zip:  50%" in (shown := capfd.readouterr().err) and "hotdog.zip: 100%" in shown


def test_a_server_that_stalls_half_way_is_given_up_and_gone_on_with(good_zip, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "CONNECT_SECONDS", 1)
    with serve(good_zip, cut=len(good_zip) // 2, stall=True) as (url, asked):
        with pytest.raises(UserError, match=r"timed out.*resumes from there"):
            download.download_photos(tmp_path / "photos", url, sha1(good_zip))
        monkeypatch.undo()
        download.download_photos(tmp_path / "photos", url, sha1(good_zip))
    assert asked[1][0] > len(good_zip) // 2 - download.CHUNK_BYTES and sum(asked[1]) == len(good_zip)


def test_a_body_that_ends_early_without_an_error_of_the_library_is_no_whole_file(
    good_zip, tmp_path, monkeypatch
):
    iter_content = requests.Response.iter_content

    def silent(answer, size):  # as with urllib3 1
        with contextlib.suppress(requests.exceptions.ChunkedEncodingError):
            yield from iter_content(answer, size)

    monkeypatch.setattr(requests.Response, "iter_content", silent)
    with serve(good_zip, cut=len(good_zip) // 2) as (url, asked):
        with pytest.raises(UserError, match=rf"ended after [\d,]+ of {len(good_zip):,} bytes.*resumes from"):
            download.download_photos(tmp_path / "photos", url, sha1(good_zip))
        download.download_photos(tmp_path / "photos", url, sha1(good_zip))
    assert asked[1][0] > 0 and sum(asked[1]) == len(good_zip)


def test_where_the_server_ignores_ranges_the_download_starts_anew(good_zip, tmp_path):
    (tmp_path / "hotdog.zip.part").write_bytes(good_zip[:1000])
    with serve(good_zip, ranges=False) as (url, asked):
        download.download_photos(tmp_path / "photos", url, sha1(good_zip))
    assert asked == [(1000, len(good_zip))] and left(tmp_path) == ["hotdog.zip", "photos"]


def test_a_part_longer_than_the_file_is_fetched_anew(good_zip, tmp_path):
    (tmp_path / "hotdog.zip.part").write_bytes(good_zip + b"x")
    with serve(good_zip) as (url, asked):
        download.download_photos(tmp_path / "photos", url, sha1(good_zip))
    assert asked == [(len(good_zip) + 1, 0), (0, len(good_zip))]
    assert left(tmp_path) == ["hotdog.zip", "photos"]


def test_a_part_that_is_complete_needs_no_network(good_zip, tmp_path):
    (tmp_path / "hotdog.zip.part").write_bytes(good_zip)
    download.download_photos(tmp_path / "photos", "http://127.0.0.1:9/hotdog.zip", sha1(good_zip))
    assert left(tmp_path) == ["hotdog.zip", "photos"]


def test_a_part_of_another_version_is_dropped_and_the_next_try_works(good_zip, tmp_path):
    (tmp_path / "hotdog.zip.part").write_bytes(b"x" * 1000)
    with serve(good_zip) as (url, asked):
        with pytest.raises(
            UserError, match=r"hash.*hotdog\.zip\.part is deleted, the next try starts over\. Put"
        ):
            download.download_photos(tmp_path / "photos", url, sha1(good_zip))
        assert left(tmp_path) == []
        download.download_photos(tmp_path / "photos", url, sha1(good_zip))
    assert asked == [(1000, len(good_zip) - 1000), (0, len(good_zip))]
    assert left(tmp_path) == ["hotdog.zip", "photos"]


def test_a_download_killed_half_way_is_gone_on_with(good_zip, tmp_path):
    part = tmp_path / "hotdog.zip.part"
    with serve(good_zip, cut=len(good_zip) // 2, stall=True) as (url, asked):
        command = [sys.executable, ROOT / "scripts/download.py", "--url", url, "--sha1", sha1(good_zip)]
        with subprocess.Popen([*command, "--data-dir", tmp_path / "photos"]) as process:
            while not asked and process.poll() is None:
                time.sleep(0.01)
            given_up = time.monotonic() + download.CONNECT_SECONDS / 2  # before the process itself gives up
            while not (part.exists() and part.stat().st_size) and time.monotonic() < given_up:
                time.sleep(0.01)
            process.kill()
        assert process.returncode == -signal.SIGKILL, "it was still waiting for the other half"
        assert left(tmp_path) == ["hotdog.zip.part"] and (size := part.stat().st_size) > 0
        download.download_photos(tmp_path / "photos", url, sha1(good_zip))
    assert asked == [(0, len(good_zip) // 2), (size, len(good_zip) - size)]
    assert left(tmp_path) == ["hotdog.zip", "photos"]


def test_a_server_that_does_not_answer_is_given_up(good_zip, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "CONNECT_SECONDS", 0.2)
    with serve(good_zip, wait=1) as (url, _), pytest.raises(UserError, match="timed out"):
        download.download_photos(tmp_path / "photos", url, sha1(good_zip))
    assert left(tmp_path) == []


def test_two_processes_downloading_at_once_end_with_one_whole_folder(good_zip, tmp_path):
    with serve(good_zip, wait=2) as (url, asked):
        command = ("python", ROOT / "scripts/download.py", "--url", url, "--sha1", sha1(good_zip))
        for process in [begin(*command, "--data-dir", tmp_path / "data/photos") for _ in range(2)]:
            _, errors = process.communicate()
            assert process.returncode == 0, errors
    assert len(load_photos(tmp_path / "data/photos")["train"]) == 25
    assert len(asked) == 1 and left(tmp_path / "data") == ["hotdog.zip", "photos"]


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
    with serve(body) as (url, asked):
        with pytest.raises(UserError, match="No space left on device"):
            download.download_photos(small_disk / "photos", url, sha1(body))
        assert left(small_disk) == ["hotdog.zip" if zip_fits else "hotdog.zip.part"]
        subprocess.run(["mount", "-o", "remount,size=1m", small_disk], check=True)
        download.download_photos(small_disk / "photos", url, sha1(body))
    assert left(small_disk) == ["hotdog.zip", "photos"]
    assert zip_fits or asked[1][0] > 0, "what fitted is not fetched again"


def test_a_zip_bomb_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(download, "MAX_UNPACKED_BYTES", 10)
    body = zip_bytes({"hotdog/large": b"x" * 11})
    with serve(body) as (url, _), pytest.raises(UserError, match="unpacks to more than"):
        download.download_photos(tmp_path / "photos", url, sha1(body))
    assert left(tmp_path) == ["hotdog.zip"]


def test_what_is_no_zip_is_refused(tmp_path):
    body = b"<html>captive portal</html>"
    with serve(body) as (url, _), pytest.raises(UserError, match="not a zip"):
        download.download_photos(tmp_path / "photos", url, sha1(body))
    assert left(tmp_path) == ["hotdog.zip"]
