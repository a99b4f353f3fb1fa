"""What does each row train?

    python -m tools.count                                          # BART-base, RN101's features
    python -m tools.count --lm t5-base --features 512              # ViT-B/32's of clips
    python -m tools.count --method vlpet-large --set decoder=none

The model is built without weights, so this takes a second.
"""
import argparse
from dataclasses import replace

import torch

import methods
import t5
from adapters import Method
from answers import AnswerHead
from model import TASKS, VLModel, vocabulary
from support.gate import program, reading


def table(lm: str, width: int, rows: dict[str, Method], tasks: tuple[str, ...] = TASKS,
          answers: int = 0) -> list[tuple[str, int, int]]:
    """(name, trainable, total) of rows, on a language model of a published size and visual
    features of a width. tasks: for rows with a module for each. answers: of one head."""
    config, counts = t5.PRESETS[lm], []
    with torch.device("meta"):                                   # shapes without numbers
        heads = {}
        if answers:
            listed = [str(i) for i in range(answers)]
            heads["answers"] = AnswerHead(config.d, config.eps, listed, "ce")
            config = replace(config, layers=(config.layers[0], 0))
        lm = t5.EncoderDecoder(replace(config, vocab=vocabulary(config)))
        model = VLModel(lm, width, answers=heads)
        for name, method in rows.items():
            _, trainable, total = model.install(method, tasks)[-1]
            counts.append((name, trainable, total))
            model.remove()
    return counts


@program
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="The table of methods and what each one trains.")
    parser.add_argument("--lm", default="bart-base", choices=t5.PRESETS)
    parser.add_argument("--features", type=int, default=2048, help="width of the visual features")
    parser.add_argument("--tasks", default=",".join(TASKS), help="comma between them")
    parser.add_argument("--answers", type=int, default=0, help="answers to choose among, of a head")
    parser.add_argument("--method", default="", help="this row alone")
    parser.add_argument("--set", default="", dest="changes", help="changes, as in train.py --help")
    args = parser.parse_args(argv)
    is_t5 = t5.PRESETS[args.lm].is_t5
    names = [args.method] if args.method else methods.methods(is_t5)
    rows = {name: methods.row(name, is_t5, args.changes) for name in names}
    with reading("the settings"):
        counts = table(args.lm, args.features, rows, tuple(args.tasks.split(",")), args.answers)
    print(f"{'row':20} {'trainable':>12} {'total':>12} {'%':>8}  h'")
    for name, trainable, total in counts:
        share = 100 * trainable / total
        print(f"{name:20} {trainable:12,} {total:12,} {share:8.4f}  {rows[name].formula}")


if __name__ == "__main__":
    main()
