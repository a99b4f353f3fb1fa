"""Which row is best, and which of the papers' findings hold here?

Rows x seeds: every run is a process of train.py with a folder of its own. What is finished stays,
and the same command goes on where it was stopped. At the end one table, as Markdown, CSV and JSON:
each row beside its published numbers, each finding of the papers beside what was measured; and the
page of tools/report.py.

    python -m tools.compare --quick                        # a taste, 10 minutes on two cores
    python -m tools.compare                                # the papers' table, on drawn pictures
    python -m tools.compare --study changes                # rows with one thing changed
    python -m tools.compare --study clips                  # the papers' table on drawn clips
    python -m tools.compare --rows adapter,vlpet-large --data datasets/mine --lm LM    # on yours
    python -m pytest tests/test_compare.py

What compare does not know (--data, --steps, ...) it hands on to every run of train.py.
"""
import argparse
import csv
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean

import torch

import config as configs
import methods
import train
from config import Config, task_list
from support.gate import BadInput, program, read_json, reading, replace_file
from support.published_lm import read_config
from support.runs import ADAPTER
from tools import report

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Entry:
    """A line of the table. flags: of train.py; {full} is the folder of that entry's run of the
    same seed. paper: published trainable %, score of each task, average. alone: a run a task."""
    flags: str = ""
    paper: str = ""
    alone: bool = False


# ------------------------------------------------------------------------- what is compared

# BART-base's published numbers: VL-PET's table 1 (three seeds), from `frozen` on VL-Adapter's (one
# seed), dora's by its own paper.
PICTURES = {
    "full": Entry(paper="100 | 66.88 56.79 73.66 112.01 | 77.33"),
    "bitfit": Entry(paper="1.21 | 52.94 43.15 52.29 111.44 | 64.96"),
    "prompt": Entry(paper="2.00 | 44.12 36.37 51.34 105.02 | 59.21"),
    "compacter": Entry(paper="2.70 | 64.63 52.70 71.11 114.69 | 75.78"),
    "hyperformer": Entry(paper="5.79 | 64.62 52.55 70.74 114.84 | 75.69"),
    "lora": Entry(paper="5.93 | 65.15 53.66 72.58 115.01 | 76.60"),
    "adapter": Entry(paper="4.18 | 65.76 54.16 73.19 114.61 | 76.93"),
    "vlpet-small": Entry(paper="2.98 | 65.43 54.03 72.43 120.68 | 78.14"),
    "vlpet-middleX": Entry(paper="2.98 | 65.54 54.53 72.66 120.72 | 78.37"),
    "vlpet-middleY": Entry(paper="2.98 | 65.36 53.83 73.43 120.31 | 78.23"),
    "vlpet-large": Entry(paper="4.16 | 66.17 55.11 73.43 122.03 | 79.18"),
    "frozen": Entry(paper="1.14 | - | 47.1"),
    "norms": Entry(paper="1.18 | - | 62.9"),
    "adapter-multiple": Entry(paper="12.22 | - | 75.9"),
    "adapter-half-shared": Entry(paper="8.36 | - | 75.9"),
    "compacter-multiple": Entry(paper="7.05 | - | 75.8"),
    "lora-multiple": Entry(paper="17.72 | - | 74.2"),
    "prompt-multiple": Entry(paper="4.53 | - | 59.4"),
    "dora": Entry(paper="5.96 | 65.8 54.7 73.1 115.9 | 77.4"),
    "vlpet-large (blind)": Entry("--control blind"),
    "vlpet-large (random CLIP)": Entry("--control random-clip"),
    "vlpet-large (random LM)": Entry("--control random-lm"),
}
# One thing changed: what several of the papers' findings are about (its VL-PET rows on clips, too).
CHANGES = {name: PICTURES[name] for name in ("full", "adapter", "vlpet-large")} | {
    "adapter (norms frozen)": Entry("--method adapter --set open=none"),
    "adapter (no task names)": Entry("--method adapter --task-names no"),
    "adapter (one task alone)": Entry("--method adapter", alone=True),
    "adapter (CLIP trained)": Entry("--method adapter --features none --train-clip yes"),
    "adapter (behind V&L)": Entry("--method adapter --pretrained {full}", "4.18 | - | 79.2"),
    "vlpet-large (no G)": Entry("--set gate=none"),
    "vlpet-large (no G, wider)": Entry("--set gate=none,encoder.reduction=4"),
    "vlpet-large (decoder adapters)": Entry(
        "--set decoder=none,decoder.self_attn=adapter,decoder.cross_attn=adapter,"
        "decoder.ffn=adapter"),
}
CLIPS = {
    "full": Entry(paper="100 | 76.3 73.9 45.7 154.0 | 87.4"),
    "lora": Entry(paper="5.17 | 75.5 72.9 44.6 140.9 | 83.4"),
    "dora": Entry(paper="5.19 | 76.3 74.1 45.8 145.4 | 85.4"),
    "adapter": Entry(paper="3.39 | 76.6 73.9 46.3 152.9 | 87.4"),
    "vlpet-large": Entry(paper="- | - | 88.63"),
    "frozen": Entry(),
    **{name: entry for name, entry in CHANGES.items() if name.startswith("vlpet-large (")},
    "vlpet-large (no subtitles)": Entry("--control no-subtitles"),
    "vlpet-large (no frames)": Entry("--control no-frames"),
}
TASTE = "full", "prompt", "adapter", "vlpet-large", "vlpet-large (blind)"
STUDIES = {                     # entries, flags of every run, seeds, folder of the runs in out/
    "pictures": (PICTURES, "", "42,43,44", "compare"),
    "changes": (CHANGES, "", "42,43,44", "compare"),
    "clips": (CLIPS, "--tasks tvqa,how2qa,tvc,yc2c", "42,43,44", "compare-clips"),
    "quick": ({name: PICTURES[name] for name in TASTE}, "--steps 200", "42,43", "compare-quick"),
}

# A finding of the papers: entry A scores at least `margin` more than entry B, as a share of full
# fine-tuning's scores (%). Last, the averages that were published.
NO_WORSE = -2
FINDINGS = (
    ("one adapter for all tasks is no worse than one a task", "adapter", "adapter-multiple",
     NO_WORSE, "77.4 : 75.9"),
    ("nor is one Compacter", "compacter", "compacter-multiple", NO_WORSE, "75.8 : 75.8"),
    ("nor is one LoRA", "lora", "lora-multiple", NO_WORSE, "76.5 : 74.2"),
    ("adapters come close to full fine-tuning", "adapter", "full", NO_WORSE, "76.93 : 77.33"),
    ("prompts fall far behind", "adapter", "prompt", 10, "76.93 : 59.21"),
    ("VL-PET is above VL-Adapter", "vlpet-large", "adapter", 0, "79.18 : 76.93"),
    ("a large G is above a small one", "vlpet-large", "vlpet-small", 0, "79.18 : 78.14"),
    ("G helps", "vlpet-large", "vlpet-large (no G)", 0, ""),
    ("G helps more than a wider adapter", "vlpet-large", "vlpet-large (no G, wider)", 0, ""),
    ("norms matter", "norms", "frozen", 0, "62.9 : 47.1"),
    ("norms matter beside adapters, too", "adapter", "adapter (norms frozen)", 0, ""),
    ("the decoder's value module is enough", "vlpet-large", "vlpet-large (decoder adapters)",
     NO_WORSE, ""),
    ("a frozen CLIP is the better bargain", "adapter", "adapter (CLIP trained)", NO_WORSE,
     "64.7 : 65.6, VQA alone"),
    ("V&L pre-training helps", "adapter (behind V&L)", "adapter", 0, "79.2 : 77.4"),
    ("task names help", "adapter", "adapter (no task names)", 0, ""),
    ("many tasks at once help", "adapter", "adapter (one task alone)", 0, ""),
    ("pictures are looked at", "vlpet-large", "vlpet-large (blind)", 10, ""),
    ("CLIP's pre-training helps", "vlpet-large", "vlpet-large (random CLIP)", 0, ""),
    ("the language model's helps", "vlpet-large", "vlpet-large (random LM)", 0, ""),
    ("subtitles are read", "vlpet-large", "vlpet-large (no subtitles)", 10, ""),
    ("frames are looked at", "vlpet-large", "vlpet-large (no frames)", 10, ""),
)


# ------------------------------------------------------------------------- the runs

@dataclass(frozen=True)
class Job:
    """One run of train.py."""
    name: str                                               # of the entry
    seed: int
    config: Config

    @property
    def folder(self) -> Path:
        return Path(self.config.out)

    @property
    def log(self) -> Path:
        """What it printed."""
        return Path(f"{self.folder}.txt")

    def results(self) -> dict | None:
        path = self.folder / "results.json"
        return read_json(path) if path.exists() else None


def folder(out: Path, name: str, seed: int) -> Path:
    return out / re.sub(r"[^\w+-]+", "-", name) / str(seed)


def plan(entries: dict[str, Entry], seeds: list[int], out: Path, flags: list[str]) -> list[Job]:
    """Every run, with its whole configuration: what is wrong with one is said before the first."""
    jobs = []
    for name, entry in entries.items():
        for seed in seeds:
            said = shlex.split(entry.flags) or ["--method", name]
            said = [word.format(full=folder(out, "full", seed)) for word in said]
            config, _ = configs.parse([*flags, *said, "--seed", str(seed)])
            config = replace(configs.resolve(config), out=str(folder(out, name, seed)))
            if not entry.alone:
                jobs.append(Job(name, seed, config))
                continue
            # As many steps for each task as all together have.
            steps = train.total_steps(config, train.load_split(config, "train"))
            for task in task_list(config):
                jobs.append(Job(name, seed, replace(config, tasks=task, steps=steps, epochs=None,
                                                    out=f"{config.out}/{task}")))
    # What begins with another run comes last; else seed by seed, so that a table of one seed is
    # there early.
    return sorted(jobs, key=lambda job: (bool(job.config.pretrained), job.seed))


def check_finished(job: Job) -> None:
    """A folder of before holds the very run that is asked for."""
    path = job.folder / "config.json"
    if path.exists():
        with reading(path):
            was, now = read_json(path), json.loads(json.dumps(asdict(job.config)))
            odd = [name for name in now if was.get(name) != now[name]]
            assert not odd, f"it is of other settings ({', '.join(odd)}): name another --out"


def run(job: Job, threads: int) -> str:
    """Starts a run, or goes on with it, and waits; returns how it went, in a line."""
    command = [sys.executable, str(ROOT / "train.py")]
    if (job.folder / "config.json").exists():
        command += ["--resume", str(job.folder)]
    else:
        for name, value in asdict(job.config).items():
            if isinstance(value, bool):
                value = "yes" if value else "no"
            if value not in (None, ""):
                command += [configs.flag(name), str(value)]
    job.folder.parent.mkdir(parents=True, exist_ok=True)
    started = time.time()
    with open(job.log, "a") as file:
        subprocess.run(command, stdout=file, stderr=subprocess.STDOUT,
                       env=os.environ | {"OMP_NUM_THREADS": str(threads)})
    results = job.results()
    told = f"{results['average']:.2f}" if results else f"failed, see {job.log}"
    return f"{job.name}, seed {job.seed}: {told} ({time.time() - started:.0f} s)"


def run_all(jobs: list[Job], at_once: int) -> None:
    """All that is not finished, some at once; those that begin with others behind them."""
    threads = max(1, torch.get_num_threads() // at_once)
    for late in False, True:
        left = [job for job in jobs if bool(job.config.pretrained) == late and not job.results()]
        print(f"{len(left)} runs to do, {at_once} at once")
        with ThreadPoolExecutor(at_once) as pool:
            runs = [pool.submit(run, job, threads) for job in left]
            try:
                for i, each in enumerate(runs, 1):
                    print(f"[{i} of {len(left)}] {each.result()}", flush=True)
            except KeyboardInterrupt:                       # the runs were told, too, and save
                pool.shutdown(cancel_futures=True)
                raise


def prepare(jobs: list[Job]) -> None:
    """Data and packed features are made once, before several runs would make them at once; what is
    wrong with a row or with the data is said here."""
    for job in {job.name: job for job in jobs}.values():
        if not job.config.pretrained:
            examples = train.load_split(job.config, "train")            # draws the data, if need be
            train.check_examples(train.setup(job.config), examples)


# ------------------------------------------------------------------------- the table

def line_of(name: str, jobs: list[Job]) -> dict | None:
    """An entry's line: the scores of each task, a number a seed, and what a run costs."""
    done = {}
    for job in jobs:
        if job.name == name:
            done.setdefault(job.seed, []).append(job)       # several, where tasks stand alone
    done = {seed: runs for seed, runs in done.items() if all(map(Job.results, runs))}
    if not done:
        return None
    scores, minutes, memory = {}, [], []
    for runs in done.values():
        for run in runs:
            for task in task_list(run.config):
                headline = next(iter(run.results()[task].values()))
                scores.setdefault(task, []).append(headline)
            memory.append(run.results()["memory"] / 2**20)
        minutes.append(sum(run.results()["seconds"] for run in runs) / 60)
    last = run.results()
    log = (run.folder / "log.jsonl").read_text().splitlines()
    return {"row": name, "seeds": [*done], "scores": scores,
            "average": [mean(seed) for seed in zip(*scores.values())],
            "trainable": 100 * last["trainable"] / last["total"],
            "steps": json.loads(log[-1])["step"] if log else 0, "minutes": mean(minutes),
            "memory": max(memory), "file": (run.folder / ADAPTER).stat().st_size / 2**20}


def normalise(lines: dict[str, dict]) -> None:
    """Adds to each line the mean of its scores, each as a share (%) of full fine-tuning's: x100,
    CIDEr-D would weigh several times as much as all accuracies together."""
    full = lines.get("full", {"scores": {}})["scores"]
    best = {task: mean(found) for task, found in full.items()}
    if not best or min(best.values()) == 0:                 # no share of nothing
        return
    for line in lines.values():
        shares = torch.tensor([*line["scores"].values()])                   # tasks, seeds
        shares = shares / torch.tensor([[best[task]] for task in line["scores"]])
        line["of full"] = (100 * shares.mean(0)).tolist()


def compare(a: list[float], b: list[float], margin: float) -> tuple[float, float, str]:
    """(mean of A - mean of B, its standard deviation from seed to seed, verdict)."""
    (mean_a, std_a), (mean_b, std_b) = report.spread(a), report.spread(b)
    gain, noise = mean_a - mean_b, (std_a ** 2 + std_b ** 2) ** 0.5
    if min(len(a), len(b)) < 2:
        return gain, noise, "one seed"
    if gain - margin > noise:
        return gain, noise, "holds"
    return gain, noise, "does not hold" if gain - margin < -noise else "within the spread"


def findings(lines: dict[str, dict]) -> list[dict]:
    """Every finding whose two entries are there."""
    found = []
    for text, a, b, margin, paper in FINDINGS:
        if a in lines and b in lines and "of full" in lines[a]:
            gain, noise, verdict = compare(lines[a]["of full"], lines[b]["of full"], margin)
            found.append({"finding": text, "A": a, "B": b, "margin": margin, "gain": gain,
                          "spread": noise, "verdict": verdict, "published": paper})
    return found


def markdown(command: str, where: str, lines: dict[str, dict], found: list[dict],
             paper: dict) -> str:
    tasks = list(next(iter(lines.values()))["scores"])
    head = ["row", "trained %", *tasks, "average", "% of full", "seeds", "steps", "min", "MiB",
            "file MiB", "published: trained %", *tasks, "average"]
    text = [f"`{command}`", "", where, "", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name, line in lines.items():
        share, of_each, average = paper.get(name, ("", "", ""))
        published = of_each.split()
        if len(published) != len(tasks):                    # an average alone was published
            published = [""] * len(tasks)
        measured = [line["scores"][task] for task in tasks] + [line["average"]]
        share_of_full = report.shown_mean(line["of full"]) if "of full" in line else ""
        cells = [name, f"{line['trainable']:.2f}", *map(report.shown_mean, measured), share_of_full,
                 f"{len(line['seeds'])}", f"{line['steps']:,}", f"{line['minutes']:.1f}",
                 f"{line['memory']:.0f}", f"{line['file']:.2f}", share, *published, average]
        text.append(f"| {' | '.join(cells)} |")
    if found:
        text += ["", "A and B in % of full fine-tuning's scores; the spread is that of A - B from "
                 "seed to seed.", "", "| finding of the papers | A | B | A - B | at least | here "
                 "| published A : B, pictures |", "|---|---|---|---|---|---|---|"]
    for each in found:
        text.append(f"| {each['finding']} | {each['A']} | {each['B']} | {each['gain']:+.1f} ± "
                    f"{each['spread']:.1f} | {each['margin']:+} | {each['verdict']} "
                    f"| {each['published']} |")
    return "\n".join([*text, ""])


def machine() -> str:
    """What the numbers were measured on, and with."""
    git = subprocess.run(["git", "-C", str(ROOT), "describe", "--always", "--dirty"],
                         capture_output=True, text=True)
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    chip, info = platform.machine(), Path("/proc/cpuinfo")
    if info.exists():
        chip = re.search(r"model name\s*: (.*)|$", info.read_text())[1] or chip
    return (f"Commit {git.stdout.strip() or 'unknown'}, {chip}, {os.cpu_count()} cores, {card}, "
            f"torch {torch.__version__}, Python {platform.python_version()}; "
            f"mean ± standard deviation over the seeds.")


def write(command: str, entries: dict[str, Entry], jobs: list[Job], to: Path) -> str:
    """The table of what is finished: to.md, to.csv, to.json."""
    lines = {name: line_of(name, jobs) for name in entries}
    lines = {name: line for name, line in lines.items() if line}
    if not lines:
        raise BadInput(f"no run is finished; what they said lies beside their folders in {to}")
    normalise(lines)
    found = findings(lines)
    paper = {name: entry.paper.split(" | ") for name, entry in entries.items() if entry.paper}
    where = machine()
    text = markdown(command, where, lines, found, paper)
    to.parent.mkdir(parents=True, exist_ok=True)
    replace_file(f"{to}.md", text)
    replace_file(f"{to}.json", json.dumps(
        {"command": command, "machine": where, "lines": [*lines.values()], "published": paper,
         "findings": found}, indent=1) + "\n")
    with open(f"{to}.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["row", "trained %", "task", "seed", "score"])
        for name, line in lines.items():
            for task, scores in line["scores"].items():
                rows.writerows([name, line["trainable"], task, seed, score]
                               for seed, score in zip(line["seeds"], scores))
    return text


@program
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Rows x seeds: the papers' table, measured.",
                                     epilog="All other flags go to train.py.", allow_abbrev=False)
    parser.add_argument("--study", default="pictures", choices=STUDIES, help="which entries")
    parser.add_argument("--quick", action="store_true", help="the same as --study quick")
    parser.add_argument("--rows", default="", help="these entries or rows alone, comma between")
    parser.add_argument("--seeds", default="", help="default: 42,43,44; quick: 42,43")
    parser.add_argument("--jobs", type=int, default=2, help="runs at once, default 2")
    parser.add_argument("--out", type=Path, help="folder of the runs; studies of the same "
                                                 "runs share it; default: below out/")
    parser.add_argument("--to", type=Path, help="the tables' name, without an ending; default: "
                                                "the study's, in --out")
    args, flags = parser.parse_known_args(argv)
    study = "quick" if args.quick else args.study
    entries, always, usual, name = STUDIES[study]
    out = args.out or Path("out") / name
    with reading("--rows, --seeds and --jobs"):
        if args.rows:                                       # an entry, or any row of methods.py
            known = dict.fromkeys(methods.methods(is_t5=False), Entry()) | entries
            entries = {name: known[name] for name in args.rows.split(",")}
        seeds = [int(seed) for seed in (args.seeds or usual).split(",")]
        assert len(set(seeds)) == len(seeds) and args.jobs > 0, "seeds once each, at least one job"
    jobs = plan(entries, seeds, out, [*shlex.split(always), *flags])
    # The published numbers are of the study's own tasks, on BART.
    if "--tasks" in flags or read_config(jobs[0].config.lm).is_t5:
        entries = {name: replace(entry, paper="") for name, entry in entries.items()}
    for job in jobs:
        check_finished(job)
    prepare([job for job in jobs if not job.results()])
    run_all(jobs, args.jobs)
    command = shlex.join(["python", "-m", "tools.compare", *(argv or sys.argv[1:])])
    to = args.to or out / study
    print(write(command, entries, jobs, to))
    finished = [str(job.folder) for job in jobs if job.results()]
    print("to look at it:", report.write(finished, f"{to}.html"))
    failed = [str(job.log) for job in jobs if not job.results()]
    if failed:
        raise BadInput(f"{len(failed)} runs failed, which is told in {', '.join(failed)}")


if __name__ == "__main__":
    main()
