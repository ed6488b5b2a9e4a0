"""The house keeps its order: unique numbers, imports only downwards, nothing heavy at the door."""
import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NBS = ROOT / "nbs"


def library_pages() -> dict[str, Path]:
    "Module name → notebook, for every page that exports."
    pages = {}
    for path in sorted(NBS.rglob("*.ipynb")):
        if {".ipynb_checkpoints", "experiments", "tutorials"} & set(path.parts) or "_proc" in path.parts:
            continue
        cells = json.loads(path.read_text())["cells"]
        exp = [m[1] for c in cells if c["cell_type"] == "code" for m in re.finditer(r"^#\|\s*default_exp[: ]\s*(\S+)", "".join(c["source"]), re.M)]
        if exp:
            assert len(exp) == 1, f"{path.name} exports into {exp}: one notebook, one module"
            assert f"matfm.{exp[0]}" not in pages, f"two notebooks export matfm.{exp[0]}"
            pages[f"matfm.{exp[0]}"] = path
    return pages


def number(path: Path) -> int:
    m = re.match(r"(\d\d)_", path.name)
    assert m, f"{path} has no two-digit number"
    return int(m[1])


PAGES = library_pages()


def test_there_are_pages():
    assert len(PAGES) >= 25, sorted(PAGES)


def test_numbers_are_unique():
    seen: dict[int, Path] = {}
    for path in PAGES.values():
        n = number(path)
        assert n not in seen, f"{path.name} and {seen[n].name} share the number {n}"
        seen[n] = path


def test_page_and_module_correspond():
    for module, path in PAGES.items():
        folder = path.parent.relative_to(NBS).as_posix()
        want = "matfm." + ("" if folder == "." else f"{folder}.") + path.stem.split("_", 1)[1]
        assert module == want, f"{path} exports {module}, expected {want}"


def test_no_module_without_a_page():
    modules = {".".join(p.relative_to(ROOT).with_suffix("").parts) for p in (ROOT / "matfm").rglob("*.py") if p.name not in ("__init__.py", "_modidx.py", "__main__.py")}
    assert modules == set(PAGES), modules ^ set(PAGES)


def imported(tree: ast.AST) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            inner = {f"{node.module}.{a.name}" for a in node.names} & set(PAGES)  # from matfm.run import results
            names |= inner or {node.module}
            assert node.names[0].name != "*", f"import * from {node.module}"
        if isinstance(node, ast.Import):
            names |= {a.name for a in node.names}
    return names


@pytest.mark.parametrize("module", sorted(PAGES))
def test_imports_only_lower_numbers(module):
    path = ROOT / (module.replace(".", "/") + ".py")
    mine = number(PAGES[module])
    for name in imported(ast.parse(path.read_text())):
        if name in PAGES:
            assert number(PAGES[name]) < mine, f"{module} ({mine}) imports {name} ({number(PAGES[name])})"
        elif name.split(".")[0] == "matfm":
            assert name in ("matfm",), f"{module} imports {name}, which no page exports"


def fresh(code: str) -> str:
    r = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert r.returncode == 0, r.stderr
    return r.stdout


def test_import_is_light():
    code = ("import sys, time; t = time.perf_counter(); import matfm; dt = time.perf_counter() - t; "
            "print(dt, [m for m in ('torch', 'rdkit', 'pymatgen', 'lightning', 'polars', 'sklearn', 'matplotlib') if m in sys.modules])")
    best = min((fresh(code).split(" ", 1) for _ in range(3)), key=lambda r: float(r[0]))
    assert float(best[0]) < 0.5 and best[1].strip() == "[]", best


@pytest.mark.parametrize("module", ["matfm.core", "matfm.registry", "matfm.settings", "matfm.testing", "matfm.run.results", "matfm.run.runner",
                                    "matfm.run.sheets", "matfm.data.records", "matfm.data.sources", "matfm.data.remote", "matfm.data.files", "matfm.data.mixtures", "matfm.data.splits", "matfm.app.cli"])
def test_light_pages_load_nothing_heavy(module):
    out = fresh(f"import sys, {module}; print([m for m in ('torch', 'rdkit', 'pymatgen', 'lightning', 'sklearn', 'papermill', 'dask') if m in sys.modules])")
    assert out.strip() == "[]", f"{module} loads {out}"
