"""What the README says is so: files, flags, parameter counts."""
import dataclasses
import re
from pathlib import Path

import model
import train

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def test_links_lead_somewhere():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_every_file_is_introduced():
    table = README.split("## Read it")[1].split("##")[0]
    assert set(re.findall(r"\[(\w+\.py)\]", table)) == {p.name for p in ROOT.glob("*.py")}


def test_flags_exist():
    known = {train.flag(f.name) for f in dataclasses.fields(train.Config)} | {"--test", "--resume"}
    for line in re.findall(r"python train\.py.*", README):
        assert set(re.findall(r"--[\w-]+", line.split("`")[0])) <= known, line


def test_counts():
    rows = re.findall(r"\| `([\w-]+)` \|.*\| ([\d,]+) \| ([\d.]+) \| [\d.]+ \|", README)
    ours = {name: (trainable, 100 * trainable / total)
            for name, trainable, total in model.count_table("bart-base", 2048)}
    assert {name for name, *_ in rows} == set(ours)
    for name, trainable, percent in rows:
        assert int(trainable.replace(",", "")) == ours[name][0], name
        assert abs(float(percent) - ours[name][1]) < 0.0051, name
