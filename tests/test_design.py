"""The house's rules: who may import whom, what may be imported, how a line reads."""
import ast
import re
import sys

import pytest
from house import EXAMPLES, FILES, LESSON, ROOT, measure, total

TESTS = sorted((ROOT / "tests").glob("*.py"))
PACKAGES = {"torch": "torch", "numpy": "numpy", "pillow": "PIL", "tqdm": "tqdm",
            "safetensors": "safetensors"}
ROOMS = ("support", "tools", "world", "examples")
ALL = FILES | EXAMPLES


def imports(path) -> set[str]:
    """What a file imports, anywhere in it: our files by their names, of packages the first word."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module in ROOMS:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
    return {name if name in ALL else name.split(".")[0] for name in names}


OURS = {name: imports(path) & ALL.keys() for name, path in ALL.items()}


@pytest.mark.parametrize("name", ["t5", "clip_encoder", "adapters"])
def test_the_papers_are_the_ground_floor(name):
    assert not OURS[name]


def test_only_the_model_knows_both_sides():
    for name, used in OURS.items():
        if {"t5", "clip_encoder"} & used and "adapters" in used:
            assert name == "model" or name.startswith("tools."), name


def test_arrows_point_one_way():
    """No circles; what a lesson leans on knows no programs, only a program imports one."""
    left = dict(OURS)
    while left:
        ground = [name for name, used in left.items() if not used & left.keys()]
        assert ground, f"a circle among {', '.join(left)}"
        for name in ground:
            del left[name]
    for name, used in OURS.items():
        programs = {other for other in used if other.startswith(("tools.", "examples."))}
        assert not programs or name.startswith("tools."), name
        assert not name.startswith("support.") or not used & {"train", "world.scenes"}, name


@pytest.mark.parametrize("name", ALL)
def test_run_time_packages(name):
    allowed = set(PACKAGES.values())
    if name in ("adapters", "t5", "model"):
        allowed = {"torch"}
    if name == "support.pictures":                  # only to read the papers' published features
        allowed.add("h5py")
    foreign = imports(ALL[name]) - sys.stdlib_module_names - ALL.keys() - {*ROOMS}
    assert foreign <= allowed


@pytest.mark.parametrize("name", ALL)
def test_never(name):
    """No lenient loading, no pickles, no code from text, nothing caught blindly."""
    assert not imports(ALL[name]) & {"pickle", "shelve", "marshal", "dill", "joblib"}
    for node in ast.walk(ast.parse(ALL[name].read_text(encoding="utf-8"))):
        where = f"{name}, line {getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.keyword):
            assert (node.arg, ast.unparse(node.value)) not in (
                ("strict", "False"), ("allow_pickle", "True"), ("weights_only", "False")), where
        if isinstance(node, ast.Call):
            assert ast.unparse(node.func) not in ("torch.load", "torch.save", "eval", "exec"), where
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None and ast.unparse(node.type) not in (
                "Exception", "BaseException"), where


@pytest.mark.parametrize("path", [*ALL.values(), *TESTS], ids=str)
def test_page(path):
    """Every file says first what it is for, in lines of 100."""
    lines = path.read_text(encoding="utf-8").splitlines()
    assert ast.get_docstring(ast.parse("\n".join(lines)))
    assert [i for i, line in enumerate(lines, 1) if len(line) > 100 or line != line.rstrip()] == []


@pytest.mark.parametrize("name", ALL)
def test_lines_read_plainly(name):
    """No walrus but in `while`, no comprehension in another, no function longer than a page."""
    found = measure(ALL[name])
    assert found["walrus"] == found["nested"] == 0
    assert found["longest"] <= 75 and found["lines"] <= 545


@pytest.mark.parametrize("name", LESSON)
def test_lessons_are_explained(name):
    found = measure(FILES[name])
    assert found["comments"] >= 0.08 * found["code"]
    assert found["guards"] <= 0.03 * found["lines"]


def test_the_house_stays_small():
    own = "the project's own budget: raise it here for what you add yourself"
    assert total(LESSON)["lines"] <= 3650, own
    assert total(FILES)["lines"] <= 10565, own


def test_one_file_opens_weights():
    for name, path in ALL.items():
        assert "safetensors" not in imports(path) or name in ("support.weights", "support.gate")


def test_h5py_is_imported_where_it_is_used():
    """Whoever does not convert HDF5 files does not need h5py."""
    tree = ast.parse(FILES["support.pictures"].read_text(encoding="utf-8"))
    for node in tree.body:
        assert not isinstance(node, (ast.Import, ast.ImportFrom)) or "h5py" not in ast.unparse(node)


def test_requirements():
    lines = (ROOT / "requirements.txt").read_text().split()
    assert sorted(re.split(r"[=<>!~]+", line)[0] for line in lines) == sorted(PACKAGES)
    assert "torch==2.13.0" in lines
