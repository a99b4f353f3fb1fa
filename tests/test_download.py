"""download.py against a server on this machine that cuts, lies, changes its mind and goes away."""
import errno
import hashlib
import io
import multiprocessing
import os
import random
import re
import shutil
import socket
import struct
import sys
import threading
import time
import types
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tools import fetch as download
from tools.fetch import File, fetch

BODY = random.Random(0).randbytes(300_000)
OTHER = random.Random(1).randbytes(300_000)         # as long, with nothing in common
NOW = (0,) * 4                                      # pauses that do not wait
RIGHT = dict(codes=[],                              # answers to give first, instead of the file
             cuts=[], reset=False,                  # bytes after which a connection ends, and how
             mark=None,                             # headers that name the version; None: an ETag
             ranges=True, if_range=True,            # does it know them?
             span="", longer=0,                     # lies of Content-Range, of Content-Length
             length=True, chunked=False, pace=0)    # pace: seconds for 4 KB


class Handler(BaseHTTPRequestHandler):
    """Serves server.files as server.ways says; server.asked holds the headers of every request."""
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_GET(self):
        ways, body = self.server.ways, self.server.files.get(self.path)
        self.server.asked.append(dict(self.headers))
        if self.path == "/moved":
            self.send_response(302)
            self.send_header("Location", "/f")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        if ways["codes"] or body is None:
            return self.send_error(ways["codes"].pop(0) if ways["codes"] else 404)
        mark = {"ETag": f'"{version(body)}"'} if ways["mark"] is None else ways["mark"]
        start, wish = 0, self.headers.get("Range")
        unchanged = self.headers.get("If-Range") in (None, *mark.values()) or not ways["if_range"]
        piece = bool(wish and ways["ranges"] and unchanged)
        if piece:
            start = int(re.fullmatch(r"bytes=(\d+)-", wish)[1])
            if start >= len(body):
                return self.send_error(416)
        self.send_response(206 if piece else 200)
        for name, value in mark.items():
            self.send_header(name, value)
        if piece:
            self.send_header("Content-Range",
                             ways["span"] or f"bytes {start}-{len(body) - 1}/{len(body)}")
        if ways["chunked"]:
            self.send_header("Transfer-Encoding", "chunked")
        elif ways["length"]:
            self.send_header("Content-Length", str(len(body) - start + ways["longer"]))
        self.end_headers()
        self.send(body[start:])

    def send(self, rest):
        ways = self.server.ways
        stop = min(ways["cuts"].pop(0), len(rest)) if ways["cuts"] else len(rest)
        step = 4096 if ways["pace"] else 100_000
        for at in range(0, stop, step):
            some = rest[at:min(at + step, stop)]
            time.sleep(ways["pace"])
            self.wfile.write(b"%x\r\n%b\r\n" % (len(some), some) if ways["chunked"] else some)
        if ways["chunked"] and stop == len(rest):
            self.wfile.write(b"0\r\n\r\n")
        if ways["reset"] and stop < len(rest):
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER,
                                       struct.pack("ii", 1, 0))


def version(body):
    return hashlib.sha1(body).hexdigest()


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, address):       # the other side was killed
        pass


@pytest.fixture
def server():
    with Server(("127.0.0.1", 0), Handler) as server:
        server.asked, server.files = [], {"/f": BODY}
        server.ways = {**RIGHT, "codes": [], "cuts": []}
        server.url = f"http://127.0.0.1:{server.server_address[1]}"
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


def row(server, path="/f", to="a/f", **more):
    return File("it", server.url + path, to, more.pop("size", 0), "none", **more)


def files_in(folder):
    """What a folder holds, less the lock."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in Path(folder).rglob("*")
            if p.is_file() and p.name != ".fetching"}


def names_of(folder):
    """What a folder holds, less what is only noted."""
    return [name for name in files_in(folder) if not name.endswith(".part.from")]


def refused(folder, a_row, pauses=NOW):
    """The sentence with which fetch gives up; nothing may stand under the final name."""
    with pytest.raises(OSError) as error:
        fetch(["it"], folder, [a_row], pauses)
    assert not any((folder / to).exists() for to in a_row.to.split())
    text = str(error.value)
    assert error.value.errno is None and "\n" not in text and text.endswith(".")
    return text


def ranges(server):
    return [asked.get("Range") for asked in server.asked]


# ------------------------------------------------------------------------------------- what is cut

@pytest.mark.parametrize("reset", [False, True], ids=["closed", "reset"])
@pytest.mark.parametrize("mark", [None, {"Last-Modified": "Sat, 01 Aug 2026 00:00:00 GMT"},
                                  {"ETag": 'W/"weak"', "Last-Modified": "then"}],
                         ids=["etag", "date", "weak"])
def test_cuts_at_random_places(server, tmp_path, mark, reset):
    """Every try goes on where the last one ended; no byte is sent twice."""
    r = random.Random(2)
    server.ways.update(cuts=[r.randrange(1, 60_000) for _ in range(9)], reset=reset, mark=mark)
    cuts = list(server.ways["cuts"])
    fetch(["it"], tmp_path, [row(server)], (0,))    # one pause is enough, since each try progresses
    assert files_in(tmp_path) == {"a/f": BODY}
    starts = [int((text or "bytes=0-")[6:-1]) for text in ranges(server)]
    assert len(starts) > 4 and starts == sorted(set(starts))
    if not reset:                                   # a reset may take sent bytes with it
        assert starts == [sum(cuts[:i]) for i in range(len(starts))]


def test_redirected(server, tmp_path):
    """As the Hugging Face hub does: the wish for the rest goes along."""
    server.ways["cuts"] = [200_000]
    fetch(["it"], tmp_path, [row(server, "/moved")], NOW)
    assert files_in(tmp_path) == {"a/f": BODY}
    assert ranges(server) == [None] * 2 + ["bytes=200000-"] * 2


def test_another_process_goes_on(server, tmp_path):
    server.ways["cuts"] = [200_000, 0, 0, 0, 0]
    text = refused(tmp_path, row(server))
    assert server.url in text and "200,000 bytes" in text and "same command goes on" in text
    assert len(server.asked) == 5                   # one that progressed, one after each pause
    server.asked.clear()
    server.ways["cuts"] = []
    fetch(["it"], tmp_path, [row(server)])
    assert files_in(tmp_path) == {"a/f": BODY} and ranges(server) == ["bytes=200000-"]
    assert server.asked[0]["If-Range"] == f'"{version(BODY)}"'


def test_killed_before_it_had_its_name(server, tmp_path, monkeypatch):
    """All bytes are there: nothing is asked for again."""
    def interrupt(*args):
        raise KeyboardInterrupt
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(download.os, "replace", interrupt)
        fetch(["it"], tmp_path, [row(server)])
    assert not (tmp_path / "a/f").exists()
    fetch(["it"], tmp_path, [row(server)])
    assert files_in(tmp_path) == {"a/f": BODY} and len(server.asked) == 1


def test_pauses_grow(server, tmp_path, monkeypatch):
    slept = []
    monkeypatch.setattr(download, "time", types.SimpleNamespace(sleep=slept.append))
    server.ways["codes"] = [503, 429, 500]
    fetch(["it"], tmp_path, [row(server)])
    assert files_in(tmp_path) == {"a/f": BODY} and slept == list(download.PAUSES[:3])
    assert slept == sorted(set(slept)) and len(download.PAUSES) >= 3


def test_no_server(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))                 # bound, not listening
        nobody = File("it", f"http://127.0.0.1:{free.getsockname()[1]}/f", "f", 0, "none")
        assert "refused" in refused(tmp_path, nobody)


def test_a_silent_server(server, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "TIMEOUT", 0.2)
    server.ways["pace"] = 0.5
    assert "timed out" in refused(tmp_path, row(server), (0,))


# ------------------------------------------------------------------- a server without, or with lies

def test_ranges_are_ignored(server, tmp_path, capsys):
    server.ways.update(ranges=False, cuts=[100_000, 250_000])
    fetch(["it"], tmp_path, [row(server)], NOW)
    assert files_in(tmp_path) == {"a/f": BODY}
    assert ranges(server) == [None, "bytes=100000-", "bytes=250000-"]
    assert capsys.readouterr().out.count("from the beginning") == 2


@pytest.mark.parametrize("mark", [{}, {"ETag": 'W/"weak"'}], ids=["none", "weak"])
def test_no_mark_no_piece(server, tmp_path, mark):
    """Nothing says that it is still the same file: start over."""
    server.ways.update(mark=mark, cuts=[100_000, 50_000])
    fetch(["it"], tmp_path, [row(server)], NOW)
    assert files_in(tmp_path) == {"a/f": BODY} and ranges(server) == [None] * 3
    server.ways["cuts"] = [100_000] * 5
    assert "tries again" in refused(tmp_path / "b", row(server))


@pytest.mark.parametrize("later", [OTHER, OTHER[:50_000], OTHER + BODY])
@pytest.mark.parametrize("mark", [None, {"Last-Modified": "{}"}, {}], ids=["etag", "date", "none"])
@pytest.mark.parametrize("if_range", [True, False], ids=["if-range", "no-if-range"])
def test_the_file_changes(server, tmp_path, later, mark, if_range):
    """Between two tries: the result is the later file, never half of each."""
    def marked(text):
        return mark and {k: v.format(text) for k, v in mark.items()}
    server.ways.update(cuts=[100_000, 0, 0, 0, 0, 0], mark=marked("Monday"), if_range=if_range)
    refused(tmp_path, row(server))
    server.files["/f"] = later
    server.ways.update(cuts=[], mark=marked("Tuesday"))
    fetch(["it"], tmp_path, [row(server)], NOW)
    assert files_in(tmp_path) == {"a/f": later}


def test_another_address(server, tmp_path):
    """What came from one address is no beginning of another's."""
    server.ways.update(cuts=[100_000, 0, 0, 0, 0, 0], mark={"Last-Modified": "today"})
    refused(tmp_path, row(server))
    server.files["/g"] = OTHER
    server.ways["cuts"] = []
    fetch(["it"], tmp_path, [row(server, "/g")], NOW)
    assert files_in(tmp_path) == {"a/f": OTHER} and ranges(server)[-1] is None


@pytest.mark.parametrize("span", ["bytes 0-299999/300000", "bytes 99999-299999/300000", "nonsense",
                                  "bytes */300000", "bytes 100000-199999/200000"])
def test_a_piece_that_does_not_fit(server, tmp_path, span):
    server.ways.update(cuts=[100_000], span=span)
    fetch(["it"], tmp_path, [row(server)], NOW)
    assert files_in(tmp_path) == {"a/f": BODY}
    assert ranges(server) == [None, "bytes=100000-", None]


def test_length_is_too_long(server, tmp_path):
    server.ways["longer"] = 1
    assert re.search("416|300,000 of 300,001", refused(tmp_path, row(server)))


def test_length_is_too_short(server, tmp_path):
    """The wrong length cannot be seen, the checksum can; the next try is from zero."""
    right = row(server, sha256=hashlib.sha256(BODY).hexdigest())
    server.ways["longer"] = -1
    text = refused(tmp_path, right)
    assert right.sha256 in text and "299,999" in text and "removed" in text
    server.ways["longer"] = 0
    fetch(["it"], tmp_path, [right], NOW)
    assert files_in(tmp_path) == {"a/f": BODY} and ranges(server) == [None, None]


def test_checksum(server, tmp_path):
    wrong = row(server, sha256=hashlib.sha256(OTHER).hexdigest())
    assert wrong.sha256 in refused(tmp_path, wrong) and len(server.asked) == 1
    assert not names_of(tmp_path)


def test_a_page_instead_of_a_file(server, tmp_path):
    assert "about 5 MB" in refused(tmp_path, row(server, size=5))
    assert not names_of(tmp_path)
    fetch(["it"], tmp_path, [row(server, size=2)])  # sizes in the table are about


def test_chunked(server, tmp_path):
    """Without a length the chunks tell where the end is; a cut among them is seen."""
    server.ways.update(chunked=True, cuts=[100_000, 150_000])
    fetch(["it"], tmp_path, [row(server)], NOW)
    assert files_in(tmp_path) == {"a/f": BODY}
    assert ranges(server) == [None, "bytes=100000-", "bytes=250000-"]


def test_no_length_at_all(server, tmp_path):
    server.ways["length"] = False
    assert "no length" in refused(tmp_path, row(server))


@pytest.mark.parametrize("code", [401, 403, 404, 410])
def test_refusals_are_final(server, tmp_path, code):
    server.ways["codes"] = [code]
    text = refused(tmp_path, row(server))
    assert f"{code} " in text and server.url in text and len(server.asked) == 1


# ------------------------------------------------------------------------------ this side's trouble

FULL = "/dev/full"


@pytest.mark.skipif(not os.path.exists(FULL), reason="needs Linux's /dev/full")
def test_full_disk(server, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/f.part").symlink_to(FULL)
    text = refused(tmp_path, row(server))
    assert os.strerror(errno.ENOSPC) in text and "goes on" in text and len(server.asked) == 1


def test_full_disk_while_unpacking(server, tmp_path, monkeypatch):
    real, left = download.shutil.copyfileobj, [3]

    def copy(source, out, size):
        left[0] -= 1
        if not left[0]:
            out.write(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(source, out, size)
    monkeypatch.setattr(download.shutil, "copyfileobj", copy)
    a_row = pictures(server)
    assert os.strerror(errno.ENOSPC) in refused(tmp_path, a_row)
    fetch(["it"], tmp_path, [a_row])
    assert files_in(tmp_path) == PICTURES and len(server.asked) == 1
    assert left[0] == 2 - len(PICTURES)             # the two that were whole are not written again


def test_the_folder_is_a_file(server, tmp_path):
    (tmp_path / "a").write_text("")
    assert "/a: " in refused(tmp_path, row(server))
    assert "/a: " in refused(tmp_path / "a", row(server, to="b"))


def test_one_process_at_a_time(server, tmp_path):
    pytest.importorskip("fcntl")
    server.ways["pace"] = 0.005
    first = threading.Thread(target=fetch, args=(["it"], tmp_path, [row(server)]))
    first.start()
    while not server.asked:
        time.sleep(0.01)
    assert "another process" in refused(tmp_path, row(server))
    first.join()
    assert files_in(tmp_path) == {"a/f": BODY}


def test_what_is_there_is_left_alone(server, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/f").write_text("mine")
    fetch(["it"], tmp_path, [row(server)])
    assert files_in(tmp_path) == {"a/f": b"mine"} and not server.asked


# ----------------------------------------------------------------------------------------- archives

def zipped(members, compression=zipfile.ZIP_DEFLATED):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(zipfile.ZipInfo(name), content, compression)
    return out.getvalue()


PICTURES = {f"images/train2014/{i}.jpg": random.Random(i).randbytes(i * 7) for i in range(120)}


def pictures(server, members=None):
    """A zip with a folder of pictures (and what nobody needs), unpacked to images/train."""
    server.files["/p.zip"] = zipped(members or {
        "train2014/": b"", **{name.removeprefix("images/"): content
                              for name, content in PICTURES.items()}, "junk.txt": b"junk",
        "train2014_thumbs/0.jpg": b"small"})
    return row(server, "/p.zip", "images/train2014")


def test_a_folder_of_an_archive(server, tmp_path):
    fetch(["it"], tmp_path, [pictures(server)])
    assert files_in(tmp_path) == PICTURES           # nothing else, and no archive


def test_members_of_an_archive(server, tmp_path):
    server.files["/q.zip"] = zipped({"x/a.json": BODY, "x/b.json": b"b", "x/a.json.old": b"old",
                                     "c.json": OTHER, "x/_c.json": b"c"})
    two = row(server, "/q.zip", "vqa/a.json COCO/sub/c.json")
    fetch(["it"], tmp_path, [two])
    assert files_in(tmp_path) == {"vqa/a.json": BODY, "COCO/sub/c.json": OTHER}
    (tmp_path / "vqa/a.json").unlink()              # asked for again: the other is left alone
    (tmp_path / "COCO/sub/c.json").write_bytes(b"mine")
    fetch(["it"], tmp_path, [two])
    assert files_in(tmp_path) == {"vqa/a.json": BODY, "COCO/sub/c.json": b"mine"}


@pytest.mark.parametrize("name", ["train2014/../../out.jpg", "train2014//etc/out.jpg",
                                  "train2014/..\\..\\out.jpg", "train2014/C:out.jpg",
                                  "train2014/a/../../../out.jpg"])
def test_no_member_lands_outside(server, tmp_path, name):
    """Refused as a whole, before the first file is written."""
    text = refused(tmp_path / "data", pictures(server, {"train2014/1.jpg": b"1", name: b"out"}))
    assert "outside" in text and not names_of(tmp_path)


def damaged(how):
    content = zipped({"train2014/1.jpg": BODY}, zipfile.ZIP_STORED)
    return {"bit": content.replace(BODY[1000:1010], b"\0" * 10), "page": b"<html>sorry</html>",
            "cut": content[:-10],
            "size": content.replace(struct.pack("<L", len(BODY)), struct.pack("<L", 10**6))}[how]


@pytest.mark.parametrize("how", ["bit", "page", "cut", "size"])
def test_a_damaged_archive(server, tmp_path, how):
    good = pictures(server)
    good_bytes, server.files["/p.zip"] = server.files["/p.zip"], damaged(how)
    assert "fetches it again" in refused(tmp_path, good) and not [
        name for name in names_of(tmp_path) if "archives" in name]
    server.files["/p.zip"] = good_bytes
    fetch(["it"], tmp_path, [good])
    content = files_in(tmp_path)
    content.pop("images/train2014/1.jpg") if how in ("bit", "size") else None
    assert content.items() <= PICTURES.items() and len(content) >= 119


def test_an_archive_without_the_member(server, tmp_path):
    """It is no damage: the archive is kept for a person to look into."""
    other = pictures(server, {"val2014/1.jpg": b"1", "train2014_/2.jpg": b"2", "train2014/": b""})
    assert "holds no train2014 any more" in refused(tmp_path, other)
    assert names_of(tmp_path) == ["archives/p.zip"]


def test_a_member_in_another_folder(server, tmp_path):
    fetch(["it"], tmp_path, [pictures(server, {"coco/train2014/1.jpg": b"1", "train.txt": b""})])
    assert files_in(tmp_path) == {"images/train2014/1.jpg": b"1"}


def test_random_damage(server, tmp_path):
    """Whatever is wrong with an archive, it is one sentence, or its contents are right."""
    r, whole, good = random.Random(3), zipped({"train2014/1.jpg": BODY[:500]}), 0
    for i in range(80):
        content = bytearray(whole)
        for _ in range(r.randrange(1, 4)):
            content[r.choice((r.randrange(len(content)), -r.randrange(1, 100)))] = r.randrange(256)
        server.files["/p.zip"], folder = bytes(content), tmp_path / str(i)
        try:
            fetch(["it"], folder, [row(server, "/p.zip", "train2014")], ())
            assert files_in(folder) == {"train2014/1.jpg": BODY[:500]}
            good += 1
        except OSError as error:
            assert error.errno is None and not (folder / "train2014").exists()
    assert 0 < good < 80


# --------------------------------------------------------------------------- killed at every moment

def interrupted(server, folder, a_row, at):
    """Ctrl-C at the at-th line of download.py that runs; False if it ended before."""
    count = 0

    def line(frame, event, arg):
        nonlocal count
        count += event == "line"
        if count == at:
            raise KeyboardInterrupt
        return line
    sys.settrace(lambda frame, event, arg: line if frame.f_code.co_filename == download.__file__
                 else None)
    try:
        fetch(["it"], folder, [a_row])
        return False
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(None)


@pytest.mark.parametrize("kind", ["file", "changed", "archive"])
def test_ctrl_c_at_every_line(server, tmp_path, kind):
    """Wherever it is stopped: no half file under its name, and the same command completes it."""
    if kind == "changed":                           # something came, but of an older version
        server.files["/f"], server.ways["cuts"] = OTHER[:600], [300, 0]
        with pytest.raises(OSError):
            fetch(["it"], tmp_path / "old", [row(server)], (0,))
    server.files["/f"] = BODY[:600]
    content = {"train2014/1.jpg": b"one", "train2014/2.jpg": BODY[:900]}
    a_row, goal = row(server), {"a/f": BODY[:600]}
    if kind == "archive":
        a_row, goal = pictures(server, content), {f"images/{k}": v for k, v in content.items()}
    at = 0
    while True:
        at += 1
        folder = tmp_path / str(at)
        if kind == "changed":
            shutil.copytree(tmp_path / "old", folder)
        if not interrupted(server, folder, a_row, at):
            break
        there = files_in(folder) if folder.exists() else {}
        finals = {k: v for k, v in there.items() if ".part" not in k and "archives" not in k}
        assert finals in ({}, goal), at
        fetch(["it"], folder, [a_row])
        assert files_in(folder) == goal, at
    assert at > 60


def progress(part):
    """Bytes of a file, files in a folder."""
    try:
        return len(os.listdir(part)) if part.is_dir() else part.stat().st_size
    except FileNotFoundError:
        return 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that start quickly")
@pytest.mark.parametrize("kind", ["file", "archive"])
def test_killed_twenty_times(server, tmp_path, kind):
    """SIGKILL at random moments, then the same command: byte for byte what a quiet run gives."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tqdm", "urllib.request", "http.server", "zipfile", "pytest"])
    members = {f"images/train2014/{i}.jpg": random.Random(i).randbytes(200) for i in range(500)}
    a_row, goal = {
        "file": (row(server), {"a/f": BODY}),
        "archive": (pictures(server, {k.removeprefix("images/"): v for k, v in members.items()}),
                    members)}[kind]
    server.ways["pace"] = 0.003 if kind == "file" else 0
    folder, r, kills = tmp_path / "data", random.Random(4), 0
    part, most = (folder / "a/f.part", 40_000) if kind == "file" else (
        folder / "images/train2014.part", 70)
    for _ in range(60):
        until = progress(part) + r.randrange(most)  # bytes or pictures
        process = context.Process(target=fetch, args=(["it"], folder, [a_row]))
        process.start()
        while process.is_alive() and progress(part) <= until:
            time.sleep(0.001)
        process.kill()
        process.join()
        kills += process.exitcode != 0
        finals = {k: v for k, v in files_in(folder).items()
                  if ".part" not in k and "archives" not in k}
        assert finals in ({}, goal)
        if kills == 20:
            break
        if finals:
            shutil.rmtree(folder)                   # from the start again
    server.ways["pace"] = 0
    fetch(["it"], folder, [a_row])
    assert files_in(folder) == goal
    assert kills == 20
    asked = [text for text in ranges(server) if text]
    assert len(asked) > 10 if kind == "file" else len(server.asked) < 5


# --------------------------------------------------------------------------- table and command line

def test_table():
    names = set()
    for a_row in download.FILES:
        assert a_row.licence and a_row.to and a_row.names
        assert re.fullmatch(r"https?://[\w./-]+\.(zip|json|pt|safetensors)", a_row.url) or (
            not a_row.url and a_row.note)
        assert len(a_row.to.split()) == 1 or a_row.url.endswith(".zip")
        assert len(a_row.sha256) in (0, 64) and a_row.sha256 in a_row.url
        names |= set(a_row.names.split())
    assert {"vqa", "gqa", "nlvr", "caption", "pictures", "checkpoints"} <= names
    places = [to for a_row in download.FILES for to in a_row.to.split()]
    assert len(places) == len(set(places))
    archives = [a_row.url.split("/")[-1] for a_row in download.FILES if ".zip" in a_row.url]
    assert len(archives) == len(set(archives))


def test_what_a_person_must_do_comes_last(server, tmp_path):
    form = File("it", "", "images/nlvr2", 9, "research", note="Fill in the form for {0}.")
    with pytest.raises(OSError, match="^Fill in the form for .*nlvr2.$"):
        fetch(["it"], tmp_path, [form, row(server)])
    assert files_in(tmp_path) == {"a/f": BODY}
    (tmp_path / "images/nlvr2").mkdir(parents=True)
    fetch(["it"], tmp_path, [form, row(server)])


def test_unknown_name(tmp_path):
    with pytest.raises(ValueError, match="'vqaa'.* vqa, "):
        fetch(["nlvr", "vqaa"], tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_main(server, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(download.fetch, "__defaults__", ([row(server)], NOW))
    download.main(["it", "--to", str(tmp_path)])
    assert files_in(tmp_path) == {"a/f": BODY} and "a/f is there" in capsys.readouterr().out
    server.ways["codes"] = [404]
    with pytest.raises(SystemExit, match="^data.py fetch: .*404"):
        download.main(["it", "--to", str(tmp_path / "b")])
    with pytest.raises(SystemExit, match="'other'"):
        download.main(["other", "--to", str(tmp_path)])

    def interrupt(*args):
        raise KeyboardInterrupt
    monkeypatch.setattr(download, "attempt", interrupt)
    with pytest.raises(SystemExit, match="stopped.*goes on"):
        download.main(["it", "--to", str(tmp_path / "c")])


@pytest.mark.parametrize("argv", [["--list"], []])
def test_list(capsys, tmp_path, monkeypatch, argv):
    monkeypatch.chdir(tmp_path)
    download.main(argv)
    text = capsys.readouterr().out
    for a_row in download.FILES:
        assert a_row.url in text and a_row.licence in text
        assert all(str(Path("data") / to) in text for to in a_row.to.split())


def test_progress(server, tmp_path, capsys):
    fetch(["it"], tmp_path, [row(server), pictures(server)])
    shown = capsys.readouterr().err
    assert "300k/300k" in shown and "120/120" in shown


def test_torchscript_is_converted_as_said(server, tmp_path, capsys):
    """RN101's command, run on a TorchScript file of ours."""
    torch = pytest.importorskip("torch")
    weights = pytest.importorskip("weights")
    net = torch.nn.Linear(3, 2).half()
    net.register_buffer("input_resolution", torch.tensor(224))
    out = io.BytesIO()
    torch.jit.save(torch.jit.script(net), out)
    server.files["/RN101.pt"] = out.getvalue()
    fetch(["it"], tmp_path, [row(server, "/RN101.pt", "w/RN101.pt", note=download.TORCHSCRIPT)])
    code = re.search(r'python -c "(.*)"', capsys.readouterr().out)[1]
    exec(compile(code, "command", "exec"), {})
    read = weights.read(tmp_path / "w/RN101.safetensors")
    assert {k: v.tolist() for k, v in read.items()} == {
        k: v.tolist() for k, v in net.state_dict().items()}
    with pytest.raises(ValueError, match="jit"):
        weights.read(tmp_path / "w/RN101.pt")


@pytest.mark.parametrize("task", ["vqa", "gqa", "nlvr", "caption"])
def test_places_are_what_data_reads(task):
    """What a task's name fetches makes one of its layouts complete, and all of it is read."""
    data = pytest.importorskip("data")
    layouts = [{split: layout.files[split].split() for split in layout.files}
               for layout in data.TASKS[task].layouts]

    def fetched(name):
        return {to for a_row in download.FILES for to in a_row.to.split()
                if name in a_row.names.split()}
    assert any(set(data.SPLITS) <= set(files) and
               {name for split in data.SPLITS for name in files[split]} <= fetched(task)
               for files in layouts)
    read = {name for files in layouts for names in files.values() for name in names}
    assert fetched(task) | fetched(f"{task}-submit") <= read
