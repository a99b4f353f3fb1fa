"""tools/compare.py: a whole comparison on a small world, and its verdicts by hand."""
import csv
import json
from functools import partial
from statistics import mean

import kills
import pytest
from house import ROOT

import methods
import train
from support.gate import BadInput
from tools import compare, count
from world import scenes

ROWS = "full,adapter,adapter (behind V&L),adapter (one task alone)"


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    root = tmp_path_factory.mktemp("compare")
    scenes.write(root / "world", pictures=100, items=100, progress=False)
    kills.write_models(root)
    return ["--data", f"{root}/world", "--lm", f"{root}/bart", "--clip", f"{root}/clip",
            "--batch", "32", "--beams", "1", "--device", "cpu"]


def numbers(table) -> dict:
    lines = json.loads(table.with_suffix(".json").read_text())["lines"]
    return {line["row"]: line for line in lines}


def test_a_comparison(flags, tmp_path, capfd):
    """Four entries, six runs; what was killed goes on, what is finished stays."""
    argv = ["--study", "changes", "--rows", ROWS, "--seeds", "7", "--tasks", "gqa,nlvr",
            "--steps", "2", "--out", f"{tmp_path}/runs", "--to", f"{tmp_path}/t", *flags]
    compare.main(argv)
    said, first = capfd.readouterr().out, numbers(tmp_path / "t")
    for row in ROWS.split(","):
        assert f"| {row} | " in said
    assert "ways to tune one model" in (tmp_path / "t.html").read_text(encoding="utf-8")
    with open(tmp_path / "t.csv") as file:
        assert len(list(csv.DictReader(file))) == 2 * len(first) == 8
    own = json.loads((tmp_path / "runs/adapter/7/results.json").read_text())
    assert first["adapter"]["scores"] == {"gqa": [own["gqa"]["accuracy"]],
                                          "nlvr": [own["nlvr"]["accuracy"]]}
    assert first["adapter"]["average"] == [own["average"]] and first["adapter"]["steps"] == 2
    alone = json.loads((tmp_path / "runs/adapter-one-task-alone-/7/nlvr/config.json").read_text())
    assert (alone["tasks"], alone["steps"]) == ("nlvr", 2)
    behind = json.loads((tmp_path / "runs/adapter-behind-V-L-/7/config.json").read_text())
    assert behind["pretrained"] == f"{tmp_path}/runs/full/7"

    (tmp_path / "runs/adapter/7/results.json").unlink()     # as if it had been killed before
    kept = (tmp_path / "runs/full/7/results.json").stat().st_mtime_ns
    compare.main(argv)
    assert "[1 of 1] adapter, seed 7" in capfd.readouterr().out
    assert (tmp_path / "runs/full/7/results.json").stat().st_mtime_ns == kept
    again = numbers(tmp_path / "t")
    assert again["adapter"]["scores"] == first["adapter"]["scores"]
    with pytest.raises(SystemExit, match="of other settings .lr.: name another --out"):
        compare.main([*argv, "--lr", "1e-4"])
    with pytest.raises(SystemExit, match="nothing.*--method|no method|nothing"):
        compare.main(["--rows", "nothing"])


def test_nothing_is_drawn_yet(flags, tmp_path, monkeypatch):
    """In a fresh clone the first command draws its data."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train.scenes, "write", partial(scenes.write, pictures=100, items=100,
                                                       progress=False))
    jobs = compare.plan({"adapter": compare.Entry()}, [7], tmp_path / "out", flags[2:])
    compare.prepare(jobs)
    assert (tmp_path / "datasets/world/images").is_dir()


def test_verdicts():
    """A - B against the margin, give or take the spread of a difference."""
    assert compare.compare([10, 12], [4, 6], 0) == (6, pytest.approx(2), "holds")
    assert compare.compare([10, 12], [4, 6], 5)[2] == "within the spread"
    assert compare.compare([10, 12], [4, 6], 10)[2] == "does not hold"
    assert compare.compare([4, 6], [10, 12], -7)[2] == "within the spread"
    assert compare.compare([10], [4, 6], 0)[2] == "one seed"


def test_scores_weigh_alike():
    """A task's score counts as a share of full fine-tuning's."""
    lines = {"full": {"scores": {"vqa": [50, 70], "caption": [500, 500]}},
             "adapter": {"scores": {"vqa": [30, 60], "caption": [500, 250]}}}
    compare.normalise(lines)
    assert lines["adapter"]["of full"] == pytest.approx([mean([50, 100]), mean([100, 50])])


def test_published_numbers():
    """Shares of parameters as counted here; averages as of the scores; no finding about nothing."""
    counted = {name: 100 * trainable / total for name, trainable, total in
               count.table("bart-base", 2048, methods.methods(is_t5=False))}
    for name, entry in compare.PICTURES.items():
        if not entry.paper:
            continue
        share, scores, average = entry.paper.split(" | ")
        scores = [float(score) for score in scores.split() if score != "-"]
        if name in counted:
            assert abs(float(share) - counted[name]) < 0.025, name
        assert not scores or abs(mean(scores) - float(average)) < 0.06, name
    known = compare.PICTURES.keys() | compare.CHANGES.keys() | compare.CLIPS.keys()
    for text, a, b, _, _ in compare.FINDINGS:
        assert {a, b} <= known, text


@pytest.mark.parametrize("study", compare.STUDIES)
def test_every_entry_can_be_run(study, flags, tmp_path):
    entries, always, *_ = compare.STUDIES[study]
    if study == "clips":
        flags = []                                          # nothing is read of clips yet
    jobs = compare.plan(entries, [1, 2], tmp_path, [*always.split(), *flags])
    assert {job.name for job in jobs} == entries.keys()
    assert len({job.folder for job in jobs}) == len(jobs)
    late = [bool(job.config.pretrained) for job in jobs]
    assert late == sorted(late)                             # behind the runs that they begin with


def test_a_failed_run_is_named(flags, tmp_path):
    """The others are finished, the table is written."""
    argv = ["--rows", "frozen,adapter", "--seeds", "7", "--out", f"{tmp_path}/runs", "--jobs", "1",
            "--tasks", "nlvr", "--steps", "1", *flags]
    (tmp_path / "runs/frozen/7").mkdir(parents=True)
    (tmp_path / "runs/frozen/7/notes.txt").write_text("mine")
    with pytest.raises(SystemExit, match="1 runs failed, which is told in .*frozen/7.txt"):
        compare.main(argv)
    assert "it exists" in (tmp_path / "runs/frozen/7.txt").read_text()
    assert list(numbers(tmp_path / "runs/pictures")) == ["adapter"]


def test_nothing_finished(tmp_path):
    with pytest.raises(BadInput, match="no run is finished"):
        compare.write("", compare.PICTURES, [], tmp_path / "t")


@pytest.mark.parametrize("flags,shown", [
    ([], True), (["--lm", "weights/tiny-t5"], False), (["--tasks", "vqa"], False)])
def test_published_numbers_stand_beside_what_they_are_of(flags, shown, tmp_path, monkeypatch):
    """Of the papers' four tasks, on BART."""
    class Asked(Exception):
        """With the entries that the table would be written of."""

    def write(command, entries, jobs, to):
        raise Asked(entries)

    monkeypatch.chdir(ROOT)
    for name, instead in ("prepare", lambda jobs: None), ("run_all", lambda *_: None):
        monkeypatch.setattr(compare, name, instead)
    monkeypatch.setattr(compare, "write", write)
    with pytest.raises(Asked) as asked:
        compare.main(["--rows", "adapter", "--out", str(tmp_path), *flags])
    (entries,) = asked.value.args
    assert (entries["adapter"].paper != "") == shown
