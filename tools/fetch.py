"""Where do the published annotations, pictures and checkpoints come from?

FILES is the whole answer for the eye: every address, what comes out of it, under which terms.

    python -m tools.fetch --list                        # names, places, sizes, terms, addresses
    python -m tools.fetch vqa caption                   # annotations, into data/vqa and data/COCO
    python -m tools.fetch vqa-pictures bart-base        # 20 GB of pictures, a checkpoint

The addresses could not be tried where they were written; the code was, against a local server.

A download grows as NAME.part; NAME.part.from remembers its address and the server's mark of this
version (a strong ETag, else Last-Modified). After a cut, a kill or Ctrl-C the same command asks for
the rest (Range) of that very version (If-Range): a changed file starts over and is never glued.
Only what is complete and verified gets its name (os.replace), and is left alone from then on.

    python -m pytest tests/test_download.py
"""
import argparse
import hashlib
import http.client
import json
import os
import re
import shutil
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from tqdm import tqdm


@dataclass(frozen=True, slots=True)
class File:
    """One address, and what is made of it."""
    names: str                       # the words of the command line that ask for it
    url: str                         # "": not free to copy, the note says how to get it
    to: str                          # its place; of a zip: places of files and folders called so
    size: int                        # MB, about; less than a tenth of it is some page, not the file
    licence: str
    sha256: str = ""
    note: str = ""                   # what is left to do; {0}: the place, {1}: without its ending


VQA, COCO = "https://s3.amazonaws.com/cvmlp/vqa/mscoco/vqa/v2_", "http://images.cocodataset.org/"
GQA = "https://downloads.cs.stanford.edu/nlp/data/gqa/"
NLVR = "https://raw.githubusercontent.com/lil-lab/nlvr/master/nlvr2/data/"
KARPATHY = "https://cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip"
OPENAI = "https://openaipublic.azureedge.net/clip/models/"
RN101 = "8fa8567bab74a42d41c5915025a8e4538c3bdbe8804a470a72f30b0d94fab599"
BY, MIT, FLICKR = "CC BY 4.0", "MIT (OpenAI's CLIP)", "each picture under its Flickr owner's terms"
BY_REQUEST = ("NLVR2's pictures are given out by request only: fill in the form that "
              "https://github.com/lil-lab/nlvr/tree/master/nlvr2 names and put them into {0}.")
TORCHSCRIPT = (
    "{0} is TorchScript, that is code (its sha256 is OpenAI's); convert it once: python -c "
    "\"import torch, safetensors.torch as s; w = torch.jit.load('{0}', 'cpu').state_dict(); "
    "s.save_file({{k: v.contiguous().clone() for k, v in w.items()}}, '{1}.safetensors')\"")


FILES = [
    *(File("vqa", f"{VQA}{part}_mscoco.zip", f"vqa/v2_{name}.json", size, BY)
      for part, name, size in (
          ("Questions_Train", "OpenEnded_mscoco_train2014_questions", 7),
          ("Questions_Val", "OpenEnded_mscoco_val2014_questions", 3),
          ("Annotations_Train", "mscoco_train2014_annotations", 21),
          ("Annotations_Val", "mscoco_val2014_annotations", 10))),
    File("vqa-submit", VQA + "Questions_Test_mscoco.zip",
         "vqa/v2_OpenEnded_mscoco_test2015_questions.json "
         "vqa/v2_OpenEnded_mscoco_test-dev2015_questions.json", 8, BY),
    File("vqa caption", KARPATHY, "COCO/dataset_coco.json", 36,
         "none stated; the captions are COCO's, CC BY 4.0"),
    File("caption", COCO + "annotations/annotations_trainval2014.zip",
         "COCO/captions_train2014.json COCO/captions_val2014.json", 250, BY),
    File("caption-submit", COCO + "annotations/image_info_test2014.zip",
         "COCO/image_info_test2014.json", 1, BY),
    File("gqa", GQA + "questions1.2.zip",
         "GQA/train_balanced_questions.json GQA/val_balanced_questions.json "
         "GQA/testdev_balanced_questions.json GQA/submission_all_questions.json", 1400, BY),
    *(File("nlvr", f"{NLVR}{part}.json", f"nlvr/{part}.json", size, BY)
      for part, size in (("train", 60), ("dev", 5), ("test1", 5))),
    *(File(names, f"{COCO}zips/{part}.zip", f"images/{part}", size, FLICKR)
      for names, part, size in (
          ("vqa-pictures caption-pictures pictures", "train2014", 13500),
          ("vqa-pictures caption-pictures pictures", "val2014", 6600),
          ("vqa-submit-pictures", "test2015", 12400),
          ("caption-submit-pictures", "test2014", 6200))),
    File("gqa-pictures pictures", GQA + "images.zip", "images/gqa/images", 20300,
         f"Visual Genome, CC BY 4.0; {FLICKR}"),
    File("nlvr-pictures pictures", "", "images/nlvr2", 15000, "research", note=BY_REQUEST),
    *(File(f"{name} checkpoints", f"https://huggingface.co/{repo}/{name}/resolve/main/{file}",
           f"weights/{name}/{file}", size * file.endswith(".safetensors"), licence)
      for repo, name, size, licence, *files in (
          ("facebook", "bart-base", 558, "Apache-2.0", "tokenizer.json"),
          ("google-t5", "t5-base", 892, "Apache-2.0", "tokenizer.json"),
          ("openai", "clip-vit-base-patch32", 605, MIT))
      for file in ("config.json", *files, "model.safetensors")),
    File("clip-rn101 checkpoints", f"{OPENAI}{RN101}/RN101.pt", "weights/RN101.pt", 292, MIT,
         RN101, TORCHSCRIPT),
]
PAUSES = (1, 5, 20, 60)              # seconds to wait after cuts; they begin anew after progress
TIMEOUT, CHUNK = 60, 1 << 18         # seconds without a byte; bytes at a time
HEADERS = {"User-Agent": "nanoVLPET", "Accept-Encoding": "identity"}


# ------------------------------------------------------------------------------------ one download

class Cut(Exception):
    """The connection, not the file, failed: worth another try."""


def online(call: Callable, *args, **more):
    """What a call to the network returns. Nothing else is watched: a full disk is no Cut."""
    try:
        return call(*args, **more)
    except urllib.error.HTTPError as answer:     # 404 and the like are answers, too
        return answer
    except (OSError, http.client.HTTPException) as error:
        raise Cut(f"the connection failed ({error})") from None


def came(path: Path, url: str) -> tuple[int, dict]:
    """Bytes of path.part that can be gone on with, and the {"url", "mark", "size"} of its file."""
    try:
        told = json.loads(Path(f"{path}.part.from").read_text(encoding="utf-8"))
        have = Path(f"{path}.part").stat().st_size
    except (FileNotFoundError, ValueError):      # killed while it was written: .part is empty
        return 0, {}
    return (have, told) if told["url"] == url and told["mark"] else (0, {})


def attempt(url: str, path: Path) -> None:
    """Brings path.part to its full length, or as far as the connection holds (Cut)."""
    have, told = came(path, url)
    if have and have == told["size"]:
        return                                   # killed between its last byte and its name
    wish = {"Range": f"bytes={have}-", "If-Range": told["mark"]} if have else {}
    request = urllib.request.Request(url, headers=HEADERS | wish)
    with online(urllib.request.urlopen, request, timeout=TIMEOUT) as response:
        code, get = response.status, response.headers.get
        answer, piece = f"the server answers {code} {response.reason}", get("Content-Range", "")
        mark = get("ETag", "") if get("ETag", "").startswith('"') else get("Last-Modified", "")
        span = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", piece)
        if code in (408, 429) or code >= 500:
            raise Cut(answer)
        if code == 416 or code == 206 and not (  # some servers ignore If-Range
                have and span and int(span[1]) == have and mark in ("", told["mark"])
                and told["size"] in (None, int(span[2]))):
            Path(f"{path}.part").unlink(missing_ok=True)
            raise Cut(f"{answer} {piece}, which does not fit what came before")
        endless = code == 200 and response.length is None and not response.chunked
        if endless or code not in (200, 206):
            raise OSError(f"{url}: {answer}{', but no length to know a cut by' * endless}; look "
                          "there with a browser whether the file has moved or changed its form, "
                          "and put it into its place by hand (--list).")
        size = int(span[2]) if code == 206 else response.length          # None: it comes in chunks
        if have and code == 200:
            have = 0
            print("from the beginning: the file has changed, or the server sends no pieces")
        with open(Path(f"{path}.part"), "r+b" if have else "wb") as file:
            if not have:                         # emptied before it gets a new origin
                Path(f"{path}.part.from").write_text(
                    json.dumps({"url": url, "mark": mark, "size": size}), encoding="utf-8")
            file.seek(have)
            with tqdm(None, path.name, size, initial=have, unit="B", unit_scale=True) as bar:
                while chunk := online(response.read1, CHUNK):
                    bar.update(file.write(chunk))
            if size not in (None, file.tell()):
                raise Cut(f"the connection ended after {file.tell():,} of {size:,} bytes")
            file.flush()
            os.fsync(file.fileno())              # the bytes reach the disk before their name


def download(row: File, path: Path, pauses: Sequence[float]) -> None:
    """The file of row.url, complete and verified, under its name. OSError says why it is not."""
    part, waits, most = Path(f"{path}.part"), iter(pauses), 0
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        try:
            attempt(row.url, path)
            break
        except Cut as cut:
            have, _ = came(path, row.url)
            if have > most:
                waits, most = iter(pauses), have
            if (wait := next(waits, None)) is None:
                raise OSError(f"{row.url}: {cut}; given up for now with {have:,} bytes kept: the "
                              f"same command {'goes on' if have else 'tries again'}.") from None
            print(f"{cut}; again in {wait} s")
            time.sleep(wait)
    size = part.stat().st_size
    sha256 = hashlib.sha256(part.read_bytes()).hexdigest() if row.sha256 else ""
    if size < row.size * 1e5 or sha256 != row.sha256:
        part.unlink()
        raise OSError(f"{row.url}: {size:,} bytes came, not about {row.size:,} MB"
                      f"{row.sha256 and f' with sha256 {row.sha256}'}; they were removed: the same "
                      "command tries again, unless the file was changed where it is published.")
    os.replace(part, path)


# --------------------------------------------------------------------------------------- one unzip

def wanted(zipped: zipfile.ZipFile, name: str) -> list[tuple[zipfile.ZipInfo, str]]:
    """The members that make up this file or folder, with their paths below it ("" for a file)."""
    inside = []
    for info in zipped.infolist():
        _, found, below = f"/{info.filename}".partition(f"/{name}")
        if found and below[:1] in ("", "/") and not info.is_dir():
            if ".." in PurePosixPath(below).parts or re.search(r"//|[\\:]", below):
                raise zipfile.BadZipFile(f"{info.filename!r} would land outside of its folder")
            inside.append((info, below[1:]))
    return inside


def unpack(archive: Path, places: list[Path]) -> None:
    """Files and folders of a zip, each under its name only when it is complete. An interrupted
    folder goes on: what its .part folder holds is kept if its CRC-32 is right."""
    try:
        with zipfile.ZipFile(archive) as zipped:
            for place in (place for place in places if not place.exists()):
                if not (inside := wanted(zipped, place.name)):
                    raise OSError(f"{archive} holds no {place.name} any more: look what became of "
                                  f"it, and put it to {place} by hand.")
                for info, below in tqdm(inside, place.name, unit=" files"):
                    target = Path(f"{place}.part") / below
                    target.parent.mkdir(parents=True, exist_ok=True)
                    if not target.exists() or zlib.crc32(target.read_bytes()) != info.CRC:
                        with zipped.open(info) as source, open(target, "wb") as out:
                            shutil.copyfileobj(source, out, CHUNK)       # checks the CRC-32, too
                os.replace(Path(f"{place}.part"), place)
    except (zipfile.BadZipFile, zlib.error, RuntimeError, EOFError) as error:
        archive.unlink()
        raise OSError(f"{archive} was removed, it is damaged ({error}): the same command fetches "
                      "it again.") from None


# -------------------------------------------------------------------------------------- everything

def fetch(names: Sequence[str], folder: str | Path, files: Sequence[File] = FILES,
          pauses: Sequence[float] = PAUSES) -> None:
    """Whatever these names ask for, into the data folder; what is there is left alone. ValueError
    tells of an unknown name, OSError (one sentence) what could not be fetched and why."""
    folder, known = Path(folder), dict.fromkeys(" ".join(row.names for row in files).split())
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"there is no {unknown[0]!r} to fetch: choose from {', '.join(known)}.")
    rows = [row for row in files if not set(names).isdisjoint(row.names.split())]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / ".fetching", "w") as held:            # its lock goes with the process
            if os.name == "posix":                               # Windows does without
                import fcntl
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for row in sorted(rows, key=lambda row: not row.url):        # by request: at the end
                fetch_row(row, folder, pauses)
    except BlockingIOError:
        raise OSError(f"another process is fetching into {folder}: wait for it.") from None
    except OSError as error:
        if error.errno is None:                  # one of ours, already a sentence
            raise
        raise OSError(f"{error.filename or folder}: {error.strerror}; what came is kept, and once "
                      "that is mended the same command goes on.") from error


def fetch_row(row: File, folder: Path, pauses: Sequence[float]) -> None:
    places, zipped = [folder / to for to in row.to.split()], row.url.endswith(".zip")
    path = folder / "archives" / row.url.split("/")[-1] if zipped else places[0]
    note = row.note.format(path, path.with_suffix(""))
    if not all(place.exists() for place in places):
        if not row.url:
            raise OSError(note)
        print(f"{path}  <-  {row.url}")
        if not path.exists():
            download(row, path, pauses)
        if zipped:
            unpack(path, places)
    for left in (Path(f"{path}.part"), Path(f"{path}.part.from"), *[path] * zipped):
        left.unlink(missing_ok=True)
    print(*(f"{place} is there" for place in places), *filter(None, [note]), sep="\n")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m tools.fetch", description="Fetches published files.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="what to fetch, see --list")
    parser.add_argument("--to", default="data", metavar="DIR", help="the data folder (data)")
    parser.add_argument("--list", action="store_true", help="print what there is, and its terms")
    args = parser.parse_args(argv)
    for row in FILES if args.list or not args.names else []:
        print(f"{row.names}: {row.size:,} MB, {row.licence}\n  {row.url or 'by request'}",
              *(f"\n    -> {Path(args.to) / place}" for place in row.to.split()), sep="")
    try:
        fetch(args.names, args.to)
    except (OSError, ValueError, KeyboardInterrupt) as error:
        why = str(error) or "stopped; what came is kept, and the same command goes on."
        raise SystemExit(f"data.py fetch: {why}") from None


if __name__ == "__main__":
    main()
