"""tools/fetch.py against a server on this machine that cuts, lies and does not know files."""
import hashlib
import io
import random
import re
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from support.gate import BadInput
from tools import fetch

BODY = random.Random(0).randbytes(300_000)
SHA256 = hashlib.sha256(BODY).hexdigest()
CUT = 100_000                                  # bytes after which a connection of /cut ends


class Handler(BaseHTTPRequestHandler):
    """Serves server.files; server.asked holds (path, Range) of every request."""

    def log_message(self, *args):
        pass

    def do_GET(self):
        wish = self.headers.get("Range")
        self.server.asked.append((self.path, wish))
        if self.path not in self.server.files:
            return self.send_error(404)
        body, start = self.server.files[self.path], 0
        if wish:
            start = int(re.fullmatch(r"bytes=(\d+)-", wish)[1])
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        self.wfile.write(body[start:start + CUT] if self.path == "/cut" else body[start:])


def zipped(**members):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, text in members.items():
            archive.writestr(name, text)
    return file.getvalue()


@pytest.fixture
def server():
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.asked, server.files = [], {"/f": BODY, "/cut": BODY}
        server.url = f"http://127.0.0.1:{server.server_address[1]}"
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


def row(server, path="/f", to="a/f", size=0, **more):
    return fetch.File("it", server.url + path, to, size, "none", **more)


def files_in(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*")
            if p.is_file()}


def test_a_cut_connection_is_gone_on_with(server, tmp_path):
    fetch.fetch(row(server, "/cut", exact=len(BODY), sha256=SHA256), tmp_path)
    assert files_in(tmp_path) == {"a/f": BODY}
    assert server.asked == [("/cut", None), ("/cut", "bytes=100000-"), ("/cut", "bytes=200000-")]
    fetch.fetch(row(server, "/cut"), tmp_path)                       # it is there: nobody is asked
    assert len(server.asked) == 3


def test_what_an_earlier_command_left_is_gone_on_with(server, tmp_path):
    (tmp_path / "a").mkdir()
    for left in (BODY[:1000], BODY):
        (tmp_path / "a/f.part").write_bytes(left)
        fetch.fetch(row(server, sha256=SHA256), tmp_path)
        assert files_in(tmp_path) == {"a/f": BODY}
        (tmp_path / "a/f").unlink()


@pytest.mark.parametrize("more", [{"exact": len(BODY) - 1}, {"size": 4}, {"sha256": "0" * 64},
                                  {"exact": len(BODY), "sha256": "0" * 64}])
def test_another_file_is_removed(server, tmp_path, more):
    with pytest.raises(BadInput, match="300,000 bytes .* were removed"):
        fetch.fetch(row(server, **more), tmp_path)
    assert files_in(tmp_path) == {}


def test_a_file_that_is_not_there(server, tmp_path):
    with pytest.raises(BadInput, match="a/f: .*by hand"):
        fetch.fetch(row(server, "/no"), tmp_path)
    assert len(server.asked) == 1                                    # not asked for eight times
    second = row(server, f"/no {server.url}/f", sha256=SHA256)       # two addresses
    fetch.fetch(second, tmp_path)
    assert files_in(tmp_path) == {"a/f": BODY}


def test_members_of_a_zip(server, tmp_path):
    server.files["/d.zip"] = zipped(**{
        "v1/q.json": "q", "v1/photos/1.jpg": "1", "v1/photos/sub/2.jpg": "2", "other.txt": "no",
        "v1/photos.txt": "no", "v1/photos/../../../evil": "kept inside"})
    both = row(server, "/d.zip", "VQA/q.json images/photos")
    fetch.fetch(both, tmp_path)
    want = {"VQA/q.json": b"q", "images/photos/1.jpg": b"1", "images/photos/sub/2.jpg": b"2",
            "images/photos/evil": b"kept inside"}
    assert files_in(tmp_path) == want                                # the archive is gone, too
    (tmp_path / "images/photos").rename(tmp_path / "images/photos.part")     # as if killed
    (tmp_path / "images/photos.part/old.jpg").write_bytes(b"of another version")
    fetch.fetch(both, tmp_path)
    assert files_in(tmp_path) == want


def test_a_zip_that_is_not_as_it_should_be(server, tmp_path):
    good = zipped(photos=BODY)
    for bad in (good.replace(BODY[:50], b"x" * 50), good[:-30], b"<html>", zipped(others=BODY)):
        server.files["/d.zip"] = bad
        with pytest.raises(BadInput, match="d.zip .delete it to fetch it again.: ."):
            fetch.fetch(row(server, "/d.zip", "photos"), tmp_path)
        assert not (tmp_path / "photos").exists()
        (tmp_path / "archives/d.zip").unlink()


def test_the_command(server, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fetch, "FILES", [
        row(server, to="RN.pt", note="convert {0}"), row(server, "/no", "b"),
        fetch.File("form", "", "c", 5, "research", note="ask for it, put it into {0}")])
    fetch.main(["form", "--to", str(tmp_path)])
    assert "put it into " + str(tmp_path / "c") in capsys.readouterr().out
    with pytest.raises(SystemExit, match="^fetch.py: .*by hand"):
        fetch.main(["it", "--to", str(tmp_path)])
    assert f"convert {tmp_path / 'RN.pt'}" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="fetch.py: nothing: choose from it, form"):
        fetch.main(["nothing"])


def test_the_table(capsys):
    fetch.main(["--list"])
    said = capsys.readouterr().out
    for file in fetch.FILES:
        assert file.names in said and file.to in said and (file.url or "by hand") in said
        assert file.url or file.note
        assert all(url.startswith("https://") for url in file.url.split()[:1])
        assert not file.exact or abs(file.exact / 1e6 - file.size) < 1
    places = " ".join(file.to for file in fetch.FILES).split()
    assert len(set(places)) == len(places)
    (rn101,) = [file for file in fetch.FILES if "RN101" in file.to]
    assert all(rn101.sha256 in url for url in rn101.url.split()) and len(rn101.url.split()) == 2
