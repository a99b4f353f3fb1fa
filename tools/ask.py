"""What does a trained run say about your own picture?

    python -m tools.ask                                              # a scene of the built-in world
    python -m tools.ask --run out/vlpet-large --image photo.jpg "what is on the table?"
    python -m tools.ask --run out/vlpet-large --image photo.jpg --task caption
    python -m tools.ask --image left.jpg --image right.jpg --task nlvr "both show a dog"
    python -m tools.ask --report                                     # with a page of the gates

From the raw picture to the answer: CLIP's features, the frozen language model with what the run
trained, the answer with its probability and the five best beams. Without --run it is the tiny run
of weights/tiny-vlpet, which knows drawn shapes and nothing else. A scene that it draws, and the
page of --report, are kept in out/ask.

    python -m pytest tests/test_ask.py
"""
import argparse
import sys
from dataclasses import replace
from pathlib import Path
from random import Random

from config import task_list
from data import TASKS, Example
from support import runs
from support.gate import program, reading, replace_file
from tools.report import answers, asked_page, load, look
from world import scenes

FOLDER = Path("out/ask")


def built_in(task: str, seed: int) -> tuple[list[Path], str, str]:
    """Pictures, question and right answer of the built-in world; prints what they show."""
    generator = Random(seed)
    item, paths = scenes.example(task, generator, True), []
    FOLDER.mkdir(parents=True, exist_ok=True)
    for i, scene in enumerate(item.scenes):
        paths.append(FOLDER / f"{task}-{seed}-{i}.png")
        scenes.render(scene, generator).save(paths[-1])
        print(f"scene: {', '.join(scenes.describe(scene))}   ({paths[-1]})")
    return paths, item.text, item.answer


@program
def main(argv: list[str] | None = None) -> None:
    still = [task for task in TASKS if not TASKS[task].clips]
    parser = argparse.ArgumentParser(description="Asks a trained run about a picture.")
    parser.add_argument("question", nargs="?", default="", help="or NLVR2's statement")
    parser.add_argument("--run", default="weights/tiny-vlpet", help="run folder of train.py")
    parser.add_argument("--clip", default="", help="where the run's CLIP is now")
    parser.add_argument("--image", action="append", default=[], help="none: a built-in scene")
    parser.add_argument("--task", default="vqa", choices=still)
    parser.add_argument("--seed", type=int, default=0, help="of the built-in scene")
    parser.add_argument("--report", action="store_true", help="also write a page, with the gates")
    args = parser.parse_args(argv)
    with reading("the question"):
        args.question.encode()                              # bytes of a terminal may be no text
    config, question, right = runs.read_config(args.run, device=""), args.question, ""
    with reading(args.run):
        known, needed = task_list(config), 2 if args.task == "nlvr" else 1
        assert args.task in known, f"it knows --task {', '.join(known)}, not {args.task}"
        assert len(args.image) in (0, needed), f"{args.task} needs --image {needed} x"
        assert args.image or args.task in scenes.TASKS, f"{args.task} needs a picture: give --image"
        if args.image or question:
            assert bool(question) == (args.task != "caption"), \
                "a caption needs no question, every other task one, behind the flags"
    paths = list(map(Path, args.image))
    if not args.image:
        paths, text, answer = built_in(args.task, args.seed)
        if not question:
            question, right = text, answer
    pictures = {f"{i} {path}": path for i, path in enumerate(paths)}
    if args.clip:
        config = replace(config, clip=args.clip)
    if args.image and Path(config.clip).name == "tiny-clip":
        print("note: the tiny CLIP has seen drawn shapes only; of a photo it knows nothing",
              file=sys.stderr)
    run = load(config, pictures)
    example = Example(args.task, 0, question, tuple(pictures), {})
    said = f"{args.task}: {question}".rstrip(": ")
    print(f"{said}   (right: {right})" if right else said)
    for text, p in answers(run, example):
        print(f"{100 * p:6.1f} %  {text}")
    if args.report:
        path = FOLDER / f"{paths[0].stem}.html"
        replace_file(path, asked_page(run, look(run, example, pictures), right))
        print(f"page: {path}")


if __name__ == "__main__":
    main()
