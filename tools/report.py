"""What did a run learn, and where? Pages to look at.

    python -m tools.report out/vlpet-large                 # out/vlpet-large/report.html
    python -m tools.report out/adapter out/vlpet-large     # out/report.html: the two side by side
    python -m tools.ask --report                           # a page about one picture
    python -m pytest tests/test_report.py

A page is one file that asks the network for nothing. Its sections stand in two tables at the end.

Axes: S encoder tokens, of which the last N are the picture's or the clip's; D width.
"""
import argparse
import json
import math
import os
import re
from collections import Counter, defaultdict
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from html import escape
from pathlib import Path
from random import Random
from statistics import mean, stdev
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import data
import train
from adapters import GATES
from clip_encoder import MEAN, STD
from config import Config, task_list
from data import TASKS, Example
from support import readers, runs, submit
from support.gate import BadInput, program, read_json, read_text, reading, replace_file
from support.page import bar, cards, chart, chips, heat, inline, matrix, page, scale, strip, table
from support.pictures import FRAMES, list_clips, list_files, nfc, read_frames
from support.runs import ADAPTER, Run


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
SIZES = [f"vlpet-{size}" for size in GATES]


def load(config: Config, pictures: dict | None = None) -> Run:
    """A finished run; with pictures (id -> file) it looks at these, not at its data's."""
    path = Path(config.out) / ADAPTER
    held = runs.read(path)
    run = train.setup(replace(config, precision="fp32"), held, pictures)
    runs.load_trained(run, held, path, ("device", "precision"))
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
    gates, names, hooks = {}, {}, []

    def note(gate: torch.nn.Module, inputs: tuple, G: Tensor) -> None:
        gates[names[gate]] = G.expand_as(inputs[0])[0].float().cpu().numpy()        # S, D

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
    pictures of one cell. They are cut or stretched as CLIP sees them."""
    seen, found = run.features[example.task], []
    for name in example.images:
        shown, path = [], held.get(name) or held.get(nfc(name))
        if path:
            with reading(path):
                for x in read_frames(path, 144, seen.settings.get("resize", "stretch")):
                    x = 255 * (x.permute(1, 2, 0).numpy() * STD + MEAN)     # 144, 144, RGB
                    shown.append(Image.fromarray(x.round().clip(0, 255).astype(np.uint8)))
        if TASKS[example.task].clips:
            found += [(image, 1, 1) for image in shown[::math.ceil(len(shown) / FRAMES) or 1]]
        else:
            found.append((shown[0] if shown else None, *seen.grids([name])[0]))
    return found


# ------------------------------------------------------------------------- a finished run

@dataclass
class Done:
    """What a run left in its folder; model and data are loaded when they are first asked for."""
    config: Config
    results: dict
    log: list[dict]

    @cached_property
    def run(self) -> Run:
        return load(self.config)

    @cached_property
    def examples(self) -> dict[str, list[Example]]:
        return train.load_split(self.config, self.results["split"])

    @cached_property
    def files(self) -> dict[str, Path]:
        """Id -> file of all pictures and clips, as far as they are still there."""
        found = {}
        for folder, listed in (self.config.images, list_files), (self.config.clips, list_clips):
            with suppress(BadInput, OSError):
                found |= listed(folder)
        return found

    def said(self, task: str) -> list[tuple[Example, str]]:
        """The examples of the split, and what the run said."""
        name = submit.plain_name(task, self.results["split"])
        path = Path(self.config.out) / "predictions" / f"{name}.json"
        with reading(path):
            found = {line["id"]: line["answer"] for line in json.loads(read_text(path))}
            return [(example, found[example.id]) for example in self.examples[task]]


def read_run(folder: str) -> Done:
    config = runs.read_config(str(folder), device="")
    path = Path(config.out) / "results.json"
    with reading(path):
        assert path.exists(), ("this run was never tested: python train.py --resume RUN goes on "
                               "with it; of a shipped one python -m tools.ask --report has a page")
        log = read_text(path.with_name("log.jsonl")).splitlines()
        return Done(config, read_json(path), [json.loads(line) for line in log])


def score(pairs: list[tuple[Example, str]]) -> float:
    """The headline, to 100: of captions ROUGE-L, for CIDEr needs a whole split."""
    examples, answers = map(list, zip(*pairs))
    scores = TASKS[examples[0].task].metric(answers, examples)
    return scores.get("rouge_l", next(iter(scores.values())))


def right_answer(example: Example) -> str:
    return max(example.targets, key=example.targets.get, default="")


# ------------------------------------------------------------------------- sections of one run

def settings(done: Done) -> str:
    flags = ("method", "set", "control", "tasks", "data", "lm", "clip", "batch", "lr", "seed")
    found = {f"--{name}": getattr(done.config, name) for name in flags}
    steps = done.log[-1]["step"] if done.log else 0
    found |= {"h'": done.run.model.method.formula, "steps": f"{steps:,}",
              "trained": "{trainable:,} of {total:,} parameters".format(**done.results),
              "time": f"{done.results['seconds']:.0f} s"}
    return table(["setting", "here"], [[name, f"{x}"] for name, x in found.items() if x != ""])


def question_types(done: Done, task: str) -> dict:
    """Question id -> its type, where the data tells, as the built-in data does."""
    def typed(record: object) -> tuple | None:
        if isinstance(record, dict) and "question_type" in record:
            return record.get("question_id", record.get("identifier")), record["question_type"]

    folder = Path(done.config.data)
    with reading(folder):
        _, paths = readers.find_files(TASKS[task].layouts, done.results["split"], folder)
    return dict(readers.records(paths, typed, lines=True))


def by_type(pairs: list[tuple[Example, str]], types: dict) -> str:
    """A bar for each type of question, else for its first two words; a mark where the commonest
    right answer alone would be."""
    groups, bars = defaultdict(list), []
    for example, answer in pairs:
        kind = types.get(example.id) or " ".join(example.text.split()[:2])
        groups[kind].append((example, answer))
    for kind, group in sorted(groups.items(), key=lambda item: -len(item[1]))[:16]:
        common = Counter(right_answer(example) for example, _ in group).most_common(1)[0][0]
        good, mark = score(group), score([(example, common) for example, _ in group])
        bars.append((good, bar(f"{kind} ({len(group)})", f"{good:.1f}", good, mark)))
    return "".join(drawn for _, drawn in sorted(bars, reverse=True))


def types(done: Done) -> str:
    return cards([f"<h3>{task}</h3>{by_type(done.said(task), question_types(done, task))}"
                  for task in done.examples if "cider" not in done.results[task]], "17rem")


def question(example: Example) -> str:
    """A caption's text is empty, or the seconds that are to be described."""
    if any(map(str.isalpha, example.text)):
        return example.text
    return f"What is to be seen? {example.text}".strip()


def card(seen: Look, said: str | None = None, right: str = "") -> str:
    """A picture with question, right answer, what was said, and the likeliest answers."""
    example = seen.example
    parts = [strip([inline(image, "what is shown") for image, *_ in seen.tiles if image]),
             f"<p><b>{escape(question(example))}</b></p>"]
    if example.context:
        parts.append(f'<p class="soft">subtitles: {escape(example.context)}</p>')
    if right:
        parts.append(f"<p>right: {escape(right)}</p>")
    if said is not None:                                   # it may be no word at all
        good = score([(example, said)])
        kind, sign = ("right", "&#10003;") if good >= 50 else ("wrong", "&#10007;")
        parts.append(f'<p class="{kind}">{sign} said: {escape(said)} ({good:.0f} of 100)</p>')
    return "".join(parts + [bar(answer or "(nothing)", f"{100 * p:.1f} %", 100 * p)
                            for answer, p in seen.answers if p > 5e-4])


def samples(done: Done) -> str:
    """Of each task two of the best and two of the worst of 500 drawn answers, always the same."""
    parts = []
    for task in done.examples:
        pairs = done.said(task)
        pairs = Random(0).sample(pairs, min(500, len(pairs)))
        pairs.sort(key=lambda pair: -score([pair]))
        shown = [card(look(done.run, example, done.files), said, right_answer(example))
                 for example, said in [*pairs[:2], *pairs[2:][-2:]]]
        parts.append(f"<h3>{task}</h3>{cards(shown, '13rem')}")
    return "".join(parts)


# ------------------------------------------------------------------------- sections of all runs

# Settings by which runs may differ beside row and seed; recipes give rows their own of RECIPE.
VARY = ("set", "tasks", "data", "lm", "clip", "features", "train_clip", "pretrained", "steps",
        "task_names", "answers", "control")
RECIPE = "lr", "batch", "epochs", "dropout", "boxes", "frames", "subtitles", "init"
Groups = dict[str, list[Done]]


def differing(finished: list[Done], names: tuple[str, ...]) -> list[str]:
    """Those of the settings by which some of the runs differ."""
    found = []
    for name in names:
        if len({getattr(done.config, name) for done in finished}) > 1:
            found.append(name)
    return found


def by_name(finished: list[Done]) -> Groups:
    """Row and whatever settings differ -> its runs, of several seeds; the best first."""
    of_row, groups = defaultdict(list), defaultdict(list)
    for done in finished:
        of_row[done.config.method].append(done)
    for done in finished:
        words = [done.config.method]
        for name in differing(finished, VARY) + differing(of_row[done.config.method], RECIPE):
            value = getattr(done.config, name)
            if name == "pretrained":                       # each seed begins with a run of its own
                value = "yes" if value else ""
            if value not in ("", None):
                words.append(f"{name} {value}")
        groups[", ".join(words)].append(done)
    return dict(sorted(groups.items(), key=lambda item: -mean(averages(item[1]))))


def averages(group: list[Done]) -> list[float]:
    return [done.results["average"] for done in group]


def spread(values: list[float]) -> tuple[float, float]:
    return mean(values), stdev(values) if len(values) > 1 else 0.0


def shown_mean(values: list[float]) -> str:
    middle, about = spread(values)
    return f"{middle:.1f} ± {about:.1f}" if len(values) > 1 else f"{middle:.1f}"


def all_tasks(groups: Groups) -> list[str]:
    """What any of the runs has learned."""
    found = set()
    for done, *_ in groups.values():
        found |= done.results.keys()
    return [task for task in TASKS if task in found]


def scores(groups: Groups) -> str:
    """A table, and of several rows the papers' first figure."""
    rows, dots, tasks = [], {}, all_tasks(groups)
    for number, (name, group) in enumerate(groups.items(), 1):
        cells, results = [], group[0].results
        for task in tasks:
            found = [next(iter(done.results[task].values())) for done in group
                     if task in done.results]
            cells.append(shown_mean(found) if found else "")
        share, average = 100 * results["trainable"] / results["total"], averages(group)
        rows.append([f"{number} {name}", f"{share:.2f}", *cells, shown_mean(average)])
        # Averages over other tasks cannot be compared.
        dots[name] = [(share, *spread(average))] if all(cells) else []
    shown = table(["row", "trained %", *tasks, "average"], rows)
    if len(groups) > 1:
        shown = chart(dots, "trained, % of all parameters", "average score", log=True) + shown
    return shown


def learning(groups: Groups) -> str:
    """Of each task the training loss and, where it was scored, the validation; of one seed."""
    parts = []
    for title, field in ("loss", "loss"), ("validation score", "validation"):
        for task in all_tasks(groups):
            curves = {}
            for name, (done, *_) in groups.items():
                curves[name] = [(line["step"], line[field][task], 0.0) for line in done.log
                                if task in line.get(field, {})]
            if any(curves.values()):
                parts.append(f"<h3>{task}</h3>{chart(curves, 'step', title)}")
    return cards(parts, "20rem")


# ------------------------------------------------------------------------- the gates

def gate_map(seen: Look, G: np.ndarray, low: float, high: float) -> str:
    """G (S, D): its mean over channels as a colour on each part of the picture and on each word;
    then G itself."""
    means, last = G.mean(1), len(G) - seen.visual
    left, shown = means[last:], []
    for image, rows, columns in seen.tiles:
        values, left = left[:rows * columns], left[rows * columns:]
        if len(values) == rows * columns:                  # a control hides frames
            shown.append(heat(image, values.reshape(rows, columns), low, high))
    words = chips(seen.words, means[last - len(seen.words):last], low, high)
    return strip(shown) + words + matrix(G)


def gate_maps(looks: dict[str, Look]) -> str:
    """G of each encoder site, of several runs at the first and the last; "" without gates."""
    first, shown = next(iter(looks.values()), None), {}
    if first is None or not first.gates:
        return ""
    places = [*first.gates]
    if len(looks) > 1:
        places = [places[0], places[-1]]
    for place in places:
        for name, seen in looks.items():
            if place in seen.gates:
                shown[f"{name} {place}".strip()] = seen, seen.gates[place]
    means = np.concatenate([G.mean(1) for _, G in shown.values()])
    low, high = means.min(), means.max()
    maps = [f"<h3>{name}</h3>{gate_map(*each, low, high)}" for name, each in shown.items()]
    return card(first._replace(answers=[])) + scale(low, high) + cards(maps, "max(8.5rem, 20%)")


def gates(groups: Groups) -> str:
    """The first question of the split; of several rows VL-PET's four sizes."""
    looks = {}
    for done, *_ in groups.values():
        name, (first, *_) = done.config.method, task_list(done.config)
        if len(groups) == 1:
            name = ""
        if name in ("", *SIZES) and name not in looks:
            looks[name] = look(done.run, done.examples[first][0], done.files)
    return gate_maps(looks)


# ------------------------------------------------------------------------- the pages

# A section: heading, function of one run or of all, how to read it.
OF_ONE = (
    ("What was trained", settings, "The same settings and seed give the same run."),
    ("Which questions it can answer", types, "In brackets the number of questions. The red mark is "
     "what always giving the commonest answer scores: a bar that ends there has learned nothing."),
    ("What it says", samples, "Two of the best and two of the worst answers, captions by ROUGE-L. "
     "A bar is the chance of a whole answer; what is said, token by token, may be another."))
G_SHOWN = (
    "G multiplies what a frozen layer and its adapter say: at 0 nothing goes on, at 1 all. On the "
    "picture and the words lies the mean of G over its channels, in the colours of the scale. "
    "Below it is G itself, in colours from its least to its greatest number: a row a token (the "
    "text's, then the picture's), a column a channel. Stripes from left to right: G has one number "
    "a token (middleX); from top to bottom: one a channel (middleY); both: one for each (large); "
    "one colour: one for all (small).")
OF_ALL = (
    ("What it scores, and what it costs", scores, "Of captions CIDEr, of all else the accuracy. "
     "CIDEr goes beyond 100 and weighs most in the average. Of runs compared, up is better and "
     "left is cheaper; a line through a dot, as ±, is the standard deviation over seeds."),
    ("How it was learned", learning, "A curve that still falls at its end asks for more steps; "
     "losses of different tasks cannot be compared, those of different runs can. A curve has the "
     "number of its row above."),
    ("What the gates let through", gates, G_SHOWN))


def asked_page(run: Run, seen: Look, right: str = "") -> str:
    """The page of one picture and question (tools/ask.py)."""
    return page(question(seen.example), f"{run.config.method} was asked ({run.config.out}).", [
        ("What it answers", cards([card(seen, right=right)], "17rem"), "A bar is the probability "
         "of a whole answer; where they are all short, the run does not know."),
        ("What the gates let through", gate_maps({"": seen}), G_SHOWN)])


def write(folders: list[str], to: str | Path = "") -> Path:
    """Writes the page of a run, or of several, and says where: into the folder they share."""
    groups = by_name([read_run(folder) for folder in folders])
    best, group = next(iter(groups.items()))
    title, shown = f"{len(groups)} ways to tune one model", []
    if len(groups) == 1:
        title = best
        shown = [(heading, draw(group[0]), lesson) for heading, draw, lesson in OF_ONE]
    shown += [(heading, draw(groups), lesson) for heading, draw, lesson in OF_ALL]
    lead = (f"Tasks: {', '.join(all_tasks(groups))}. Best average of their scores: "
            f"{shown_mean(averages(group))} ({best}).")
    path = Path(to or Path(os.path.commonpath([*map(os.path.abspath, folders)])) / "report.html")
    replace_file(path, page(title, lead, shown))
    return path


@program
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="A page about one run, or about several.")
    parser.add_argument("run", nargs="+", help="a run folder of train.py")
    parser.add_argument("--to", default="", help="the page; default: report.html in the run's "
                                                 "folder, or in the one that all runs share")
    args = parser.parse_args(argv)
    print("to look at it:", write(args.run, args.to))


if __name__ == "__main__":
    main()
