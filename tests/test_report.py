"""tools/report.py and support/page.py: pages of small runs, what stands on them, and how a browser
lays them out (skipped where no Chromium is installed)."""
import base64
import json
import re
import shutil
import subprocess
from dataclasses import replace
from functools import partial
from html import escape
from html.parser import HTMLParser
from io import BytesIO

import kills
import numpy as np
import pytest
import torch
from PIL import Image

import data
import train
from adapters import GATES
from support import page, runs
from tools import report
from world import moving, scenes

FOUND = [path for path in map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))
         if path]


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """name -> folder: the four sizes of G, an adapter, and a run of clips; random small models."""
    root = tmp_path_factory.mktemp("report")
    scenes.write(root / "world", pictures=100, items=100, progress=False)
    moving.write(root / "world", clips=20, progress=False)
    kills.write_models(root)
    found, rows = {}, {f"vlpet-{gate}": "vqa,nlvr,caption" for gate in GATES}
    for name, tasks in (rows | {"adapter": "vqa,nlvr,caption", "clips": "tvqa,tvc"}).items():
        found[name] = root / "out" / name
        method = "vlpet-large" if name == "clips" else name
        train.main(["--data", f"{root}/world", "--lm", f"{root}/bart", "--clip", f"{root}/clip",
                    "--method", method, "--tasks", tasks, "--steps", "12", "--batch", "16",
                    "--log-every", "3", "--beams", "2", "--device", "cpu",
                    "--out", str(found[name])])
    return found


@pytest.fixture(scope="session")
def pages(trained, tmp_path_factory):
    """name -> file: of one run, of clips, of all runs of pictures, of one question."""
    several = [str(trained[name]) for name in trained if name != "clips"]
    found = {"run": report.write([str(trained["vlpet-large"])]),
             "clips": report.write([str(trained["clips"])]), "several": report.write(several)}
    folder = tmp_path_factory.mktemp("asked")
    config = runs.read_config(str(trained["vlpet-middleX"]))
    run = report.load(config)
    example = train.load_split(config, "test")["nlvr"][0]
    seen = report.look(run, example, report.Done(config, {}, []).files)
    found["asked"] = folder / "asked.html"
    found["asked"].write_text(report.asked_page(run, seen), encoding="utf-8")
    return found


class Reader(HTMLParser):
    """Everything that a page would load, its headings, and whether its tags are closed in turn."""

    def __init__(self, text: str):
        super().__init__()
        self.loads, self.open, self.headings = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.loads += [value for name, value in attrs
                       if name in ("src", "href", "srcset", "data", "action")]
        if tag not in ("img", "meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        assert self.open.count("svg")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        if self.open and self.open[-1] in ("h1", "h2"):
            self.headings.append(text)


@pytest.mark.parametrize("name", ["run", "clips", "several", "asked"])
def test_a_page_needs_nothing_else(pages, name):
    text = pages[name].read_text(encoding="utf-8")
    reader = Reader(text)
    assert reader.open == [] and reader.loads
    for target in reader.loads:
        kind, code = re.fullmatch(r"data:image/(png|jpeg);base64,(.+)", target).groups()
        image = Image.open(BytesIO(base64.b64decode(code, validate=True)))
        image.load()
        assert image.format.lower() == kind
    style, rest = text.split("</style>")
    assert "url(" not in style and "@import" not in style and "<script" not in text
    # In every section a sentence says how it is read.
    assert text.count("<h2>") == text.count('class="lesson"') == len(reader.headings) - 1


def test_what_stands_on_a_run(trained, pages):
    text = pages["run"].read_text(encoding="utf-8")
    results = json.loads((trained["vlpet-large"] / "results.json").read_text())
    for named in (f"{results['trainable']:,} of {results['total']:,}", "behind self-attention",
                  "layer 1, behind feed-forward", f"<td>{results['caption']['cider']:.1f}</td>",
                  "color (", "has (", "&lt;s&gt;"):       # types of questions; a token
        assert named in text, named
    assert text.count("<svg") == 3                                  # a curve a task
    done = report.read_run(str(trained["vlpet-large"]))
    pairs = []
    for task in done.examples:
        pairs += [(escape(report.question(example)), escape(answer))
                  for example, answer in done.said(task)]
    shown = re.findall(r"<p><b>(.*?)</b></p><p>right: .*?</p><p class=.{6,7}>.*? said: (.*?) \(\d",
                       text)
    assert len(shown) == 4 * 3 and set(shown) <= set(pairs)
    assert "subtitles: " in pages["clips"].read_text(encoding="utf-8")


def test_scores_by_type_are_the_tasks(trained):
    """Weighted by their questions, the types' scores are the task's; the mark is the commonest
    answer's score."""
    done = report.read_run(str(trained["adapter"]))
    pairs, examples = done.said("nlvr"), done.examples["nlvr"]
    types = report.question_types(done, "nlvr")
    assert {types[x.id] for x in examples} <= scenes.TYPES["nlvr"].keys()
    text = report.by_type(pairs, types)
    bars = re.findall(r"<span>([a-z ]+) \((\d+)\)</span><span>([\d.]+)</span><i style=\"left:"
                      r"([\d.]+)%", text)
    assert sum(int(count) for _, count, _, _ in bars) == len(examples)
    total = sum(int(count) * float(score) for _, count, score, _ in bars) / len(examples)
    assert total == pytest.approx(done.results["nlvr"]["accuracy"], abs=0.06)
    assert all(float(mark) == pytest.approx(50, abs=10) for *_, mark in bars)    # half are true
    # Without types, a question's first two words.
    text = report.by_type(pairs, {})
    assert all(f"<span>{' '.join(x.text.split()[:2])} (" in text for x in examples)


def keep(passed: list, module, inputs: tuple, out) -> None:
    passed.append((*inputs[:2], out))


def test_gates_are_those_of_the_forward_pass(trained):
    """G of every size has the shape it should; with it, H becomes what the site hands on."""
    for size in GATES:
        config = runs.read_config(str(trained[f"vlpet-{size}"]))
        run = report.load(config)
        example = train.load_split(config, "test")["vqa"][0]
        tune, passed = run.model.get_submodule("lm.encoder.blocks.0.ffn").tune, []
        tune.register_forward_hook(partial(keep, passed))
        seen = report.look(run, example, {})
        assert [*seen.gates] == ["layer 1, behind self-attention", "layer 1, behind feed-forward"]
        G = seen.gates["layer 1, behind feed-forward"]
        assert len(G) == len(seen.words) + seen.visual == len(seen.words) + 36
        assert (np.ptp(G, 0).max() > 0) == (size in ("large", "middleX"))     # differs by token
        assert (np.ptp(G, 1).max() > 0) == (size in ("large", "middleY"))     # by channel
        h, x, out = passed[0]
        with torch.no_grad():
            H = tune.update(h, x, None)
        np.testing.assert_allclose(G * H[0].numpy(), out[0].numpy(), rtol=1e-5, atol=1e-6)
        assert not any(module._forward_hooks for name, module in run.model.named_modules()
                       if name.endswith("gate"))                    # taken away again
        assert seen.answers == report.answers(run, example)
        assert seen.tiles == [(None, 6, 6)]                         # no picture was at hand


def test_other_rows_have_no_gates(trained):
    config = runs.read_config(str(trained["adapter"]))
    example = train.load_split(config, "test")["vqa"][0]
    seen = report.look(report.load(config), example, report.Done(config, {}, []).files)
    assert seen.gates == {} and report.gate_maps({"": seen}) == ""
    assert seen.tiles[0][0].size == (144, 144)


def test_several_runs(trained, pages):
    text = pages["several"].read_text(encoding="utf-8")
    assert pages["several"] == trained["adapter"].parent / "report.html"
    assert "5 ways to tune one model" in text
    for name in trained.keys() - {"clips"}:
        results = json.loads((trained[name] / "results.json").read_text())
        row = re.search(f"<td>(\\d) {name}</td><td>([\\d.]+)</td>.*?</tr>", text)
        assert float(row[2]) == round(100 * results["trainable"] / results["total"], 2)
        assert f"<td>{results['average']:.1f}</td>" in row[0]
        assert f'class="dot">{row[1]}</text>' in text               # in its dot
        # And its G of the first layer and the last.
        maps = re.findall(f"<h3>{name} (.*?)</h3>", text)
        if name != "adapter":
            assert maps == ["layer 1, behind self-attention", "layer 1, behind feed-forward"]


def test_runs_of_other_tasks(trained, tmp_path):
    """No average is drawn that cannot be compared; a curve has its row's colour everywhere."""
    folders = [str(trained["clips"]), str(trained["adapter"])]
    text = report.write(folders, tmp_path / "mixed.html").read_text(encoding="utf-8")
    assert "average score" not in text and "<th>caption</th>" in text and "<th>tvqa</th>" in text
    number = int(re.search(r"<td>(\d) adapter,", text)[1])
    curve = re.search("<h3>vqa</h3>.*?</svg>", text)[0]
    assert f"stroke:var(--c{number - 1})" in curve and curve.count("<polyline") == 1


def test_a_run_without_steps_has_a_page(trained, tmp_path):
    """As far as pictures are still there they are shown."""
    config = json.loads((trained["adapter"] / "config.json").read_text())
    argv = ["--data", config["data"], "--lm", config["lm"], "--clip", config["clip"], "--tasks",
            "vqa", "--epochs", "0", "--out", str(tmp_path / "zero")]
    train.main(argv)
    (tmp_path / "empty").mkdir()
    done = report.read_run(str(tmp_path / "zero"))
    assert "<td>steps</td><td>0</td>" in report.settings(done)
    gone = replace(done.config, images=str(tmp_path / "empty"), clips="nowhere")
    assert done.files and report.Done(gone, done.results, done.log).files == {}


def test_runs_are_named_by_what_differs(trained):
    """Seeds are one name, a control or --set another; means and spreads are over seeds."""
    done = report.read_run(str(trained["adapter"]))

    def like(average: float, **other) -> report.Done:
        return report.Done(replace(done.config, **other), done.results
                           | {"average": average}, done.log)
    groups = report.by_name([like(1.0, seed=1), like(3.0, seed=2), like(5.0, control="blind"),
                             like(6.0, set="r=4")])
    # The best first.
    assert [*groups] == ["adapter, set r=4", "adapter, control blind", "adapter"]
    assert report.shown_mean([d.results["average"] for d in groups["adapter"]]) == "2.0 ± 1.4"
    assert [*report.by_name([like(1.0, seed=1, lm="x")])] == ["adapter"]
    # The recipe's settings count among runs of one row; each seed may begin with its own run.
    assert [*report.by_name([like(1.0, lr=1e-3), like(3.0, lr=1e-2),
                             like(2.0, method="full", lr=1e-4)])] == \
        ["adapter, lr 0.01", "full", "adapter, lr 0.001"]
    assert [*report.by_name([like(1.0, seed=1, pretrained="a"), like(3.0, seed=2, pretrained="b"),
                             like(4.0)])] == ["adapter", "adapter, pretrained yes"]


def test_a_chart_puts_points_where_they_belong():
    drawn = page.chart({"a": [(0, 1.0, 0), (50, 3.0, 0), (100, 2.0, 0)]}, "step", "loss")
    points = re.search(r'polyline points="([^"]+)"', drawn)[1].split()
    (x0, y0), (x1, y1), (x2, y2) = ([*map(float, point.split(","))] for point in points)
    assert x0 == page.LEFT and x2 == page.RIGHT and x1 == (x0 + x2) / 2
    assert page.BOTTOM > y0 > y2 > y1 > page.TOP and y2 == pytest.approx((y0 + y1) / 2, abs=0.11)
    # Ten times as much is always as far to the right; every dot has its curve's number.
    dots = {f"row {i}": [(10.0 ** (i % 3), float(i // 3), 0.1)] for i in range(9)} | {"none": []}
    drawn = page.chart(dots, "trained, %", "score", log=True)
    at = sorted({float(x) for x in re.findall(r'circle cx="([\d.]+)"', drawn)})
    assert len(at) == 3 and at[2] - at[1] == pytest.approx(at[1] - at[0], abs=0.11)
    assert re.findall(r'class="dot">(\d)<', drawn) == [*"123456789"]
    assert page.chart({"none": []}, "x", "y") == ""
    assert "NaN" not in page.chart({"one": [(3, 7.0, 0.0)]}, "x", "y", log=True)


def test_colours_and_words():
    x = np.array([0.0, 0.5, 1.0])
    assert page.colours(x, 0, 1).tolist() == page.STOPS.astype(int).tolist()
    assert len(np.unique(page.colours(np.full(3, 0.7), 0.7, 0.7), axis=0)) == 1
    told = page.chips(["<s>", "red"], np.array([0.0, 1.0]), 0, 1)
    assert "&lt;s&gt;" in told and "color:#fff" in told and "color:#000" in told
    assert "0.500 to 0.500, mean 0.500" in page.matrix(np.full((2, 3), 0.5, np.float32))


def test_text_from_outside_stays_text(trained):
    """A question or an answer with tags in it is shown, not obeyed."""
    example = data.Example("vqa", 1, "<script>x</script>", (), {"<b>": 1.0})
    seen = report.Look(example, [("<i>", 0.5)], {}, [], 0, [])
    text = report.card(seen, "<u>", "<b>")
    assert not re.search("<(script|i|u)>", text) and "&lt;script&gt;" in text


def test_errors_are_one_sentence(trained, tmp_path):
    shutil.copytree(trained["adapter"], tmp_path / "run")
    for change, named in (
            (lambda run: (run / "predictions" / "vqa.json").write_text("[]"), "vqa.json"),
            (lambda run: (run / "log.jsonl").write_text("x"), "results.json"),
            (lambda run: (run / "results.json").unlink(), "never tested")):
        change(tmp_path / "run")
        with pytest.raises(SystemExit, match=named) as error:
            report.main([str(tmp_path / "run")])
        assert "\n" not in str(error.value)
    with pytest.raises(SystemExit, match="nowhere"):
        report.main(["nowhere"])


# ------------------------------------------------------------------------- in a browser

CHECK = """<script>
window.addEventListener("error", event => said.push("error " + event.target.outerHTML), true);
const said = [];
window.addEventListener("load", () => {
  const width = document.documentElement.clientWidth;
  if (innerWidth != WIDTH) said.push("width " + innerWidth);
  if (document.documentElement.scrollWidth > width)
    said.push("overflow " + document.documentElement.scrollWidth);
  for (const image of document.images)
    if (!image.complete || !image.naturalWidth) said.push("not loaded " + image.alt);
  for (const element of document.body.querySelectorAll("*")) {
    const box = element.getBoundingClientRect();
    if (box.right > width + 1 && !element.closest(".wide table"))
      said.push("outside the page: " + element.outerHTML.slice(0, 80));
    const drawing = element.ownerSVGElement;
    if (!drawing) continue;
    const rim = drawing.getBoundingClientRect();
    if (box.left < rim.left - 1 || box.right > rim.right + 1 || box.top < rim.top - 1
        || box.bottom > rim.bottom + 1) said.push("outside its drawing: " + element.outerHTML);
  }
  for (const entry of performance.getEntriesByType("resource"))
    if (!entry.name.startsWith("data:")) said.push("asks for " + entry.name);
  parent.document.title = said.join("; ") || "fine";
});
</script>"""


def browse(path, width: int, tmp_path) -> str:
    """What the check above says about a page in a window of this width."""
    page_file, text = tmp_path / f"{width}.html", path.read_text(encoding="utf-8")
    checked = text.replace("</head>", CHECK.replace("WIDTH", f"{width}") + "</head>")
    # In a frame, for Chromium's windows are at least 500 wide.
    page_file.write_text(f'<title>nothing</title><iframe style="width:{width}px;height:900px;'
                         f'border:0" srcdoc="{escape(checked)}"></iframe>', encoding="utf-8")
    out = subprocess.run(
        [FOUND[0], "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
         f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1200,900", "--dump-dom",
         page_file.as_uri()], capture_output=True, text=True, timeout=120)
    found = re.search("<title>(.*?)</title>", out.stdout, re.DOTALL)
    assert found, out.stderr[-2000:]
    return found[1]


@pytest.mark.skipif(not FOUND, reason="no Chromium is installed (apt-get install chromium)")
@pytest.mark.parametrize("width", [360, 1100])
@pytest.mark.parametrize("name", ["run", "clips", "several", "asked"])
def test_a_browser_shows_it_whole(pages, tmp_path, name, width):
    assert browse(pages[name], width, tmp_path) == "fine"


@pytest.mark.skipif(not FOUND, reason="no Chromium is installed (apt-get install chromium)")
def test_the_browser_sees_what_is_wrong(tmp_path):
    """The check itself: a lost picture, a wide line, a circle outside its drawing."""
    content = ('<img src="none.png" alt="none"><div style="width:900px">.</div>'
               '<svg viewBox="0 0 10 10"><circle cx="30" cy="5" r="2"></circle></svg>')
    wrong = page.page("x", "", [("", content, "")])
    (tmp_path / "page.html").write_text(wrong, encoding="utf-8")
    said = browse(tmp_path / "page.html", 360, tmp_path)
    for named in ("not loaded none", "overflow", "outside the page", "outside its drawing"):
        assert named in said, said
