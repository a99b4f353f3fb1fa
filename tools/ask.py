"""What does a trained run say about your own picture?

    python -m tools.ask                                              # a scene of the built-in world
    python -m tools.ask --run out/vlpet-large --image photo.jpg "what is on the table?"
    python -m tools.ask --run out/vlpet-large --image photo.jpg --task caption
    python -m tools.ask --image left.jpg --image right.jpg --task nlvr "both pictures show a dog"

From the raw picture to the answer: CLIP's features, the frozen language model with what the run
trained, the answer with its probability and the five best beams. Without --run it is the tiny run
of weights/tiny-vlpet, which knows drawn shapes and nothing else.
"""
import argparse
import sys
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from random import Random

import torch

import data
import train
from support import weights
from world import scenes as world
from support.features import Pixels

TINY = "weights/tiny-vlpet"


class Seen(Pixels):
    """Pictures that CLIP has looked at already: for runs whose model holds no CLIP."""

    @torch.no_grad()
    def stack(self, ids: list[str]) -> torch.Tensor:
        return self.tower.eval().encode(super().stack(ids))                     # P, N, F


def answers(m, tok, example: data.Example, features, config: train.Config,
            beams: int = 5) -> list[tuple[str, float]]:
    """The best answers and their probabilities: nlvr's two, else those of `beams` beams, in the
    order of log p / length."""
    batch = train.collate([example], tok, features, config)
    m.eval()
    if data.TASKS[example.task].decode == "choice":
        p = m.choose(batch, train.choice_tokens(tok))[0].tolist()
        return sorted(zip(data.CHOICES, p), key=lambda found: -found[1])
    text, logp = m.beams(batch, beams)
    found = {}                                  # spellings that differ in blanks are one answer
    for row, p in zip(text[0].tolist(), logp[0].exp().tolist()):
        words = train.answer_text(tok, row).strip()
        found[words] = found.get(words, 0.0) + p
    return list(found.items())


def built_in(task: str, seed: int) -> tuple[dict[str, BytesIO], str, str]:
    """Pictures, question and right answer of an example of the built-in world; says what they
    show."""
    r = Random(seed)
    item, pictures = world.example(task, r, True), {}
    for i, scene in enumerate(item.scenes):
        print("scene: " + ", ".join(world.describe(scene)))
        world.render(scene, r).save(pictures.setdefault(f"scene {i}", BytesIO()), "png")
    return pictures, item.text, item.answer


def run(args: argparse.Namespace) -> None:
    needed = 2 if args.task == "nlvr" else 1
    if args.image and len(args.image) != needed:
        raise ValueError(f"{args.task} looks at {needed} picture{'s' * (needed - 1)}: give --image "
                         f"{needed} time{'s' * (needed - 1)}, not {len(args.image)}")
    if args.task == "caption" and args.question:
        raise ValueError("a caption needs no question")
    if args.image and not args.question and args.task != "caption":
        raise ValueError(f"{args.task} needs a question or statement behind the flags")
    config, right = train.read_run(args.run, device=""), ""
    if args.image:
        pictures = {f"{i} {path}": Path(path) for i, path in enumerate(args.image)}
        question = args.question
    else:
        pictures, question, right = built_in(args.task, args.seed)
        if args.question:
            question, right = args.question, ""
    if args.clip:
        config = replace(config, clip=args.clip)
    features = (Pixels if config.features == "none" else Seen)(train.load_tower(config), pictures)
    trained = Path(args.run) / "adapter.safetensors"
    held, features = weights.read(trained), {args.task: features}
    train.check_tower(held.metadata, features, "give its path as --clip")
    m, tok = train.build(config, features, held)
    m.load_trained(trained)
    example = data.Example(args.task, 0, question, tuple(pictures), {})
    found = answers(m, tok, example, features, config)
    print(f"{args.task}: {question}".rstrip(": ") + f"   (right: {right})" * bool(right))
    for text, p in found:
        print(f"{100 * p:6.1f} %  {text}")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Asks a trained run about a picture.")
    parser.add_argument("question", nargs="?", default="", help="or NLVR2's statement")
    parser.add_argument("--run", default=TINY, help=f"run folder of train.py; default {TINY}")
    parser.add_argument("--clip", default="", help="where the run's CLIP is now")
    parser.add_argument("--image", action="append", default=[], help="twice for nlvr; none: a "
                        "scene of the built-in world")
    parser.add_argument("--task", default="vqa", choices=world.TASKS)
    parser.add_argument("--seed", type=int, default=0, help="of the built-in scene")
    try:
        run(parser.parse_args(argv))
    except (ValueError, OSError) as error:
        sys.exit(f"ask.py: {error}")
    except KeyboardInterrupt:
        sys.exit("ask.py: interrupted")


if __name__ == "__main__":
    main()
