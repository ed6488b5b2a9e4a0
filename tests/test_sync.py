"""Export and clean leave no difference; lint and types hold."""
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent


def run(*args: str, cwd: Path = ROOT) -> str:
    r = subprocess.run(args, capture_output=True, text=True, cwd=cwd)
    assert r.returncode == 0, f"{' '.join(args)}\n{r.stdout[-6000:]}\n{r.stderr[-3000:]}"
    return r.stdout


def texts(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_text() for sub in ("nbs", "matfm") for p in sorted((folder / sub).rglob("*"))
            if p.suffix in (".py", ".ipynb") and not {".ipynb_checkpoints", "__pycache__", "_proc"} & set(p.parts)}


def test_export_and_clean_leave_no_diff(tmp_path):
    copy = tmp_path / "a copy"
    copy.mkdir()
    skip = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints", "_proc", "runs")
    for sub in ("nbs", "matfm"):
        shutil.copytree(ROOT / sub, copy / sub, ignore=skip)
    for name in ("pyproject.toml", "settings.ini", "README.md"):
        shutil.copy(ROOT / name, copy / name)
    before = texts(copy)
    assert len(before) > 50
    run(str(BIN / "nbdev-export"), cwd=copy)
    run(str(BIN / "nbdev-clean"), cwd=copy)
    after = texts(copy)
    changed = sorted(k for k in before.keys() | after.keys() if before.get(k) != after.get(k))
    assert not changed, f"nbdev-export and nbdev-clean change {changed}: run both and commit"


def test_lint():
    run(sys.executable, "-m", "ruff", "check", "matfm", "tests")


def test_types(tmp_path):
    run(sys.executable, "-m", "mypy", "--cache-dir", str(tmp_path))
