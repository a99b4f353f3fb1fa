"""What do the commands of the lessons print?

    python -m lessons.run                   # runs them all, writes what they print into the pages
    python -m lessons.run 3 5               # those of pages 3 and 5
    python -m pytest tests/test_lessons.py

A fenced block that begins with "$ " is a command with its output: what stands below the command is
what it printed when this program ran last. What should not be shown, the command itself cuts off
(| tail -3), and it goes on in the next line while a quote is open. The commands of a page run one
after another in a fresh copy of the code: a later one finds what an earlier one left.
"""
import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

from support.gate import program, reading, replace_file

LESSONS = Path(__file__).resolve().parent
ROOT = LESSONS.parent
PAGES = {path.name[0]: path for path in sorted(LESSONS.glob("[1-8]_*.md"))}
BLOCK = re.compile(r"^```\n\$ (.*?)^```$", re.M | re.S)
COMMAND = re.compile(r"""(?:[^"'\n]|"[^"]*"|'[^']*')*\n""")      # to a line's end outside quotes
STAMP = re.compile(r"^\*Outputs: .*\*$", re.M)


def split(block: str) -> tuple[str, str]:
    """A block behind its "$ " -> the command, and the output below it."""
    command = COMMAND.match(block)[0]
    return command, block[len(command):]


def seconds() -> float:
    """Processor time of all commands so far: it does not depend on what else is running."""
    return os.times().children_user + os.times().children_system


def copy_code(folder: Path) -> None:
    """The code as it is now, with the same weights and the same built-in data."""
    left_out = shutil.ignore_patterns(".*", "__pycache__", "out", "weights", "datasets")
    shutil.copytree(ROOT, folder, ignore=left_out, dirs_exist_ok=True)
    for name in ("weights", "datasets"):
        (ROOT / name).mkdir(exist_ok=True)
        (folder / name).symlink_to(ROOT / name)


def run(page: Path) -> None:
    """Runs a page's commands and rewrites their outputs and the line that says how they came."""
    started = seconds()
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # of "python"
    with tempfile.TemporaryDirectory() as folder:
        copy_code(Path(folder))

        def printed(found: re.Match) -> str:
            (command, _), before = split(found[1]), seconds()
            print(f"$ {command}", end="", flush=True)
            done = subprocess.run(["bash", "-o", "pipefail", "-c", command], cwd=folder, text=True,
                                  stdout=subprocess.PIPE, env=os.environ | {"PATH": path})
            assert done.returncode == 0, f"{page.name}: the command failed: {command}"
            print(f"{done.stdout}# {seconds() - before:.0f} s\n")
            return f"```\n$ {command}{done.stdout}```"

        text = BLOCK.sub(printed, page.read_text(encoding="utf-8"))
    stamp = (f"*Outputs: `python -m lessons.run {page.name[0]}`, {seconds() - started:.0f} s of "
             f"processor time, torch {version('torch')}.*")
    replace_file(page, STAMP.sub(stamp, text))


@program
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Runs the lessons' commands.")
    parser.add_argument("pages", nargs="*", help="their numbers; default: all")
    numbers = parser.parse_args(argv).pages or PAGES
    with reading("the pages"):
        pages = [PAGES[number] for number in numbers]
    for page in pages:
        run(page)


if __name__ == "__main__":
    main()
