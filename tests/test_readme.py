"""What the README says is so: files, flags, parameter counts."""
import dataclasses
import re

from house import FILES, ROOT

import adapters
import config as configs
import methods
from tools import count

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_links_lead_somewhere():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_every_file_is_introduced():
    section = README.split("## Read it")[1].split("\n## ")[0]
    missing = {str(path.relative_to(ROOT)) for path in FILES.values()} - {
        target for target in re.findall(r"\]\(([^)]+\.py)\)", section)}
    assert not missing, f"README, section 'Read it': name {', '.join(sorted(missing))}"


def test_flags_exist():
    known = {configs.flag(f.name) for f in dataclasses.fields(configs.Config)}
    known |= {"--test", "--resume", "--help", "--split"}
    for line in re.findall(r"python train\.py.*", README):
        assert set(re.findall(r"--[\w-]+", line.split("`")[0])) <= known, line


def test_modules_exist():
    for module in re.findall(r"python -m ([\w.]+\w)", README):
        assert module == "pytest" or module in FILES, module


def test_rows():
    """The rows of the README's table, with the counts that tools/count.py prints and the classes
    that adapters.py has."""
    rows = re.findall(r"\| (`.+`) \|.*\| (.*) \|.*\| ([\d,]+) \| ([\d.]+) \| [\d.-]+ \|", README)
    ours = {name: (trainable, 100 * trainable / total) for name, trainable, total in
            count.table("bart-base", 2048, methods.methods(is_t5=False))}
    assert len(rows) >= 8
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
        for is_t5 in (False, True):
            methods.row(method or configs.Config.method, is_t5, changes)
