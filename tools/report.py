"""What did a run learn, and where? Pages to look at.

    python -m tools.report out/vlpet-large                 # out/vlpet-large/report.html
    python -m tools.report out/adapter out/vlpet-large     # out/report.html: the two side by side
    python -m tools.ask --report                           # a page about one picture
    python -m pytest tests/test_report.py

A page is one file that asks the network for nothing. Of one run it shows settings, scores, learning
curves, answers right and wrong, and of VL-PET's rows the gates G of the encoder; of several runs
score against share of parameters trained (the papers' first figure), and the sizes of G in turn.

Axes: S encoder tokens, of which the last N are the picture's or the clip's; D width.
"""
import argparse
import json
import math
import os
import re
from collections import Counter, defaultdict
from html import escape
from pathlib import Path
from random import Random
from statistics import mean, stdev
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageSequence
from torch import Tensor

import data
import train
from adapters import GATES
from clip_encoder import MEAN, STD, pixels
from config import Config, task_list
from data import TASKS, Example
from support import readers, runs, submit
from support.gate import program, read_json, read_text, reading, replace_file
from support.page import (bar, cards, chart, chips, figure, heat, inline, legend, matrix, page,
                          scale, strip, table)
from support.pictures import FORMATS, FRAMES, frame_files, list_clips, list_files, nfc
from support.runs import ADAPTER, Run


# ------------------------------------------------------------------------- what there is to see

def files(config: Config) -> dict[str, Path]:
    """Id -> file of all pictures and clips of a run, as far as they are still there."""
    found, clips = {}, {TASKS[task].clips for task in task_list(config)}
    if False in clips and os.path.isdir(config.images):
        found |= list_files(config.images)
    if True in clips and os.path.isdir(config.clips):
        found |= list_clips(config.clips)
    return found


def frames(path: Path, resize: str) -> list[Image.Image]:
    """A picture, or a clip's frames, cut or stretched as CLIP sees them."""
    seen = []
    with reading(path):
        if path.is_dir():
            images = [Image.open(file, formats=FORMATS) for file in frame_files(path)]
        else:
            images = ImageSequence.Iterator(Image.open(path, formats=FORMATS))
        for image in images:
            x = pixels(image, 144, resize).permute(1, 2, 0).numpy() * STD + MEAN
            seen.append(Image.fromarray((255 * x).round().clip(0, 255).astype(np.uint8)))
    return seen


# ------------------------------------------------------------------------- a run looks at something

class Look(NamedTuple):
    """What a run makes of one example."""
    example: Example
    answers: list[tuple[str, float]]     # with their probabilities, the likeliest first
    gates: dict[str, np.ndarray]         # "layer 1, behind self-attention" -> G (S, D)
    words: list[str]                     # the encoder's text
    visual: int                          # N
    tiles: list[tuple]                   # (picture or None, rows, columns) of the visual tokens


# Where VL-PET's gates stand; of a row with a module for each task, behind the task's name.
GATE = re.compile(r"lm\.encoder\.blocks\.(\d+)\.(self_attn|ffn)\.tune(?:\.\w+)?\.gate")
SITES = {"self_attn": "self-attention", "ffn": "feed-forward"}


def load(config: Config, pictures: dict | None = None) -> Run:
    """A finished run; with pictures (id -> file) it looks at these, not at its data's."""
    path = Path(config.out) / ADAPTER
    held = runs.read(path)
    run = train.setup(config, held, pictures)
    runs.load_trained(run, held, path, ("device",))
    return run


def answers(run: Run, example: Example, beams: int = 5) -> list[tuple[str, float]]:
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
        found = dict(zip(data.ANSWERS, p))
    else:
        texts, logp = run.model.beams(batch, beams)
        for ids, p in zip(texts[0].tolist(), logp[0].exp().tolist()):
            # Spellings that differ in blanks are one answer.
            answer = train.answer_text(run.tokenizer, ids).strip()
            found[answer] = found.get(answer, 0.0) + p
    return sorted(found.items(), key=lambda item: -item[1])


@torch.no_grad()
def look(run: Run, example: Example, held: dict) -> Look:
    """Asks a run about an example, and notes every G on the way. held: id -> picture or clip."""
    gates, hooks = {}, []

    def note(gate: torch.nn.Module, inputs: tuple, G: Tensor) -> None:
        x = inputs[0]                                                       # 1, S, D
        gates[names[gate]] = G.expand_as(x)[0].float().cpu().numpy()        # S, D

    names = {}
    for name, module in run.model.named_modules():
        found = GATE.fullmatch(name)
        if found:
            names[module] = f"layer {int(found[1]) + 1}, behind {SITES[found[2]]}"
            hooks.append(module.register_forward_hook(note))
    best = answers(run, example)
    for hook in hooks:
        hook.remove()
    batch, tokenizer = train.collate(run, [example]), run.tokenizer
    words = [tokenizer.decode([i]).strip() or tokenizer.tokens[i]
             for i in batch.input_ids[0].tolist()]
    return Look(example, best, gates, words, batch.order_ids.size(1), tiles(run, example, held))


def tiles(run: Run, example: Example, held: dict) -> list[tuple]:
    """(picture or None, rows, columns) in the order of the visual tokens: a clip's frames are
    pictures of one cell."""
    seen, found = run.features[example.task], []
    for name in example.images:
        shown = [None]
        path = held.get(name) or held.get(nfc(name))
        if path:
            shown = frames(path, seen.settings.get("resize", "stretch"))
        if TASKS[example.task].clips:
            found += [(image, 1, 1) for image in shown[::math.ceil(len(shown) / FRAMES)]]
        else:
            found.append((shown[0], *seen.grids([name])[0]))
    return found


# ------------------------------------------------------------------------- the gates

SIZES = {
    "large": "one number for each token and channel, so rows and columns of the matrix differ",
    "middleX": "one number a token, so the matrix has stripes from left to right",
    "middleY": "one number a channel, so the matrix has stripes from top to bottom, and over a "
               "picture it has one colour",
    "small": "one number for the whole example, so all is of one colour"}


def over_picture(seen: Look, G: np.ndarray, low: float, high: float) -> str:
    """The mean over channels of each visual token, as a colour on its place in the picture."""
    left, shown = G.mean(1)[len(G) - seen.visual:], []
    for image, rows, columns in seen.tiles:
        values, left = left[:rows * columns], left[rows * columns:]
        if len(values) == rows * columns:                  # a control hides frames
            shown.append(heat(image, values.reshape(rows, columns), low, high))
    return strip(shown)


def over_words(seen: Look, G: np.ndarray, low: float, high: float) -> str:
    """The same of the words."""
    last = len(G) - seen.visual
    return chips(seen.words, G.mean(1)[last - len(seen.words):last], low, high)


def bounds(gates: list[np.ndarray]) -> tuple[float, float]:
    """The least and the greatest mean over channels."""
    means = np.concatenate([G.mean(1) for G in gates])
    return float(means.min()), float(means.max())


def gates(seen: Look, size: str) -> str:
    """G of each encoder layer and site: over the picture, over the words, as a matrix."""
    if not seen.gates:
        return ""
    low, high = bounds(list(seen.gates.values()))
    shown = [f"<h3>{where}</h3>{over_picture(seen, G, low, high)}"
             f"{over_words(seen, G, low, high)}{matrix(G)}" for where, G in seen.gates.items()]
    return figure(
        "What the gates let through",
        "<p>On picture and words lies the mean of G over its channels, in the same colours "
        f"everywhere:</p>{scale(low, high)}<p>Below it lies G itself, a row a token (the text's, "
        f"then the picture's), a column a channel, in colours from its least to its greatest "
        f"number.</p>{cards(shown)}",
        "G multiplies what a frozen layer and its adapter say, so it decides how much of that goes "
        f"on: at 0 nothing, at 1 all. Here it is {SIZES.get(size, 'a row of your own')}.")


# ------------------------------------------------------------------------- a finished run

class Done(NamedTuple):
    """What a run left in its folder."""
    config: Config
    results: dict
    log: list[dict]

    @property
    def share(self) -> float:
        return 100 * self.results["trainable"] / self.results["total"]

    def scores(self) -> dict[str, float]:
        """The headline of each task."""
        return {task: next(iter(found.values())) for task, found in self.results.items()
                if task in TASKS}


def read_run(folder: str) -> Done:
    config = runs.read_config(str(folder), device="")
    path = Path(config.out) / "results.json"
    with reading(path):
        assert path.exists(), "this run is not finished: go on with python train.py --resume RUN"
        log = read_text(path.with_name("log.jsonl")).splitlines()
        return Done(config, read_json(path), [json.loads(line) for line in log])


def read_answers(done: Done, task: str, examples: list[Example]) -> list[str]:
    name = submit.plain_name(task, done.results["split"])
    path = Path(done.config.out) / "predictions" / f"{name}.json"
    with reading(path):
        said = {line["id"]: line["answer"] for line in json.loads(read_text(path))}
        return [said[example.id] for example in examples]


def question_types(done: Done, task: str) -> dict:
    """Question id -> its type, where the data tells, as the built-in data does."""
    def typed(record: object) -> tuple | None:
        if isinstance(record, dict) and "question_type" in record:
            return record.get("question_id", record.get("identifier")), record["question_type"]

    folder = Path(done.config.data)
    with reading(folder):
        _, paths = readers.find_files(TASKS[task].layouts, done.results["split"], folder)
    return dict(readers.records(paths, typed, lines=True))


def by_type(task: str, examples: list[Example], said: list[str], types: dict) -> str:
    """A bar for each type of question, else for its first two words; a mark where the commonest
    right answer alone would be."""
    groups, bars, metric = defaultdict(list), [], TASKS[task].metric
    for example, answer in zip(examples, said):
        kind = types.get(example.id) or " ".join(example.text.split()[:2])
        groups[kind].append((example, answer))
    for kind, pairs in sorted(groups.items(), key=lambda item: -len(item[1]))[:16]:
        asked, told = map(list, zip(*pairs))
        common = Counter(map(right_answer, asked)).most_common(1)[0][0]
        (score, *_), (mark, *_) = (metric(answers, asked).values()
                                   for answers in (told, [common] * len(asked)))
        bars.append((score, bar(f"{kind} ({len(asked)})", f"{score:.1f}", score, mark)))
    return f"<h3>{task}</h3>{''.join(each for _, each in sorted(bars, reverse=True))}"


def question(example: Example) -> str:
    """A caption's text is empty, or the seconds that are to be described."""
    if re.search("[a-z]", example.text, re.IGNORECASE):
        return example.text
    return f"What is to be seen? {example.text}".strip()


def right_answer(example: Example) -> str:
    return max(example.targets, key=example.targets.get, default="")


def score(example: Example, answer: str) -> float:
    """How good one answer is, to 100: of a caption ROUGE-L, for CIDEr needs a whole split."""
    scores = TASKS[example.task].metric([answer], [example])
    return scores.get("rouge_l", next(iter(scores.values())))


def picked(examples: list[Example], said: list[str]) -> list[tuple[Example, str]]:
    """Two of the best and two of the worst answers, of 500 drawn ones: the same ones every time."""
    pairs = Random(0).sample([*zip(examples, said)], min(500, len(said)))
    pairs.sort(key=lambda pair: -score(*pair))
    return [*pairs[:2], *pairs[2:][-2:]]


def card(seen: Look, said: str | None = None, right: str = "") -> str:
    """A picture with question, right answer, what was said, and the likeliest answers."""
    parts, example = [], seen.example
    parts.append(strip([inline(image, "what is shown") for image, *_ in seen.tiles if image]))
    parts.append(f"<p><b>{escape(question(example))}</b></p>")
    if example.context:
        parts.append(f'<p class="soft">subtitles: {escape(example.context)}</p>')
    if right:
        parts.append(f"<p>right: {escape(right)}</p>")
    if said is not None:                                   # it may be no word at all
        good = score(example, said)
        kind, sign = "wrong", "&#10007;"
        if good >= 50:                                     # of a caption half of the words
            kind, sign = ("right", "&#10003;") if good >= 90 else ("soft", "&#8776;")
        parts.append(f'<p class="{kind}">{sign} said: {escape(said)} ({good:.0f} of 100)</p>')
    parts += [bar(answer, f"{100 * p:.1f} %", 100 * p) for answer, p in seen.answers if p > 5e-4]
    return "".join(parts)


# ------------------------------------------------------------------------- the pages

def settings(done: Done, formula: str) -> str:
    c, results = done.config, done.results
    shown = {"row": f"{c.method} {c.set}", "h'": formula, "tasks": c.tasks, "data": c.data,
             "control": c.control, "language model": c.lm, "CLIP": c.clip,
             "steps": f"{done.log[-1]['step']:,}, a batch of vqa holds {c.batch}",
             "learning rate": f"{c.lr:g} at its highest", "seed": f"{c.seed}",
             "trained": f"{results['trainable']:,} of {results['total']:,} parameters",
             "tested on": f"split {results['split']}", "time": f"{results['seconds']:.0f} s"}
    rows = [[name, value] for name, value in shown.items() if value.strip()]
    return figure("What was trained", table(["setting", "here"], rows),
                  "All that follows hangs on these; the same settings and seed give the same run.")


def learning(shown: dict[str, Done]) -> str:
    """Of each task the training loss and, where it was scored, the validation."""
    parts = []
    for name, field in ("loss", "loss"), ("validation score", "validation"):
        curves = {}                                        # task -> run -> points
        for run, done in shown.items():
            for line in done.log:
                for task, value in line.get(field, {}).items():
                    lines = curves.setdefault(task, {})
                    lines.setdefault(run, []).append((line["step"], value, 0.0))
        for task, lines in curves.items():
            parts.append(f"<h3>{task}</h3>{chart(lines, 'step', name)}")
    return figure("How it was learned", legend([*shown]) + cards(parts, "plots"),
                  "A curve that still falls at its end asks for more steps; losses of different "
                  "tasks cannot be compared, those of different runs can.")


def asked_page(run: Run, seen: Look, right: str = "") -> str:
    """The page of one picture and question (tools/ask.py)."""
    c = run.config
    return page(
        question(seen.example), f"{escape(c.method)} was asked ({c.out}).",
        figure("What it answers", cards([card(seen, right=right)]),
               "A bar is the probability of a whole answer; where they are all short, the run does "
               "not know."),
        gates(seen, c.method.rpartition("-")[2]))


def run_page(folder: str) -> str:
    done = read_run(folder)
    run, examples = load(done.config), train.load_split(done.config, done.results["split"])
    held, rows, kinds, shown, opened = files(done.config), [], [], [], ""
    for task, asked in examples.items():
        said = read_answers(done, task, asked)
        (head, *others) = (f"{metric} {value:.2f}" for metric, value in done.results[task].items())
        rows.append([task, head, ", ".join(others)])
        if "cider" not in done.results[task]:
            kinds.append(by_type(task, asked, said, question_types(done, task)))
        looks = [(look(run, example, held), answer) for example, answer in picked(asked, said)]
        shown.append(f"<h3>{task}</h3>" + cards([card(seen, answer, right_answer(seen.example))
                                                 for seen, answer in looks], "small"))
        opened = opened or gates(looks[0][0], done.config.method.rpartition("-")[2])
    rows.append(["average", f"{done.results['average']:.2f}", ""])
    return page(
        f"{done.config.method}: {done.results['average']:.1f}",
        f"It learned {escape(', '.join(examples))} in {done.log[-1]['step']:,} steps. "
        f"{done.share:.2f} % of its parameters were trained, all others stayed as they were.",
        settings(done, run.model.method.formula),
        figure("What it scores", table(["task", "headline", "and"], rows),
               "The average is that of the headlines; CIDEr-D goes beyond 100 and so weighs most "
               "in it."),
        figure("Which questions it can answer", cards(kinds),
               "The red mark is what always giving the commonest answer would score: a bar that "
               "ends there has learned nothing.") if kinds else "",
        learning({done.config.method: done}),
        figure("What it says", "".join(shown),
               "Of each task two of the best and two of the worst answers; a bar is the chance of "
               "a whole answer: what is said, found token by token, need not be the likeliest."),
        opened)


# Settings by which runs may differ beside row and seed.
VARY = ("set", "tasks", "data", "lm", "clip", "features", "train_clip", "pretrained", "steps",
        "task_names", "answers", "control")


def by_name(finished: list[Done]) -> dict[str, list[Done]]:
    """The runs of each row and whatever settings differ: they differ in the seed alone."""
    vary, groups = [], defaultdict(list)
    for name in VARY:
        if len({getattr(done.config, name) for done in finished}) > 1:
            vary.append(name)
    for done in finished:
        told = {name: getattr(done.config, name) for name in vary}
        more = [f"{name} {value}" for name, value in told.items() if value not in ("", None)]
        groups[", ".join([done.config.method, *more])].append(done)
    return groups


def spread(values: list[float]) -> tuple[float, float]:
    return mean(values), stdev(values) if len(values) > 1 else 0.0


def shown_mean(values: list[float]) -> str:
    middle, about = spread(values)
    return f"{middle:.1f} ± {about:.1f}" if len(values) > 1 else f"{middle:.1f}"


def runs_page(folders: list[str]) -> str:
    finished = [read_run(folder) for folder in folders]
    groups = by_name(finished)
    order = sorted(groups, key=lambda name: -mean(d.results["average"] for d in groups[name]))
    tasks = max((list(group[0].scores()) for group in groups.values()), key=len)
    dots, rows = {}, []
    for number, name in enumerate(order, 1):
        group, cells = groups[name], []
        told = name if len(order) <= 12 else f"{number}"   # there is no room for more names
        for task in tasks:
            found = [done.scores()[task] for done in group if task in done.scores()]
            cells.append(shown_mean(found) if found else "")
        averages = [done.results["average"] for done in group]
        rows.append([name if told == name else f"{number} {name}", f"{group[0].share:.2f}",
                     *cells, shown_mean(averages)])
        if all(cells):                                     # an average of all tasks
            dots[told] = [(group[0].share, *spread(averages))]
    return page(
        f"{len(groups)} ways to tune one model", f"{len(folders)} runs side by side.",
        figure("What a share of the parameters buys",
               chart(dots, "trained, % of all parameters", "average score", log=True),
               "Up is better, left is cheaper: what is worth choosing lies on the upper left edge. "
               "A line through a dot is the standard deviation over seeds."),
        figure("The scores", table(["row", "trained %", *tasks, "average"], rows),
               "Look at single tasks before the average, in which CIDEr-D weighs most; behind ± "
               "stands the standard deviation over seeds."),
        learning({name: groups[name][0] for name in order}),
        four_sizes(finished))


def four_sizes(finished: list[Done]) -> str:
    """VL-PET's rows side by side: the same picture and question, every size of G."""
    found = {}
    for done in finished:
        name = done.config.method.removeprefix("vlpet-")
        if name in GATES and name != done.config.method and not done.config.set:
            found.setdefault(name, done)
    if len(found) < 2:
        return ""
    looks = {}
    for name in [name for name in SIZES if name in found]:
        config = found[name].config
        run, (first, *_) = load(config), task_list(config)
        example = train.load_split(config, found[name].results["split"])[first][0]
        looks[name] = look(run, example, files(config))
    parts, seen = [], next(iter(looks.values()))
    for where in (list(seen.gates)[0], list(seen.gates)[-1]):       # in the order of the layers
        low, high = bounds([each.gates[where] for each in looks.values()])
        shown = [f"<p><b>{name}</b></p>{over_picture(each, each.gates[where], low, high)}"
                 f"{matrix(each.gates[where])}" for name, each in looks.items()]
        parts.append(f'<h3>{where}</h3>{scale(low, high)}{cards(shown, "four")}')
    told = "; ".join(f"<b>{name}</b> is {SIZES[name]}" for name in looks)
    return figure("Four sizes of G", cards([card(seen)]) + "".join(parts),
                  f"Over the picture in common colours, as a matrix in colours of its own: {told}.")


def write(folders: list[str], to: str | Path = "") -> Path:
    """Writes the page of a run, or of several, and says where: into the folder they share."""
    text = run_page(*folders) if len(folders) == 1 else runs_page(folders)
    path = Path(to or Path(os.path.commonpath(folders)) / "report.html")
    replace_file(path, text)
    return path


@program
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="A page about one run, or about several.")
    parser.add_argument("run", nargs="+", help="a run folder of train.py")
    parser.add_argument("--to", default="", help="the page; default: report.html in the run's "
                                                 "folder, or in the one that all runs share")
    args = parser.parse_args(argv)
    print(write(args.run, args.to))


if __name__ == "__main__":
    main()
