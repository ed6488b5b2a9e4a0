"""Every library page and tutorial runs from top to bottom as in Jupyter; cells flagged slow, cuda or eval: false are left out."""
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NBS = Path(__file__).parent.parent / "nbs"
PAGES = sorted(p.relative_to(NBS).as_posix() for p in NBS.rglob("*.ipynb") if not {".ipynb_checkpoints", "_proc", "experiments"} & set(p.parts))
LEFT_OUT = re.compile(r"^#\|\s*(eval:\s*false|slow\b|cuda\b)", re.M)


@pytest.mark.parametrize("page", PAGES)
def test_page_runs(page):
    path = NBS / page
    notebook = nbformat.read(path, 4)
    notebook.cells = [c for c in notebook.cells if c.cell_type == "code" and not LEFT_OUT.search(c.source)]
    if not notebook.cells:
        pytest.skip("prose only")
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}}).execute()
