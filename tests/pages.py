"""Runs a notebook's cells in a process that is forked from one with the large libraries already imported: each page has its own interpreter and state, and no page pays for importing torch again."""
import atexit
import multiprocessing
import os
import re
import traceback
from pathlib import Path

import nbformat

LEFT_OUT = re.compile(r"^#\|\s*(eval:\s*false|slow\b|cuda\b)", re.M)
CAN_FORK = "forkserver" in multiprocessing.get_all_start_methods()  # not on Windows
COLD = re.compile(r"sys\.modules|SIGINT")
PRELOADED = ["execnb.shell", "torch", "lightning", "polars", "numpy", "scipy.stats", "matplotlib.pyplot", "matplotlib_inline.backend_inline", "rdkit.Chem.AllChem", "pymatgen.core", "sklearn.ensemble",
             "hypothesis", "pytest", "pydantic"]


def cells_of(path: Path) -> list[str]:
    "Code cells that run: all but those that are flagged slow, cuda or eval: false."
    return [c.source for c in nbformat.read(path, 4).cells if c.cell_type == "code" and not LEFT_OUT.search(c.source)]


def run_cells(path: Path, timeout: float, said) -> None:
    "Run them top to bottom as a kernel started in the page's folder would; what went wrong is sent to `said`."
    os.chdir(path.parent)
    from execnb.shell import CaptureShell
    shell = CaptureShell(path, mpl_format="png")
    try:
        for source in cells_of(path):
            out = shell.run(source, timeout=timeout)
            if shell.exc is not None: return said.send((source, "".join(traceback.format_exception(shell.exc))[-6000:], str(out)[-2000:]))
        said.send(None)
    except BaseException as e: said.send(("", "".join(traceback.format_exception(e)), ""))
    finally: atexit._run_exitfuncs()  # worker processes that a page started end with it, as with a kernel


def run_cold(path: Path, timeout: float = 300) -> None:
    "Run a page in a kernel of its own that has imported nothing."
    from nbclient import NotebookClient
    notebook = nbformat.read(path, 4)
    notebook.cells = [c for c in notebook.cells if c.cell_type == "code" and not LEFT_OUT.search(c.source)]
    NotebookClient(notebook, timeout=timeout, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}}).execute()


def run_page(path: Path, timeout: float = 300) -> None:
    "Run a page; `AssertionError` with cell, traceback and output where a cell fails. Pages that look at what is imported, or at Ctrl-C, start cold."
    if COLD.search("".join(cells_of(path))) or not CAN_FORK: return run_cold(path, timeout)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*PRELOADED])
    ours, theirs = context.Pipe(False)
    child = context.Process(target=run_cells, args=(path, timeout, theirs))
    child.start()
    theirs.close()
    try:
        fault = ours.recv() if ours.poll(3 * timeout) else ("", f"the page ran for more than {3 * timeout} s", "")
    except EOFError:
        child.join()
        fault = ("", f"its process ended with {child.exitcode}", "")
    child.join(10)
    if child.is_alive(): child.kill()
    assert fault is None, "\n\n".join(("", *fault))
