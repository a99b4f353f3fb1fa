"""What README and docs/ say is so: links, files, commands, and the code that README shows.

    python -m pytest tests/test_readme.py
"""
import argparse
import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import torch
from house import FILES, ROOT

import config as configs
import data
import methods
from support import weights
from tools import compare, report
from world import scenes

PAGES = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
         for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")),
                      ROOT / "examples/README.md"]}
README = PAGES["README.md"]
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.S)


def heading_links(page: str) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    titles = re.findall(r"^#+ (.*)$", page, re.M)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name):
    for target, anchor in re.findall(r"\]\((?!http)([^)#]*)(?:#([^)]+))?\)", PAGES[name]):
        path = (ROOT / name).parent / target if target else ROOT / name
        assert path.exists(), target
        assert not anchor or anchor in heading_links(path.read_text(encoding="utf-8")), anchor


def test_readme_is_short():
    assert README.count("\n") <= 200


def test_every_file_is_introduced():
    """The tree of README: one line a file, none forgotten, none that is not there."""
    tree = README.split("## Where is what")[1].split("```")[1]
    told = dict(line.split(maxsplit=1) for line in tree.strip().splitlines())
    assert all((ROOT / path).exists() for path in told)
    ours = {str(path.relative_to(ROOT)) for path in FILES.values()}
    assert not ours - told.keys(), f"README, 'Where is what': add {sorted(ours - told.keys())}"


def test_every_page_is_reached():
    for name in PAGES:
        assert name == "README.md" or any(f"({name}" in page or f"/{name})" in page
                                          for page in PAGES.values()), name


# ------------------------------------------------------------------------------------ commands

def commands(page: str) -> list[str]:
    """Every command of a page, in a block or between backticks, without its comment."""
    found = []
    text = page.replace("\\\n", " ")
    for line in re.findall(r"^(?:    )?(?!`)(.*python .*)$", text, re.M):
        if "`" not in line:
            found.append(line)
    found += re.findall(r"`([^`\n]*python [^`]*)`", text)
    parts = []
    for line in found:
        parts += re.sub(r"\s#.*", "", line).replace("\n", " ").split("&&")
    return [part.strip() for part in parts if re.match(r"\s*python (?!-c)", part)]


COMMANDS = [(name, line) for name, page in PAGES.items() for line in dict.fromkeys(commands(page))]


class Understood(BaseException):
    """The program has parsed its command line: that is all that is asked for here."""


def only_parse(monkeypatch) -> None:
    """From now on every program stops where it has understood its command line."""
    original = argparse.ArgumentParser.parse_known_args

    def parse(parser, argv):
        _, left = original(parser, argv)
        assert not left, f"it does not know {left}"
        raise Understood

    def parse_known(parser, argv):
        _, left = original(parser, argv)
        configs.parse(left)                              # tools.compare hands these on to train.py
        raise Understood
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", parse_known)


@pytest.mark.parametrize("name,line", COMMANDS)
def test_commands_are_understood(name, line, monkeypatch):
    """The program's own parser takes every command of every page; what is behind it is not run."""
    words = shlex.split(line)[1:]
    if words[:2] in (["-m", "pytest"], ["train.py", "--help"]):
        return
    if words[0] == "-m":
        program = importlib.import_module(words[1])
        only_parse(monkeypatch)
        with pytest.raises(Understood):
            program.main(words[2:])
    elif words[0] == "train.py":
        monkeypatch.setitem(data.TASKS, "count", data.TASKS["gqa"])      # README adds this task
        config, _ = configs.parse(words[1:])
        assert set(configs.task_list(config)) <= data.TASKS.keys()
        configs.check_together(config)
        if config.method != "gated-parallel":                            # and this row
            for is_t5 in (False, True):
                methods.row(config.method, is_t5, config.set)
    else:
        assert (ROOT / words[0]).is_file()


def test_there_are_commands():
    assert len(COMMANDS) > 50


@pytest.mark.parametrize("name,old,new", [
    ("README.md", "weights/RN101.pt", "weights/RN101.safetensors"),
    ("docs/clip_vil.md", "Epoch11_LXRT.pth", "weights/clip-vil/model.safetensors")])
def test_conversions_work(name, old, new, tmp_path):
    """The lines that turn a published pickle into safetensors, run by a shell."""
    net = torch.nn.Linear(4, 3)
    (tmp_path / new).parent.mkdir(parents=True)
    if old == "weights/RN101.pt":
        torch.jit.trace(net, torch.ones(1, 4)).save(tmp_path / old)
    else:
        torch.save(net.state_dict(), tmp_path / old)
    lines = re.search(r"^    python( -c .*?\"\n)", PAGES[name], re.S | re.M)[1]
    lines = lines.replace("\n    ", "\n")
    subprocess.run(sys.executable + lines, shell=True, check=True, cwd=tmp_path)
    read = weights.read(tmp_path / new)
    assert all(torch.equal(read[key], value) for key, value in net.state_dict().items())


# ------------------------------------------------------------------------- the code that it shows

def run(folder, *argv: str) -> str:
    done = subprocess.run([sys.executable, *argv], cwd=folder, capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def copied(tmp_path_factory):
    """A copy of the code, with weights/ beside it and a small world in datasets/world."""
    folder = tmp_path_factory.mktemp("copy")
    for room in (".", "support", "world", "tools"):
        (folder / room).mkdir(exist_ok=True)
        for path in (ROOT / room).glob("*.py"):
            shutil.copy(path, folder / room)
    (folder / "weights").symlink_to(ROOT / "weights")
    (folder / "datasets/world").mkdir(parents=True)
    scenes.build(folder / "datasets/world", 60, 40, 0, False)
    return folder


def test_the_python_block_runs(copied):
    first = sorted((copied / "datasets/world/images").iterdir())[0]
    code = re.sub(r"COCO_\w+\.jpg", first.name, BLOCKS[0])
    assert len([line for line in code.splitlines() if line]) <= 12
    run(copied, "-c", code + "assert model.visual.feat.weight.grad.abs().sum() > 0\n"
        "assert lm.shared.weight.grad is None")


def add(folder) -> None:
    """Puts README's snippets where their first lines say: # FILE, above (or below) "LINE"."""
    for part in re.split(r"^# ", "\n".join(BLOCKS[1:]), flags=re.M)[1:]:
        place, _, code = part.partition("\n")
        name, where, anchor = re.fullmatch(r'(\S+), (above|below) "(.*)"', place).groups()
        text = (folder / name).read_text()
        lines = text.splitlines()
        at, = [i for i, line in enumerate(lines) if line.startswith(anchor)]
        at += where == "below"
        lines[at:at] = code.rstrip().splitlines()
        (folder / name).write_text("\n".join(lines) + "\n")


def test_a_method_and_a_task_are_added(copied):
    """README's row trains on README's task, in the files that README describes."""
    add(copied)
    assert "gated-parallel" in run(copied, "-m", "tools.count", "--method", "gated-parallel")
    mine = copied / "mine"
    (mine / "count").mkdir(parents=True)
    (mine / "images").symlink_to(copied / "datasets/world/images")
    asked = json.loads((copied / "datasets/world/vqa/karpathy_train.json").read_text())
    counting = [record for record in asked if record["sent"].startswith(("how many", "what num"))]
    for split in ("train", "val", "test"):
        (mine / f"count/{split}.json").write_text(json.dumps(counting))
    run(copied, "train.py", "--data", "mine", "--tasks", "count", "--method",
        "gated-parallel", "--batch", "8", "--steps", "4")
    results = json.loads((copied / "out/gated-parallel/results.json").read_text())
    assert "accuracy" in str(results)
    trained = weights.read(copied / "out/gated-parallel/adapter.safetensors")
    gates = [trained[name] for name in trained if name.endswith("tune.a")]
    assert gates and all(gate.abs() > 0 for gate in gates)


def test_a_record_of_ones_own(tmp_path):
    """The record that README shows is one that the task vqa reads."""
    record = json.loads(re.search(r'^    (\{"question_id".*)$', README, re.M)[1])
    for split in ("train", "val", "test"):
        (tmp_path / "vqa").mkdir(exist_ok=True)
        (tmp_path / f"vqa/karpathy_{split}.json").write_text(json.dumps([record]))
        example, = data.load_examples("vqa", split, tmp_path)
        assert example.images == ("photo",) and example.targets == record["label"]


# ------------------------------------------------------------------------------------ its numbers

def test_rows_of_the_short_table():
    """The percentages are those of docs/methods.md, whose every digit is counted."""
    section = README.split("## Eight rows")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `(.+?)` \|.*\| ([\d.]+) \|$", section, re.M)
    assert len(rows) == 8
    for name, percent in rows:
        line, = re.findall(rf"^\| [^|]*`{name}`[,| ].*$", PAGES["docs/methods.md"], re.M)
        assert line.split("|")[-3].strip() == percent, name


def test_scores_are_those_of_the_results():
    """Ours and the papers' are those of results/pictures.json, which tools/compare.py wrote."""
    results = json.loads((ROOT / "results/pictures.json").read_text())
    lines = {line["row"]: line for line in results["lines"]}
    rows = re.findall(r"^\| `(.*?)`(.*?) \| (.*) \| ([\d.-]+) \| ([\d.-]+) \|$",
                      README.split("## What it scores")[1], re.M)
    assert len(rows) >= 5
    for name, note, ours, *papers in rows:
        line = lines[name + note]
        scores = [line["scores"][task] for task in ("vqa", "gqa", "nlvr", "caption")]
        shown = map(report.shown_mean, [*scores, line["average"], line["of full"]])
        assert ours.split(" | ") == [f"{line['trainable']:.2f}", *shown], name
        entry = compare.PICTURES[name + note].paper.split(" | ")
        assert papers == ([entry[0], entry[-1]] if entry[0] else ["-", "-"]), name


@pytest.mark.parametrize("path", sorted((ROOT / "results").glob("*.json")), ids=lambda p: p.stem)
def test_tables_are_what_compare_writes_of_their_numbers(path):
    results = json.loads(path.read_text())
    lines = {line["row"]: line for line in results["lines"]}
    text = compare.markdown(results["command"], results["machine"], lines, results["findings"],
                            results["published"])
    assert text == path.with_suffix(".md").read_text()
