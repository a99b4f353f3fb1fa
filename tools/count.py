"""What does each row train?

    python -m tools.count                                          # BART-base, RN101's features
    python -m tools.count --lm t5-base --features 512              # ViT-B/32's of clips
    python -m tools.count --method vlpet-large --set decoder=none
    python -m tools.count --lm t5-large --batch 500                # and the memory that it takes

The model is built without weights, so this takes a second.
"""
import argparse
from dataclasses import replace

import torch
from torch import Tensor

import methods
import t5
from adapters import Method
from answers import AnswerHead
from data import Batch
from model import TASKS, VLModel, vocabulary
from support.gate import program, reading


def table(lm: str, width: int, rows: dict[str, Method], tasks: tuple[str, ...] = TASKS,
          answers: int = 0) -> list[tuple[str, int, int]]:
    """(name, trainable, total) of rows, on a language model of a published size and visual
    features of a width. tasks: for rows with a module for each. answers: of one head."""
    model, counts = build(lm, width, answers), []
    for name, method in rows.items():
        _, trainable, total = model.install(method, tasks)[-1]
        counts.append((name, trainable, total))
        model.remove()
    return counts


def build(lm: str, width: int, answers: int = 0) -> VLModel:
    config = t5.PRESETS[lm]
    with torch.device("meta"):                                   # shapes without numbers
        heads = {}
        if answers:
            listed = [str(i) for i in range(answers)]
            heads["answers"] = AnswerHead(config.d, config.eps, listed, "ce")
            config = replace(config, layers=(config.layers[0], 0))
        lm = t5.EncoderDecoder(replace(config, vocab=vocabulary(config)))
        return VLModel(lm, width, answers=heads)


def kept(model: VLModel, task: str, B: int, F: int, L: int = 20, N: int = 36, T: int = 6) -> int:
    """Bytes that a training step keeps for its backward pass beside the parameters: of B texts of
    L tokens of a task, about a picture of N features (N, F), with answers of T tokens."""
    with model.lm.shared.weight.device:
        ids, place, labels = (torch.full((B, n), 5) for n in (L, N, T))
        batch = Batch((task,) * B, ids, torch.zeros(B, N, F), torch.zeros(B, N, 4), 0 * place,
                      place, None, labels, torch.ones(B))
    parameters = {p.untyped_storage()._cdata for p in model.parameters()}
    found = {}

    def keep(tensor: Tensor) -> Tensor:
        memory = tensor.untyped_storage()               # that of views is counted once
        if memory._cdata not in parameters:
            found[memory._cdata] = tensor, memory.nbytes()
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model.loss(batch)
    assert loss.requires_grad
    return sum(size for _, size in found.values())


@program
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="The table of methods and what each one trains.")
    parser.add_argument("--lm", default="bart-base", choices=t5.PRESETS)
    parser.add_argument("--features", type=int, default=2048, help="width of the visual features")
    parser.add_argument("--tasks", default=",".join(TASKS), help="comma between them")
    parser.add_argument("--answers", type=int, default=0, help="answers to choose among, of a head")
    parser.add_argument("--batch", type=int, default=0, help="examples of a training step: its "
                                                             "memory, too")
    parser.add_argument("--method", default="", help="this row alone")
    parser.add_argument("--set", default="", dest="changes", help="of --method, as in train.py")
    args = parser.parse_args(argv)
    is_t5 = t5.PRESETS[args.lm].is_t5
    names = [args.method] if args.method else methods.methods(is_t5)
    rows = {name: methods.row(name, is_t5, args.changes) for name in names}
    with reading("the settings"):
        tasks = tuple(args.tasks.split(","))
        assert not args.batch or t5.PRESETS[args.lm].layers[1] and not args.answers, \
            "--batch is for models that write their answers"
        counts = table(args.lm, args.features, rows, tasks, args.answers)
    head = f"{'row':20} {'trainable':>12} {'total':>12} {'%':>8}"
    if args.batch:
        print("MiB in fp32: weights, gradients and AdamW's two moments of what is trained, what a "
              f"step of {args.batch} keeps, the adapter file")
        head += f" {'weights':>9} {'training':>9} {'kept':>9} {'file':>9}"
    print(f"{head}  h'" + (" before --set" if args.changes else ""))
    for name, trainable, total in counts:
        line = f"{name:20} {trainable:12,} {total:12,} {100 * trainable / total:8.4f}"
        if args.batch:
            model = build(args.lm, args.features)
            model.install(rows[name], tasks)
            memory = kept(model.train(), tasks[0], args.batch, args.features)
            sizes = 4 * total, 12 * trainable, memory, 4 * trainable
            line += "".join(f" {size / 2**20:9,.0f}" for size in sizes)
        print(f"{line}  {rows[name].formula}")


if __name__ == "__main__":
    main()
