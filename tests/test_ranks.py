"""Several processes train as one does; a run goes on with another number of them."""
import os
import subprocess
import sys

import pytest
import test_train
import torch
from house import ROOT
from test_train import arguments, content, trained

import train

# 100 questions of vqa in batches of 32: the last one has four examples for five parts.
MORE = ("--dropout", "0", "--log-every", "1", "--save-every", "5", "--epochs", "1")


def launch(count: int, argv: list[str], more: str = "") -> subprocess.CompletedProcess:
    program = [str(ROOT / "train.py")]
    if more:                                               # a test's own program around train.main
        program = ["--no-python", sys.executable, "-c", more]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
               f"--nproc_per_node={count}", *program, *argv]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})


def losses(folder) -> list[tuple]:
    return [(line["step"], *line["loss"].items()) for line in content(folder / "log.jsonl")]


small = test_train.small                                   # a fixture


@pytest.fixture(scope="module")
def alone(small, tmp_path_factory):
    out = tmp_path_factory.mktemp("ranks") / "alone"
    train.main(arguments(small, out, *MORE))
    return out


def same_run(folder, alone) -> None:
    """Up to the rounding of sums in another order."""
    for (step, *found), (at, *want) in zip(losses(folder), losses(alone), strict=True):
        assert step == at and [task for task, _ in found] == [task for task, _ in want]
        for (_, a), (_, b) in zip(found, want):
            assert a == pytest.approx(b, rel=1e-4)
    a, b = trained(folder), trained(alone)
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=2e-4, rtol=1e-2)
    one, two = (content(each / "results.json")["average"] for each in (folder, alone))
    assert one == pytest.approx(two, abs=2)


# Whatever the second rank would put into a file, it says here.
WATCHED = """
import os, sys, train
from support import ranks
taken = os.replace
def replace(source, to, *given):
    print("written by rank", ranks.RANK, file=sys.stderr, flush=True)
    return taken(source, to, *given)
os.replace = replace
train.main(sys.argv[1:])
"""


def test_two_ranks(small, alone, tmp_path):
    """The same as one process; the second writes and prints nothing."""
    ended = launch(2, arguments(small, tmp_path / "two", *MORE), WATCHED)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert ended.stdout.count("| **average**") == 1
    assert "written by rank 0" in ended.stderr and "written by rank 1" not in ended.stderr
    same_run(tmp_path / "two", alone)


def test_accumulate(small, alone, tmp_path):
    """A batch in five parts, one after another, more than some batches have examples."""
    train.main(arguments(small, tmp_path / "five", *MORE, "--accumulate", "5"))
    same_run(tmp_path / "five", alone)


DIES = """
import os, sys, train
from support import ranks
taken = ranks.add_up
def add_up(*given, count=[0]):
    count[0] += 1
    if count[0] == 8 and ranks.RANK == 1:
        os._exit(9)
    return taken(*given)
ranks.add_up = add_up
train.main(sys.argv[1:])
"""


def test_a_rank_dies(small, alone, tmp_path):
    """The job ends with a sentence, and goes on with three ranks."""
    out = tmp_path / "dies"
    ended = launch(2, arguments(small, out, *MORE), DIES)
    assert ended.returncode != 0 and "another rank ended" in ended.stderr
    ended = launch(3, ["--resume", str(out)])
    assert ended.returncode == 0, ended.stderr[-3000:]
    same_run(out, alone)
