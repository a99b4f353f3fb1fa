"""What the pages of docs/ show is so: figures, the table of all rows, --set, the weights' cards.

    python -m pytest tests/test_docs.py
"""
import importlib.util
import json
import re
from xml.etree import ElementTree

import pytest
import torch
from house import ROOT

import adapters
import methods
from tools import count

DOCS = ROOT / "docs"


def page(name: str) -> str:
    return (DOCS / f"{name}.md").read_text(encoding="utf-8")


def load_figures():
    """docs/figures.py, which is no package."""
    spec = importlib.util.spec_from_file_location("figures", DOCS / "figures.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


FIGURES = load_figures()


@pytest.mark.parametrize("name", FIGURES.FIGURES)
def test_figures_are_what_the_script_draws(name):
    drawn = FIGURES.FIGURES[name]()
    assert drawn == (DOCS / f"{name}.svg").read_text(encoding="utf-8"), "run python docs/figures.py"
    for element in ElementTree.fromstring(drawn).iter():
        for key, most in (("x", FIGURES.WIDTH), ("font-size", 16)):
            assert 0 <= float(element.get(key, 0)) <= most
        assert float(element.get("font-size", 12)) >= 11           # readable on a phone


def test_the_map_names_every_site():
    drawn = (DOCS / "map.svg").read_text(encoding="utf-8")
    for site in (*methods.SUBLAYERS, "decoder.cross_attn.v", "encoder.prompt"):
        assert f">{site}</text>" in drawn, site


def test_the_kronecker_figure_by_hand():
    """The last matrix of the figure is the sum of the two above it."""
    drawn = (DOCS / "kronecker.svg").read_text(encoding="utf-8")
    found = [float(x) for x in re.findall(r'font-size="14"[^>]*>(-?\d+)</text>', drawn)]
    R1, W1, M1, R2, W2, M2, M = torch.tensor(found).split([4, 4, 16, 4, 4, 16, 16])
    for R, W, product in ((R1, W1, M1), (R2, W2, M2)):
        assert torch.equal(torch.kron(R.view(2, 2), W.view(2, 2)), product.view(4, 4))
    assert torch.equal(M1 + M2, M)


def test_rows():
    """Every row, with the counts that tools/count.py prints and the classes of adapters.py."""
    rows = re.findall(r"\| (`.+`) \|.*\| (.*) \|.*\| ([\d,]+) \| ([\d.]+) \| [\d.-]+ \|",
                      page("methods"))
    ours = {name: (trainable, 100 * trainable / total) for name, trainable, total in
            count.table("bart-base", 2048, methods.methods(is_t5=False))}
    told = set()
    for cell, held_by, trainable, percent in rows:
        assert all(hasattr(adapters, name) for name in re.findall(r"`(\w+)`", held_by)), held_by
        for name in re.findall(r"`([^`]+)`", cell):
            told.add(name)
            assert int(trainable.replace(",", "")) == ours[name][0], name
            assert abs(float(percent) - ours[name][1]) < 0.0051, name
    assert told == ours.keys(), "docs/methods.md tells every row: add yours"


def card(name: str) -> dict:
    return json.loads((ROOT / "weights" / name / "card.json").read_text())


def table(text: str, first: str) -> dict[str, list[str]]:
    """Rows of the Markdown table whose head begins with `first`: first cell -> the others."""
    lines = text[text.index(f"| {first}"):].split("\n\n")[0].splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {"": cells[0][1:]} | {row[0]: row[1:] for row in cells[2:]}


def test_numbers_of_the_cards():
    """docs/weights.md quotes card.json."""
    weights = page("weights")
    for name, row in table(weights, "folder").items():
        if name:
            assert int(row[1].replace(",", "")) == card(name.strip("`"))["parameters"], name
    probes = table(weights, "| kind")
    for name in ("linear probe", "linear probe, untrained"):
        for key, told in zip(probes[""], probes[name]):
            assert float(told) == round(100 * card("tiny-clip")[name][key], 1), key
    read = table(weights, "| vqa")
    for name, row in list(read.items())[1:]:
        folder, how = name.split(", ")
        for task, told in zip(read[""], row):
            assert float(told) == card(folder)["described scenes, % right"][f"{how}/{task}"], name
    clips = table(weights, "| tvqa")
    for task, told in zip(clips[""], clips["tiny-bart-video"]):
        assert float(told) == card("tiny-bart-video")["described scenes, % right"][task], task
