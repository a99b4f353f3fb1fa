"""Can a run learn a data set that nobody here made?

easy-vqa 1.0 (by Victor Zhou, MIT) is a Python package that holds 5,000 pictures of one shape each,
64 x 64 pixels, and 48,248 questions about shape and colour. This program writes them in VL-T5's
format, which the task `vqa` reads, and says how far one gets without looking at a picture.

    pip install easy-vqa
    python -m examples.easy_vqa --to datasets/easyvqa
    python train.py --data datasets/easyvqa --tasks vqa --batch 64 --lr 3e-3 --epochs 3
    python -m pytest tests/test_examples.py
"""
import argparse
import json
import shutil
from collections import Counter, defaultdict
from importlib.util import find_spec
from pathlib import Path

from support.gate import program, read_text, reading, replace_file

VAL = 200                          # easy-vqa has no val: its last training pictures become one


def find_package() -> Path:
    """The folder data/ of the installed package, which is found but not imported."""
    spec = find_spec("easy_vqa")
    with reading("easy-vqa"):
        assert spec is not None, "this package brings the pictures: pip install easy-vqa"
    return Path(spec.origin).parent / "data"


def read_part(source: Path, part: str) -> dict[int, list[dict]]:
    """The questions of data/train or data/test, by picture: a list of [text, answer, picture]."""
    path = source / part / "questions.json"
    pictures = defaultdict(list)
    with reading(path):
        for number, (text, answer, picture) in enumerate(json.loads(read_text(path))):
            # Both parts number their pictures from 0; here an id is a file's name: "test_0".
            pictures[picture].append({"question_id": number, "img_id": f"{part}_{picture}",
                                      "sent": text, "label": {answer: 1.0}})
    return pictures


def write(source: Path, to: Path) -> dict[str, list[dict]]:
    """Writes vqa/karpathy_{train,val,test}.json and images/; returns the questions by split."""
    splits = {"train": [], "val": [], "test": []}
    (to / "images").mkdir(parents=True, exist_ok=True)
    for part in ("train", "test"):
        pictures = read_part(source, part)
        for place, (picture, questions) in enumerate(pictures.items()):
            # The cut lies between two pictures: no picture of val is one of train.
            is_val = part == "train" and place >= len(pictures) - VAL
            splits["val" if is_val else part] += questions
            shutil.copyfile(source / part / "images" / f"{picture}.png",
                            to / "images" / f"{part}_{picture}.png")
    for split, questions in splits.items():
        replace_file(to / "vqa" / f"karpathy_{split}.json", json.dumps(questions))
    return splits


def blind_scores(train: list[dict], test: list[dict]) -> tuple[float, float]:
    """Per cent of `test` right without a picture: by the commonest answer of `train`; and by its
    commonest answer to the same question, the best that a model can do that reads but is blind."""
    overall, by_text = Counter(), defaultdict(Counter)
    for question in train:
        (answer,) = question["label"]
        overall[answer] += 1
        by_text[question["sent"]][answer] += 1
    ((commonest, _),) = overall.most_common(1)
    right, right_by_text = 0, 0
    for question in test:
        guess = commonest
        if question["sent"] in by_text:
            ((guess, _),) = by_text[question["sent"]].most_common(1)
        right += commonest in question["label"]
        right_by_text += guess in question["label"]
    return 100 * right / len(test), 100 * right_by_text / len(test)


@program
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m examples.easy_vqa", description="easy-vqa as vqa")
    parser.add_argument("--to", required=True, type=Path, metavar="DIR", help="folder to write to")
    args = parser.parse_args(argv)
    splits = write(find_package(), args.to)
    for split, questions in splits.items():
        pictures = {question["img_id"] for question in questions}
        print(f"{split:5} {len(questions):6,} questions about {len(pictures):5,} pictures")
    commonest, best = blind_scores(splits["train"], splits["test"])
    print(f"test without pictures: the commonest answer scores {commonest:.1f}, "
          f"the commonest answer to each question {best:.1f}")


if __name__ == "__main__":
    main()
