"""Files and folders that are written whole, and what of others lies beside them."""

from hotdog_hf.files import replacing_folder


def write(folder, text):
    with replacing_folder(folder) as part:
        (part / "report.html").write_text(text)


def test_a_copy_that_somebody_put_aside_stays(tmp_path):
    write(tmp_path / "report", "first")
    (tmp_path / "report").rename(tmp_path / "report.old")
    write(tmp_path / "report", "second")
    write(tmp_path / "report", "third")
    texts = {path.parent.name: path.read_text() for path in tmp_path.rglob("*.html")}
    assert texts == {"report.old": "first", "report": "third"}
