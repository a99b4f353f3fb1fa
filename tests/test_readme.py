"""What the README says is so: files, flags, parameter counts."""
import dataclasses
import re
from pathlib import Path

import adapters
import model
import methods as rows
import train

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def test_links_lead_somewhere():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_every_file_is_introduced():
    table = README.split("## Read it")[1].split("##")[0]
    assert set(re.findall(r"\[([\w/]+\.py)\]", table)) == {
        str(p.relative_to(ROOT)) for folder in (".", "support", "tools", "world")
        for p in (ROOT / folder).glob("*.py") if p.name != "__init__.py"}


def test_flags_exist():
    known = {train.flag(f.name) for f in dataclasses.fields(train.Config)}
    known |= {"--test", "--resume", "--help", "--split"}
    for line in re.findall(r"python train\.py.*", README):
        assert set(re.findall(r"--[\w-]+", line.split("`")[0])) <= known, line


def test_rows():
    """Every row once, with the counts that model.py prints and classes that adapters.py has."""
    rows = re.findall(r"\| (`.+`) \|.*\| (.*) \|.*\| ([\d,]+) \| ([\d.]+) \| [\d.-]+ \|", README)
    ours = {name: (trainable, 100 * trainable / total)
            for name, trainable, total in model.count_table("bart-base", 2048)}
    names = [name for row in rows for name in re.findall(r"`([^`]+)`", row[0])]
    assert sorted(names) == sorted(ours)
    for cell, held_by, trainable, percent in rows:
        assert all(hasattr(adapters, name) for name in re.findall(r"`(\w+)`", held_by)), held_by
        for name in re.findall(r"`([^`]+)`", cell):
            assert int(trainable.replace(",", "")) == ours[name][0], name
            assert abs(float(percent) - ours[name][1]) < 0.0051, name


def test_changes_are_changes():
    """Every --set of the README is one that its row takes."""
    lines = re.findall(r"python train\.py (?:--method (\S+) )?--set (\S+)", README)
    assert len(lines) > 5
    for method, changes in lines:
        for t5 in (False, True):
            rows.row(method or train.Config.method, t5, changes)
