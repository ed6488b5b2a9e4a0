"""The figures of a readable page, measured on every notebook. A failure names the page, the figure and the limit."""
import ast
import json
import re
import statistics
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NBS = ROOT / "nbs"
SKIP = {".ipynb_checkpoints", "_proc"}
ALL = sorted(p for p in NBS.rglob("*.ipynb") if not SKIP & set(p.parts))
EXPORT = re.compile(r"^#\s*\|\s*exports?i?\b", re.M)
CHECKS = re.compile(r"\bassert\b|pytest\.(?:raises|warns)|\bassert_\w+\(|\btest_(?:eq|close|fail|is|ne)\b|expect_fail")
MACHINE = re.compile(r"/home/\w+/|/root/\w+|/Users/\w+|[A-Z]:\\\\?Users")
LEFTOVERS = re.compile(r"\b(?:TODO|FIXME|XXX)\b")


def cells(path: Path) -> list[dict]:
    found = json.loads(path.read_text(encoding="utf-8"))["cells"]
    for c in found:
        c["source"] = "".join(c["source"])
    return found


def name(path: Path) -> str:
    return path.relative_to(NBS).as_posix()


def length(source: str) -> int:
    "Lines that are neither empty nor directives."
    return sum(1 for line in source.splitlines() if line.strip() and not line.lstrip().startswith("#|"))


def code(path: Path) -> list[str]:
    return [c["source"] for c in cells(path) if c["cell_type"] == "code"]


def exports(path: Path) -> list[str]:
    return [s for s in code(path) if EXPORT.search(s)]


LIBRARY = [p for p in ALL if re.match(r"\d\d_", p.name)]


def test_the_tree_is_found():
    assert len(LIBRARY) >= 25 and (NBS / "index.ipynb") in ALL


def test_numbers_are_unique():
    numbers = Counter(p.name.split("_")[0] for p in ALL if re.match(r"e?\d+_", p.name))
    assert not [n for n, k in numbers.items() if k > 1], {n: [name(p) for p in ALL if p.name.startswith(f"{n}_")] for n, k in numbers.items() if k > 1}


@pytest.mark.parametrize("path", ALL, ids=name)
def test_begins_with_title_and_promise(path):
    first = cells(path)[0]
    lines = [line for line in first["source"].splitlines() if line.strip()]
    assert first["cell_type"] == "markdown", "the first cell is not markdown"
    assert re.match(r"# \S", lines[0]), f"the first line is not an H1: {lines[0]!r}"
    assert len(lines) > 1 and re.match(r"> \S", lines[1]), "no '> promise' below the title"


def test_export_cells_are_short_over_the_tree():
    lengths = [length(s) for p in LIBRARY for s in exports(p)]
    assert statistics.median(lengths) <= 15, f"median export cell of the tree: {statistics.median(lengths)} lines, at most 15"


@pytest.mark.parametrize("path", LIBRARY, ids=name)
def test_library_page(path):
    all_cells, sources, exported = cells(path), code(path), exports(path)
    lengths = [length(s) for s in exported]
    markdown = sum(c["cell_type"] == "markdown" for c in all_cells) / len(all_cells)
    hidden = sum(bool(re.search(r"^#\|\s*hide\b", s, re.M)) for s in sources) / len(sources)
    checks = sum(len(CHECKS.findall(s)) for s in sources)
    faults = []
    if not exported: faults.append("exports nothing")
    elif statistics.median(lengths) > 15: faults.append(f"median export cell {statistics.median(lengths)} lines, at most 15")
    if max(lengths, default=0) > 60: faults.append(f"longest export cell {max(lengths)} lines, at most 60")
    if markdown < 0.2: faults.append(f"markdown {markdown:.0%} of the cells, at least 20 %")
    if checks < 5: faults.append(f"{checks} checks, at least 5")
    if hidden >= 0.25: faults.append(f"{hidden:.0%} of the code cells hidden, less than 25 %")
    assert not faults, f"{name(path)}: " + "; ".join(faults)


@pytest.mark.parametrize("path", ALL, ids=name)
def test_cells_that_do_not_run_say_why(path):
    silent = [s for s in code(path) if re.search(r"^#\|\s*eval:\s*false", s, re.M)
              and not re.search(r"^#(?!\|).{10,}|#\|\s*eval:\s*false\s+#.{10,}", "\n".join(s.splitlines()[:4]), re.M)]
    assert not silent, f"{name(path)}: 'eval: false' without the reason beside it:\n{silent[0]}"


@pytest.mark.parametrize("path", LIBRARY, ids=name)
def test_import_cells_only_import(path):
    mixed = []
    for s in exports(path):
        kinds = {isinstance(n, (ast.Import, ast.ImportFrom)) for n in ast.parse(s).body
                 if not (isinstance(n, ast.If) and "TYPE_CHECKING" in ast.unparse(n.test))}
        if kinds == {True, False}: mixed.append(s.strip().splitlines()[1])
    assert not mixed, f"{name(path)}: an export cell imports and does something else: {mixed}"


@pytest.mark.parametrize("path", ALL, ids=name)
def test_no_leftovers_and_no_machine(path):
    faults = []
    for i, c in enumerate(cells(path)):
        text = c["source"] + json.dumps([{k: v for k, v in o.items() if k != "data"} | {k: v for k, v in o.get("data", {}).items() if not k.startswith("image/")}
                                         for o in c.get("outputs", [])], ensure_ascii=False)
        faults += [f"cell {i}: {m[0]}" for m in (*MACHINE.finditer(text), *LEFTOVERS.finditer(c["source"]))]
        if c["cell_type"] == "code" and re.search(r"^\s*from\s+\S+\s+import\s+\*", c["source"], re.M) and EXPORT.search(c["source"]): faults.append(f"cell {i}: import *")
        if any(o.get("output_type") == "error" for o in c.get("outputs", [])): faults.append(f"cell {i}: a saved error")
    assert not faults, f"{name(path)}: " + "; ".join(faults)
