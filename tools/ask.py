"""What does a trained run say about your own picture?

    python -m tools.ask                                              # a scene of the built-in world
    python -m tools.ask --run out/vlpet-large --image photo.jpg "what is on the table?"
    python -m tools.ask --run out/vlpet-large --image photo.jpg --task caption
    python -m tools.ask --image left.jpg --image right.jpg --task nlvr "both show a dog"

From the raw picture to the answer: CLIP's features, the frozen language model with what the run
trained, the answer with its probability and the five best beams. Without --run it is the tiny run
of weights/tiny-vlpet, which knows drawn shapes and nothing else.

    python -m pytest tests/test_ask.py
"""
import argparse
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from random import Random

import train
from config import task_list
from data import ANSWERS, TASKS, Example
from support import runs
from support.gate import program, reading
from world import scenes


def answers(run: runs.Run, example: Example, beams: int = 5) -> list[tuple[str, float]]:
    """The best answers and their probabilities, the likeliest first: nlvr's two, or the beams'; of
    answers that are chosen, the five best."""
    run.model.eval()
    batch, found = train.collate(run, [example]), {}
    if run.model.answers:
        head = run.model.head(batch)
        p, best = head.probabilities(run.model(batch))[0].topk(min(5, len(head.vocabulary)))
        found = {head.vocabulary[i]: chance for i, chance in zip(best.tolist(), p.tolist())}
    elif TASKS[example.task].decode == "choice":
        p = run.model.choose(batch, train.choice_tokens(run.tokenizer))[0].tolist()
        found = dict(zip(ANSWERS, p))
    else:
        texts, logp = run.model.beams(batch, beams)
        for ids, p in zip(texts[0].tolist(), logp[0].exp().tolist()):
            # Spellings that differ in blanks are one answer.
            answer = train.answer_text(run.tokenizer, ids).strip()
            found[answer] = found.get(answer, 0.0) + p
    return sorted(found.items(), key=lambda item: -item[1])


def built_in(task: str, seed: int) -> tuple[dict[str, BytesIO], str, str]:
    """Pictures, question and right answer of the built-in world; prints what they show."""
    generator = Random(seed)
    item, pictures = scenes.example(task, generator, True), {}
    for i, scene in enumerate(item.scenes):
        print("scene: " + ", ".join(scenes.describe(scene)))
        pictures[f"scene {i}"] = BytesIO()
        scenes.render(scene, generator).save(pictures[f"scene {i}"], "png")
    return pictures, item.text, item.answer


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
    args = parser.parse_args(argv)
    config, question = runs.read_config(args.run, device=""), args.question
    with reading(args.run):
        known, needed = task_list(config), 2 if args.task == "nlvr" else 1
        assert args.task in known, f"it was trained on {', '.join(known)}, not on {args.task}"
        assert len(args.image) in (0, needed), f"{args.task} needs --image {needed} x"
        assert args.image or args.task in scenes.TASKS, f"{args.task} needs a picture: give --image"
        if args.image or question:
            assert bool(question) == (args.task != "caption"), \
                "a caption needs no question, every other task one, behind the flags"
    pictures, right = {f"{i} {path}": Path(path) for i, path in enumerate(args.image)}, ""
    if not args.image:
        pictures, text, answer = built_in(args.task, args.seed)
        if not question:
            question, right = text, f"   (right: {answer})"
    if args.clip:
        config = replace(config, clip=args.clip)
    path = Path(config.out) / "adapter.safetensors"
    held = runs.read(path)
    run = train.setup(config, held, pictures)
    runs.load_trained(run, held, path, ("device",))
    print(f"{args.task}: {question}".rstrip(": ") + right)
    for text, p in answers(run, Example(args.task, 0, question, tuple(pictures), {})):
        print(f"{100 * p:6.1f} %  {text}")


if __name__ == "__main__":
    main()
