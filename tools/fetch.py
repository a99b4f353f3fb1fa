"""Where do the published annotations, pictures and checkpoints come from?

FILES is the whole answer for the eye: every address, what comes out of it, under which terms.

    python -m tools.fetch --list                            # names, sizes, terms, addresses, places
    python -m tools.fetch vqa caption                       # annotations, into datasets/
    python -m tools.fetch vqa-pictures bart-base --to DIR   # 20 GB of pictures, a checkpoint
    python -m pytest tests/test_fetch.py

curl does the work. A download grows as NAME.part, where the same command goes on after a cut. It
gets its name when its size and sha256 are right; then it is left alone.
"""
import argparse
import hashlib
import shutil
import subprocess
import zipfile
from pathlib import Path
from typing import NamedTuple

from support.gate import program, reading


class File(NamedTuple):
    """One file of the internet, and what is made of it."""
    names: str                       # the words of the command line that ask for it
    url: str                         # addresses, tried in turn; "": by hand only, the note says how
    to: str                          # its place; of a zip: places of files and folders called so
    size: int                        # MB, about; less than a tenth of it is some page, not the file
    licence: str
    exact: int = 0                   # bytes, where they are published
    sha256: str = ""
    note: str = ""                   # what is left to do; {0}: the place


VQA = "https://s3.amazonaws.com/cvmlp/vqa/mscoco/vqa/v2_"
# The certificate of COCO's own host does not bear its name, so its storage is asked over TLS first.
COCO = "https://s3.amazonaws.com/images.cocodataset.org/{0} http://images.cocodataset.org/{0}"
GQA = "https://downloads.cs.stanford.edu/nlp/data/gqa/"
NLVR = "https://raw.githubusercontent.com/lil-lab/nlvr/master/nlvr2/data/"
KARPATHY = "https://cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip"
RN101 = "8fa8567bab74a42d41c5915025a8e4538c3bdbe8804a470a72f30b0d94fab599"       # its sha256, too
OPENAI = "https://openaipublic.{}.net/clip/models/" + RN101 + "/RN101.pt"
BY, APACHE, MIT = "CC BY 4.0", "Apache-2.0", "MIT (OpenAI's CLIP)"
FLICKR = "each picture under its Flickr owner's terms"
FORM = ("NLVR2's pictures are given out by request only: fill in the form that "
        "https://github.com/lil-lab/nlvr/tree/master/nlvr2 names and put them into {0}.")
VALUE = ("VALUE's storage answers 409. Put into {0} by hand: tvqa from TVQA's archive, train and "
         "val of tvc from TVCaption, tv_subtitles.jsonl from TVRetrieval, val of how2qa and yc2c "
         "from VALUE's EvaluationTools.")
TORCHSCRIPT = ("{0} is TorchScript, that is code (its sha256 is OpenAI's): python -m tools.ask "
               "--clip {0} names the command that converts it.")


def hub(repo: str, file: str, size: int, licence: str, exact: int = 0, at: str = "main") -> File:
    """A file of a checkpoint on huggingface.co."""
    name = repo.split("/")[1]
    return File(f"{name} checkpoints", f"https://huggingface.co/{repo}/resolve/{at}/{file}",
                f"weights/{name}/{file}", size, licence, exact)


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
    File("caption", COCO.format("annotations/annotations_trainval2014.zip"),
         "COCO/captions_train2014.json COCO/captions_val2014.json", 253, BY, 252_872_794),
    File("caption-submit", COCO.format("annotations/image_info_test2014.zip"),
         "COCO/image_info_test2014.json", 1, BY, 763_464),
    File("gqa", GQA + "questions1.2.zip",
         "GQA/train_balanced_questions.json GQA/val_balanced_questions.json "
         "GQA/testdev_balanced_questions.json GQA/submission_all_questions.json", 1400, BY),
    File("nlvr", NLVR + "train.json", "nlvr/train.json", 60, BY),
    File("nlvr", NLVR + "dev.json", "nlvr/dev.json", 5, BY),
    File("nlvr", NLVR + "test1.json", "nlvr/test1.json", 5, BY),
    File("tvqa how2qa tvc yc2c", "", "video/ann", 300, "research", note=VALUE),
    File("vqa-pictures caption-pictures pictures", COCO.format("zips/train2014.zip"),
         "images/train2014", 13500, FLICKR),
    File("vqa-pictures caption-pictures pictures", COCO.format("zips/val2014.zip"),
         "images/val2014", 6600, FLICKR),
    File("vqa-submit-pictures", COCO.format("zips/test2015.zip"), "images/test2015", 12400, FLICKR),
    File("caption-submit-pictures", COCO.format("zips/test2014.zip"),
         "images/test2014", 6200, FLICKR),
    File("gqa-pictures pictures", GQA + "images.zip", "images/gqa/images", 20300,
         f"Visual Genome, CC BY 4.0; {FLICKR}"),
    File("nlvr-pictures pictures", "", "images/nlvr2", 15000, "research", note=FORM),
    hub("facebook/bart-base", "config.json", 0, APACHE),
    hub("facebook/bart-base", "tokenizer.json", 0, APACHE),
    hub("facebook/bart-base", "model.safetensors", 558, APACHE),
    hub("google-t5/t5-base", "config.json", 0, APACHE),
    hub("google-t5/t5-base", "tokenizer.json", 0, APACHE),
    hub("google-t5/t5-base", "model.safetensors", 892, APACHE, 891_646_390),
    hub("openai/clip-vit-base-patch32", "config.json", 0, MIT),
    hub("openai/clip-vit-base-patch32", "model.safetensors", 605, MIT, at="refs%2Fpr%2F66"),
    File("clip-rn101 checkpoints", f"{OPENAI.format('azureedge')} "
         f"{OPENAI.format('blob.core.windows')}", "weights/RN101.pt", 292, MIT, 291_791_292, RN101,
         TORCHSCRIPT),
]
# --retry waits for servers that are busy or away for a moment (1 + 2 + 4 + 8 s).
CURL = ("curl --fail --location --continue-at - --connect-timeout 30 --retry 4 --retry-connrefused "
        "--output").split()


def curl(url: str, part: Path) -> bool:
    """Brings `part` to its full length, going on with what is there; curl says why if it cannot."""
    before, have = -1, part.stat().st_size
    # A cut connection is gone on with, while bytes come. (--retry-all-errors would throw away what
    # came since curl was started, and ask again and again for what does not exist.)
    while have > before:
        print(f"{part}  <-  {url}", flush=True)
        if subprocess.run([*CURL, part, url]).returncode == 0:
            return True
        before, have = have, part.stat().st_size
    return False


def download(file: File, path: Path) -> None:
    """The file, complete and verified, under its name."""
    part = path.with_name(f"{path.name}.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    part.touch()
    with reading(path):
        assert any(curl(url, part) for url in file.url.split()), \
            f"curl says above why not: try again, at last without {part}, or put it there by hand"
        size = part.stat().st_size
        right = size == file.exact if file.exact else size >= file.size * 1e5
        if file.sha256:
            right = right and hashlib.sha256(part.read_bytes()).hexdigest() == file.sha256
        if not right:
            part.unlink()
        assert right, f"{size:,} bytes came that are not the published file; they were removed"
    part.rename(path)


def unpack(archive: Path, places: list[Path]) -> None:
    """Of a zip, the files and folders that are called like these places."""
    with reading(f"{archive} (delete it to fetch it again)"), zipfile.ZipFile(archive) as zipped:
        for place in places:
            part = place.with_name(f"{place.name}.part")
            shutil.rmtree(part, ignore_errors=True)      # what a kill left
            wanted = [name for name in zipped.namelist() if f"/{place.name}/" in f"/{name}/"]
            assert wanted, f"it holds no {place.name} any more: put {place} there by hand"
            # Compares every CRC-32, and stays below the folder whatever a member is called.
            zipped.extractall(part, wanted)
            min(part.rglob(place.name), key=lambda path: len(path.parts)).replace(place)
            shutil.rmtree(part)
    archive.unlink()


def fetch(file: File, folder: Path) -> None:
    """One row of the table, into the data folder; what is there already is left alone."""
    places = [folder / to for to in file.to.split()]
    missing = [place for place in places if not place.exists()]
    if missing and file.url.endswith(".zip"):
        archive = folder / "archives" / file.url.split("/")[-1]
        if not archive.exists():
            download(file, archive)
        print(f"unpacking {archive}")
        unpack(archive, missing)
    elif missing and file.url:
        download(file, places[0])
    if file.url:
        print(f"{file.to} is there")
    if file.note:
        print(file.note.format(places[0]))


@program
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m tools.fetch", description="Fetches by curl.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="what to fetch, see --list")
    parser.add_argument("--to", type=Path, default="datasets", help="the data folder (datasets)")
    parser.add_argument("--list", action="store_true", help="print what there is, and its terms")
    args = parser.parse_args(argv)
    known = dict.fromkeys(" ".join(file.names for file in FILES).split())
    with reading(" ".join(args.names)):
        assert known.keys() >= set(args.names), f"choose from {', '.join(known)}"
    for file in FILES:
        if args.list or not args.names:
            print(f"{file.names}: about {file.size:,} MB, {file.licence}\n  {file.url or 'by hand'}"
                  f"\n    -> {file.to}")
        elif not set(args.names).isdisjoint(file.names.split()):
            fetch(file, args.to)


if __name__ == "__main__":
    main()
