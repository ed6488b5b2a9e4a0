"""Every library page and tutorial runs from top to bottom; cells flagged slow, cuda or eval: false are left out."""
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NBS = ROOT / "nbs"
PAGES = sorted(p.relative_to(NBS).as_posix() for p in NBS.rglob("*.ipynb") if not {".ipynb_checkpoints", "_proc", "experiments"} & set(p.parts))
RUN = "import sys; from pathlib import Path; from nbdev.test import test_nb; ok, _ = test_nb(Path(sys.argv[1]), skip_flags=['slow', 'cuda'])[:2]; sys.exit(0 if ok else 1)"


@pytest.mark.parametrize("page", PAGES)
def test_page_runs(page):
    path = NBS / page
    r = subprocess.run([sys.executable, "-c", RUN, str(path)], capture_output=True, text=True, cwd=path.parent, timeout=600)
    assert r.returncode == 0, f"{page}\n{r.stdout[-4000:]}\n{r.stderr[-4000:]}"
