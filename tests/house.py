"""How much is there to read, and how does it read? Measured, not felt.

    python tests/house.py          # the table, and a line a file
"""
import ast
import io
import tokenize
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ROOMS = (".", "support", "tools", "world")


def files(*rooms: str) -> dict[str, Path]:
    """The Python files of these rooms by what one imports: "support.gate" -> its path."""
    paths = [path for room in rooms for path in sorted((ROOT / room).glob("*.py"))
             if path.name != "__init__.py"]
    return {str(path.relative_to(ROOT))[:-3].replace("/", "."): path for path in paths}


FILES = files(*ROOMS)
EXAMPLES = files("examples")       # held to the same rules, but beside the house: not counted
LESSON = ("adapters", "clip_encoder", "t5", "model", "data", "train", "support.weights",
          "support.tokenizer", "support.metrics")
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def measure(path: Path) -> dict[str, int]:
    """Of one file: lines; code lines; comments; lines that raise or catch; asserts; the longest
    function; walrus operators outside `while`; comprehensions inside (or over) another."""
    text = path.read_text(encoding="utf-8")
    found = dict.fromkeys(("code", "comments", "guards", "asserts", "longest", "walrus", "nested"),
                          0)
    found["lines"] = text.count("\n")
    code = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            found["comments"] += 1
        elif token.type not in (tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
                                tokenize.ENDMARKER) and not is_docstring(token):
            code.update(range(token.start[0], token.end[0] + 1))
    found["code"] = len(code)
    tree = ast.parse(text)
    loops = {id(node.test) for node in ast.walk(tree) if isinstance(node, ast.While)}
    for node in ast.walk(tree):
        length = getattr(node, "end_lineno", 0) - getattr(node, "lineno", 0) + 1
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            found["longest"] = max(found["longest"], length)
        found["guards"] += length if isinstance(node, ast.Raise) else 0
        found["guards"] += isinstance(node, ast.ExceptHandler)
        found["asserts"] += length if isinstance(node, ast.Assert) else 0
        found["walrus"] += isinstance(node, ast.NamedExpr) and id(node) not in loops
        if isinstance(node, COMPREHENSIONS):
            inner = [x for x in ast.walk(node) if x is not node and isinstance(x, COMPREHENSIONS)]
            found["nested"] += bool(inner) or len(node.generators) > 1
    return found


def is_docstring(token: tokenize.TokenInfo) -> bool:
    """A string that begins its line is a docstring here."""
    return token.type == tokenize.STRING and token.line.strip().startswith(('"""', 'r"""'))


def total(names) -> dict[str, int]:
    """The sums over these files; of the longest function, the longest of all."""
    sums = {}
    for name in names:
        for key, value in measure(FILES[name]).items():
            old = sums.get(key, 0)
            sums[key] = max(old, value) if key == "longest" else old + value
    return sums


def main() -> None:
    print(f"{'':24} lines   code  comments %  raise/except %  assert %  longest  walrus  nested")
    for name in [*FILES, "", "lessons", "everything"]:
        if not name:
            print()
            continue
        names = {"lessons": LESSON, "everything": FILES}.get(name, [name])
        m = total(names)
        print(f"{name:24}{m['lines']:6}{m['code']:7}{100 * m['comments'] / m['code']:12.0f}"
              f"{100 * m['guards'] / m['lines']:16.1f}{100 * m['asserts'] / m['lines']:10.1f}"
              f"{m['longest']:9}{m['walrus']:8}{m['nested']:8}")
    top = [p.name for p in ROOT.iterdir() if not p.name.startswith((".", "__"))
           and p.name not in ("out", "datasets")]
    readme = (ROOT / "README.md").read_text(encoding="utf-8").count("\n")
    tests = sum(p.read_text(encoding="utf-8").count("\n") for p in (ROOT / "tests").glob("*.py"))
    print(f"\nentries at the top: {len(top)}; README: {readme} lines; tests: {tests} lines")


if __name__ == "__main__":
    main()
