"""The short form of tests/kills.py: a few SIGKILLs, and two first runs at once."""
import subprocess
import sys

from house import ROOT


def test_killed_runs_leave_what_undisturbed_ones_do():
    program = [sys.executable, "-m", "tests.kills", "--kills", "6", "--scenarios", "clips", "t5"]
    done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("3 kills, identical") == 2 and "two first runs at once" in done.stdout
