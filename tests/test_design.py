"""The house's rules: who may import whom, what may be imported, what is never done."""
import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = (".", "support", "tools", "world")
FILES = {str(p.relative_to(ROOT))[:-3].replace("/", "."): p for room in ROOMS
         for p in sorted((ROOT / room).glob("*.py")) if p.name != "__init__.py"}
TESTS = sorted((ROOT / "tests").glob("*.py"))
PACKAGES = {"torch": "torch", "numpy": "numpy", "pillow": "PIL", "tqdm": "tqdm",
            "safetensors": "safetensors"}

# Arrows point one way: a file and the files that it may import. Backbones and adapters never meet.
S = tuple(name for name in FILES if name.startswith("support."))
MAY_IMPORT = {
    "adapters": (), "methods": ("adapters",), "t5": S, "clip_encoder": S,
    "model": ("adapters", "methods", "t5", "clip_encoder", *S),
    "data": S, "config": ("adapters", "data", "methods", "t5"), "train": tuple(FILES),
    **{name: (*S, "clip_encoder") for name in S},
    **{name: tuple(FILES) for name in FILES if name.startswith(("tools.", "world."))},
}


def imports(path: Path) -> set[str]:
    """The names of what a file imports, anywhere in it: ours whole, of packages the first word."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    names = {a.name for n in nodes if isinstance(n, ast.Import) for a in n.names}
    for n in nodes:
        if isinstance(n, ast.ImportFrom):
            names |= {f"{n.module}.{a.name}" if n.module in ROOMS else n.module for a in n.names}
    return {name if name in FILES else name.split(".")[0] for name in names}


@pytest.mark.parametrize("name", FILES)
def test_arrows(name):
    assert (imports(FILES[name]) & FILES.keys()) <= set(MAY_IMPORT[name])


@pytest.mark.parametrize("name", FILES)
def test_run_time_packages(name):
    allowed = {"torch"} if name == "adapters" else set(PACKAGES.values())
    if name == "support.features":                          # only to read the papers' published features
        allowed.add("h5py")
    assert imports(FILES[name]) - sys.stdlib_module_names - FILES.keys() <= allowed


@pytest.mark.parametrize("name", FILES)
def test_never(name):
    """No lenient loading, no pickles, no code from text, nothing caught blindly."""
    assert not imports(FILES[name]) & {"pickle", "shelve", "marshal", "dill", "joblib"}
    for node in ast.walk(ast.parse(FILES[name].read_text(encoding="utf-8"))):
        where = f"{name}.py, line {getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.keyword):
            assert (node.arg, ast.unparse(node.value)) not in (
                ("strict", "False"), ("allow_pickle", "True"), ("weights_only", "False")), where
        if isinstance(node, ast.Call):
            assert ast.unparse(node.func) not in ("torch.load", "torch.save", "eval", "exec"), where
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None and ast.unparse(node.type) not in (
                "Exception", "BaseException"), where


@pytest.mark.parametrize("path", [*FILES.values(), *TESTS], ids=lambda p: p.name)
def test_page(path):
    """Every file says first what it is for, in lines of 100."""
    lines = path.read_text(encoding="utf-8").splitlines()
    assert ast.get_docstring(ast.parse("\n".join(lines)))
    assert [i for i, line in enumerate(lines, 1) if len(line) > 100 or line != line.rstrip()] == []


def test_one_file_opens_weights():
    for name, path in FILES.items():
        assert "safetensors" not in imports(path) or name in ("support.weights", "support.gate")


def test_h5py_is_imported_where_it_is_used():
    """Whoever does not convert HDF5 files does not need h5py."""
    tree = ast.parse(FILES["support.features"].read_text(encoding="utf-8"))
    places = [node.name if isinstance(node, ast.FunctionDef) else "" for node in tree.body
              if "h5py" in {a.name for n in ast.walk(node) if isinstance(n, ast.Import)
                            for a in n.names}]
    assert places == ["convert"]


def test_requirements():
    lines = [re.split(r"[=<>!~]+", line) for line in
             (ROOT / "requirements.txt").read_text().split("\n") if line]
    assert sorted(line[0] for line in lines) == sorted(PACKAGES)
    assert "torch==2.13.0" in (ROOT / "requirements.txt").read_text().split("\n")
