"""Every library page and tutorial runs from top to bottom; cells flagged slow, cuda or eval: false are left out."""
from pathlib import Path

import pytest
from pages import cells_of, run_page

NBS = Path(__file__).parent.parent / "nbs"
PAGES = sorted(p.relative_to(NBS).as_posix() for p in NBS.rglob("*.ipynb") if not {".ipynb_checkpoints", "_proc", "experiments"} & set(p.parts))


@pytest.mark.parametrize("page", PAGES)
def test_page_runs(page):
    if not cells_of(NBS / page): pytest.skip("prose only")
    run_page(NBS / page)


def test_a_page_that_fails_is_told(tmp_path):
    import nbformat.v4 as v4
    nb = v4.new_notebook(cells=[v4.new_code_cell("a = 1"), v4.new_code_cell("#| slow\nraise SystemError"), v4.new_code_cell("assert a == 2, 'told'")])
    (tmp_path / "page.ipynb").write_text(v4.writes(nb))
    with pytest.raises(AssertionError, match="told"): run_page(tmp_path / "page.ipynb")
    nb.cells[-1].source = "import os; os._exit(3)"
    (tmp_path / "page.ipynb").write_text(v4.writes(nb))
    with pytest.raises(AssertionError, match="ended with 3"): run_page(tmp_path / "page.ipynb")
