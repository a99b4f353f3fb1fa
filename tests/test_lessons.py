"""lessons/: every exercise fails before and passes after its solution; pages, commands, outputs.

    python -m pytest tests/test_lessons.py
"""
import ast
import importlib
import importlib.util
import re
import shlex
import subprocess
import sys
from types import ModuleType

import pytest
import torch
from house import ROOT, measure
from test_readme import Understood, heading_links, only_parse

import adapters
import config as configs
import data
import methods
from lessons import run as lessons
from tools import compare, count

LESSONS = ROOT / "lessons"
PAGES = {path.name: path.read_text(encoding="utf-8") for path in sorted(LESSONS.glob("*.md"))}
CODE = sorted(LESSONS.rglob("*.py"))
EXERCISES = sorted(path.stem for path in (LESSONS / "exercises").glob("*.py")
                   if not path.name.startswith("test_"))


# ----------------------------------------------------------------------------------- exercises

def load(room: str, name: str) -> ModuleType:
    """A file of lessons/exercises or lessons/solutions, which are no packages."""
    spec = importlib.util.spec_from_file_location(name, LESSONS / room / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load_tests(name: str, room: str, monkeypatch) -> list:
    """The tests of an exercise, where `from NAME import ...` finds the file of this room."""
    monkeypatch.setitem(sys.modules, name, load(room, name))
    tests = vars(load("exercises", f"test_{name}"))
    return [test for key, test in tests.items() if key.startswith("test_")]


@pytest.mark.parametrize("name", EXERCISES)
def test_an_exercise_is_red_before(name, monkeypatch):
    tests = load_tests(name, "exercises", monkeypatch)
    assert tests
    for test in tests:
        with pytest.raises(NotImplementedError):
            test()


@pytest.mark.parametrize("name", EXERCISES)
def test_and_green_after_its_solution(name, monkeypatch):
    for test in load_tests(name, "solutions", monkeypatch):
        test()


def definitions(path) -> dict[str, list[str]]:
    """The functions and classes of a file, with the names of their arguments or bases."""
    found = {}
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef):
            found[node.name] = [arg.arg for arg in node.args.args]
        elif isinstance(node, ast.ClassDef):
            found[node.name] = [ast.unparse(base) for base in node.bases]
    return found


@pytest.mark.parametrize("name", EXERCISES)
def test_a_solution_defines_what_was_asked_for(name):
    asked, solved = (definitions(LESSONS / room / f"{name}.py")
                     for room in ("exercises", "solutions"))
    assert asked == solved


def test_pytest_alone_leaves_the_exercises_out():
    """Unsolved exercises are no failures of the repository."""
    assert "testpaths = tests\n" in (ROOT / "pytest.ini").read_text()


# --------------------------------------------------------------------------------------- pages

def test_there_are_eight():
    numbered = [name for name in PAGES if name != "README.md"]
    assert [name[0] for name in numbered] == list("12345678") == list(lessons.PAGES)
    for name in numbered:
        assert f"]({name})" in PAGES["README.md"], name


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_short(name):
    lines = PAGES[name].splitlines()
    assert len(lines) <= 120
    assert [line for line in lines if len(line) > 120 and not line.startswith(("|", "$"))] == []


@pytest.mark.parametrize("name", [name for name in PAGES if name != "README.md"])
def test_a_page_has_its_exercise(name):
    found, = set(re.findall(r"python -m pytest lessons/exercises/test_(\w+)\.py", PAGES[name]))
    assert found in EXERCISES
    for room in ("exercises", "solutions"):
        assert f"]({room}/{found}.py)" in PAGES[name], room
    assert lessons.STAMP.search(PAGES[name]), "it does not say how its outputs came"


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name):
    for target, anchor in re.findall(r"\]\((?!http)([^)#]*)(?:#([^)]+))?\)", PAGES[name]):
        path = LESSONS / target if target else LESSONS / name
        assert path.exists(), target
        assert not anchor or anchor in heading_links(path.read_text(encoding="utf-8")), anchor


@pytest.mark.parametrize("name", PAGES)
def test_named_definitions_are_there(name):
    """[`Bottleneck`](../adapters.py) leads to a file that defines Bottleneck."""
    for word, target in re.findall(r"\[`([\w.]+)`\]\((\.\./[\w/]+\.py)\)", PAGES[name]):
        if word.endswith(".py"):
            continue
        text = (LESSONS / target).read_text(encoding="utf-8")
        last = word.split(".")[-1]
        assert re.search(rf"^\s*(def|class) {last}\b|^{last}\b.*=", text, re.M), word


def test_the_class_takes_two_hours():
    minutes = [int(cell) for cell in re.findall(r"^\| (\d+) \|", PAGES["README.md"], re.M)]
    assert sum(minutes) == 120


@pytest.mark.parametrize("path", CODE, ids=str)
def test_code_reads_plainly(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    assert ast.get_docstring(ast.parse("\n".join(lines)))
    assert [i for i, line in enumerate(lines, 1) if len(line) > 100 or line != line.rstrip()] == []
    found = measure(path)
    assert found["walrus"] == found["nested"] == 0 and found["longest"] <= 60


# ------------------------------------------------------------------------------------ commands

BLOCKS = [(name, *lessons.split(block)) for name, page in PAGES.items()
          for block in lessons.BLOCK.findall(page)]


def programs(command: str) -> list[list[str]]:
    """Arguments of every "python ..." of a shell's line."""
    lexer = shlex.shlex(command, posix=True, punctuation_chars=True)
    lexer.whitespace_split, found = True, [[]]
    for word in lexer:
        if set(word) <= set("|&;()<>"):
            found.append([])
        else:
            found[-1].append(word)
    return [words[1:] for words in found if words[:1] == ["python"]]


INLINE = [(name, " ".join(line.split())) for name, page in PAGES.items()
          for line in re.findall(r"`(python [^`]*)`", page) + re.findall(r"^    (python .*)$", page,
                                                                        re.M)]
PARSED = dict.fromkeys([(name, command) for name, command, _ in BLOCKS] + INLINE)


@pytest.mark.parametrize("name,command", PARSED)
def test_commands_are_understood(name, command, monkeypatch):
    """Programs, flags, rows and files of every command exist; what is behind is not run."""
    for words in programs(command):
        if words[0] == "-c":
            compile(words[1], name, "exec")
        elif words[:2] == ["-m", "pytest"]:
            assert all((ROOT / word).exists() for word in words[2:])
        elif words[0] == "-m":
            program = importlib.import_module(words[1])
            with monkeypatch.context() as patch:
                only_parse(patch)
                with pytest.raises(Understood):
                    program.main(words[2:])
        else:
            assert words[0] == "train.py"
            config, _ = configs.parse(words[1:])
            assert set(configs.task_list(config)) <= data.TASKS.keys()
            configs.check_together(config)
            if config.method != "gated-parallel":              # lesson 8 adds it
                methods.row(config.method, False, config.set)


def is_quick(command: str) -> bool:
    """Commands that count, or compute on small tensors: a second each. What needs a trained run,
    or is more than one program, is left to lessons/run.py."""
    found = programs(command)
    if len(found) != 1 or command.startswith("git "):
        return False
    counts, computes = found[0][:2] == ["-m", "tools.count"], found[0][0] == "-c"
    return counts or computes and "import runs" not in command and "import weights" not in command


QUICK = [block for block in BLOCKS if is_quick(block[1])]


@pytest.mark.parametrize("name,command,output", QUICK)
def test_quick_commands_print_what_the_page_shows(name, command, output, capsys):
    """In this process; what stands behind the pipe is the shell's."""
    (words,), piped = programs(command), re.split(r" \| ", command.strip(), maxsplit=1)[1:]
    torch.manual_seed(0)
    if words[0] == "-c":
        exec(compile(words[1], name, "exec"), {})
        piped = []
    else:
        importlib.import_module(words[1]).main(words[2:])
    printed = capsys.readouterr().out
    for shell in piped:
        printed = subprocess.run(["bash", "-c", shell], input=printed, check=True, text=True,
                                 capture_output=True).stdout
    assert printed == output


def test_there_are_commands():
    assert len(BLOCKS) >= 16 and len(QUICK) >= 6
    for name, command, output in BLOCKS:
        assert output.strip() or "*Outputs: not run yet" in PAGES[name], f"{name}: {command}"


def test_run_rewrites_a_page(tmp_path):
    """Outputs are replaced, a command may hold lines, and finds what an earlier one left."""
    page = tmp_path / "1_page.md"
    page.write_text("Text.\n\n```\n$ mkdir out; echo seen > out/file; echo a b | cut -c1\nold\n"
                    "```\n\n```\n$ python -c \"\nprint(1)\nprint(2)\"\n```\n\n```python\nx\n```\n"
                    "```\n$ cat out/file\n```\n*Outputs: old.*\n")
    lessons.run(page)
    text = page.read_text()
    assert "cut -c1\na\n```\n" in text and 'print(2)"\n1\n2\n```\n' in text
    assert "$ cat out/file\nseen\n```\n" in text and "```python\nx\n```" in text
    assert "old" not in text.replace("fold", "") and "*Outputs: `python -m lessons.run 1`" in text


# -------------------------------------------------------------------------- what pages state

def test_the_diff_of_page_8():
    """It still fits the code, and the page shows every line that it changes."""
    diff = LESSONS / "gated_parallel.diff"
    subprocess.run(["git", "apply", "--check", diff], cwd=ROOT, check=True)
    shown = PAGES["8_your_own_row.md"].splitlines()
    for line in diff.read_text().splitlines():
        if line[:1] in "+-" and line[:3] not in ("+++", "---") and len(line) > 1:
            assert line in shown, line


def test_sums_by_hand():
    """The sums of pages 2 to 5 give what each row trains; page 6's share, page 7's batches."""
    rows = {name: methods.row(name, False) for name in ("adapter", "compacter", "hyperformer",
                                                        "lora")}
    trained = {name: n for name, n, _ in count.table("bart-base", 2048, rows)}
    norms, visual = 49_152, 1_582_848
    assert 30 * 148_320 + norms + visual == trained["adapter"] == 6_081_600
    assert 30 * (36_968 + 37_640) + norms + visual == trained["compacter"] == 3_870_240
    writers = 2 * (1024 * 128 + 128 + 128 * 8 + 8 + 16 + 6 * 512)
    assert (5 * 9 * 148_320, writers) == (6_674_400, 270_640)
    assert 6_674_400 + writers + 4 * 512 + norms + visual == trained["hyperformer"] == 8_579_088
    assert 36 * 196_608 + 125_952 + visual == trained["lora"] == 8_786_688
    adapter, vlpet = ([float(score) for score in compare.PICTURES[row].paper.split("|")[1].split()]
                      for row in ("adapter", "vlpet-large"))
    gains = [after - before for before, after in zip(adapter, vlpet)]
    assert round(100 * gains[-1] / sum(gains)) == 82
    assert [data.batch_size(task, 64) for task in ("vqa", "gqa", "nlvr", "caption")] == [
        64, 106, 21, 53]


def test_the_bottleneck_by_hand():
    """Of page 2."""
    net = adapters.Bottleneck(4, 2, 4, adapters.Add())
    with torch.no_grad():
        net.down.weight.copy_(torch.eye(2, 4))
        net.up.weight.copy_(torch.tensor([[0, 0], [0, 0], [1, 7], [-1, 7]]))
    h = torch.tensor([10.0, -10.0, 3.0, 5.0])
    assert torch.allclose(h + net(h), torch.tensor([10.0, -10.0, 13.0, -5.0]), atol=1e-4)
    assert sum(p.numel() for p in net.parameters()) == 22
