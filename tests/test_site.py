"""The website: built once into a folder with a space in its name, read link by link, then opened in a real browser."""
import functools
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import pytest
from filelock import FileLock

for package in ("sphinx", "myst_nb", "pydata_sphinx_theme", "latex2mathml", "nbdev"):
    pytest.importorskip(package, reason=f"{package} is missing: pip install 'matfm[site]'")

from matfm.app.site import Page, build_site, house, results_page, site_faults  # noqa: E402
from matfm.core import MissingExtra  # noqa: E402
from matfm.run.results import ExperimentSpec, Metric, Result, Store  # noqa: E402

ROOT = Path(__file__).parent.parent
BROWSERS = [os.environ.get("CHROMIUM", ""), *(shutil.which(n) or "" for n in ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable"))]
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking", "--disable-component-update", "--no-first-run"]


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[Path, list[str]]:
    "The site of this checkout, and what the build warned about."
    run = os.environ.get("PYTEST_XDIST_TESTRUNUID")  # the processes of one test run share one build
    home = tmp_path_factory.mktemp("a site") if run is None else tmp_path_factory.getbasetemp().parent / f"a site {run}"
    home.mkdir(exist_ok=True)
    out, told = home / "_site", home / "warnings.json"
    with FileLock(home / "lock"):
        if not told.is_file():
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                build_site(out, ROOT / "nbs")
            told.write_text(json.dumps([str(w.message) for w in said if "built with warnings" in str(w.message)]))
    return out, json.loads(told.read_text())


def test_builds_without_warnings(built):
    assert not built[1], built[1][0][:4000]


def test_every_notebook_has_a_page(built):
    missing = [p.file for p in house(ROOT / "nbs") if not (built[0] / f"{p.doc}.html").is_file()]
    assert not missing, missing


def test_no_broken_link_no_missing_picture_nothing_from_outside(built):
    faults = site_faults(built[0])
    assert not faults, f"{len(faults)} faults:\n" + "\n".join(faults[:30])


def test_every_library_page_is_on_the_map(built):
    text = (built[0] / "library.html").read_text()
    for p in house(ROOT / "nbs"):
        if p.module: assert f'href="{p.doc}.html"' in text and p.module in text, p.file


def test_signatures_and_docments_are_rendered(built):
    text = (built[0] / "evaluate/metrics.html").read_text()
    assert 'id="api-evaluate-metrics-bootstrap"' in text and "share of resamples inside the interval" in text
    assert "#|" not in re.sub(r"<[^>]+>", "", text)


def test_a_page_without_its_engines_still_renders(built):
    "Nothing is imported or executed: the build never loads what the pages export."
    loaded = "import sys; import matfm.app.site; print([m for m in ('torch', 'rdkit', 'chgnet', 'matplotlib') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", loaded], capture_output=True, text=True).stdout.strip() == "[]"


def test_second_build_writes_only_what_changed(tmp_path):
    nbs, out = tmp_path / "a house" / "nbs", tmp_path / "a house" / "_site"
    nbs.mkdir(parents=True)
    for name in ("00_core.ipynb", "01_registry.ipynb"): shutil.copy(ROOT / "nbs" / name, nbs)
    (nbs / "02_gone.ipynb").write_text((nbs / "01_registry.ipynb").read_text().replace("default_exp registry", "default_exp gone"))
    build_site(out, nbs)
    (nbs / "02_gone.ipynb").unlink()
    nb = json.loads((nbs / "01_registry.ipynb").read_text())
    nb["cells"].append({"cell_type": "markdown", "id": "new", "metadata": {}, "source": "A new last line."})
    (nbs / "01_registry.ipynb").write_text(json.dumps(nb))
    (out / "mine.txt").write_text("not the site's own")
    stamp = (out / "_static/site.css").stat().st_mtime_ns
    build_site(out, nbs)
    assert "A new last line." in (out / "registry.html").read_text() and not (out / "gone.html").exists()
    assert (out / "_static/site.css").stat().st_mtime_ns == stamp and (out / "mine.txt").is_file()
    assert site_faults(out) == []


def test_results_page_shows_each_committed_number(built):
    text = re.sub(r"<[^>]+>", "", (built[0] / "results.html").read_text())
    results = Store(ROOT / "data" / "results").results()
    if not results: assert "No result has been committed yet" in text
    for r in results:
        assert all(s in text for s in r.systems), r.spec.name


def test_results_page_of_made_up_results():
    m = Metric("mae", 0.5, 0.4, 0.6, n=10, unit="eV", tags={"model": "net | forest"})
    r = Result(ExperimentSpec("e1", {}), metrics=(m,), systems=("A1",), claims=("0.4",), hardware={"cpu": "c"})
    text = results_page([r, r.replace(spec=ExperimentSpec("e2", {}), systems=())], [Page("experiments/e1.ipynb", "Why?")])
    assert "0.5 [0.4, 0.6] eV" in text and "net \\| forest" in text and text.index("## A1") > 0
    again = r.replace(spec=ExperimentSpec("e1", {"seed": 1}), metrics=(m.replace(value=0.7),))
    assert "0.6 ± 0.14 eV (2 runs)" in results_page([r.replace(spec=ExperimentSpec("e1", {"seed": 0})), again])


def test_missing_extra_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pydata_sphinx_theme", None)
    nbs = tmp_path / "nbs"
    nbs.mkdir()
    shutil.copy(ROOT / "nbs" / "00_core.ipynb", nbs)
    with pytest.raises(MissingExtra, match=r"pip install 'matfm\[site\]'"): build_site(tmp_path / "_site", nbs)


# in a browser

class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args): pass


@pytest.fixture(scope="module")
def address(built):
    "The built site, served on this machine alone."
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Quiet, directory=str(built[0])))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="playwright is missing: pip install 'matfm[dev]'")
    found = next((b for b in BROWSERS if b and Path(b).exists()), None)
    if not found: pytest.skip("no Chromium found: install one, or name it in the variable CHROMIUM")
    with api.sync_playwright() as p:
        b = p.chromium.launch(executable_path=found, args=FLAGS)
        yield b
        b.close()


def _some_pages() -> list[str]:
    experiments = [p.doc for p in house(ROOT / "nbs") if p.doc.startswith("experiments/")]
    return ["index", "library", "evaluate/uncertainty", "results", *experiments[:2]]


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("doc", _some_pages())
def test_page_in_a_browser(browser, address, doc, scheme):
    context = browser.new_context(viewport={"width": 1280, "height": 900}, color_scheme=scheme)
    page, faults = context.new_page(), []
    page.on("console", lambda m: faults.append(f"console: {m.text}") if m.type == "error" else None)
    page.on("pageerror", lambda e: faults.append(f"error: {e}"))
    page.on("requestfailed", lambda r: faults.append(f"failed: {r.url}"))
    page.on("response", lambda r: faults.append(f"{r.status}: {r.url}") if r.status >= 400 and "favicon.ico" not in r.url else None)
    page.on("request", lambda r: None if r.url.startswith((address, "data:", "blob:")) else faults.append(f"outside: {r.url}"))
    page.goto(f"{address}/{doc}.html", wait_until="networkidle")
    assert page.locator("h1").first.inner_text().strip()
    empty = page.evaluate("[...document.images].filter(i => i.complete && i.naturalWidth === 0 && i.getClientRects().length).map(i => i.src)")
    wide = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
    context.close()
    assert not faults and not empty, f"{doc}: {faults} {empty}"
    assert wide <= 1, f"{doc} is {wide} pixels wider than the window"


@pytest.mark.browser
def test_formulas_are_drawn_and_search_finds(browser, address):
    page = browser.new_page()
    page.goto(f"{address}/app/site.html", wait_until="networkidle")
    assert page.locator("math").count() >= 1 and page.evaluate("document.querySelector('math').getBoundingClientRect().width") > 10
    page.goto(f"{address}/search.html?q=conformal", wait_until="networkidle")
    page.wait_for_selector("#search-results li a", timeout=20_000)
    assert "uncertainty" in " ".join(page.locator("#search-results li a").evaluate_all("xs => xs.map(x => x.href)"))
    page.close()


@pytest.mark.browser
def test_fits_a_telephone(browser, address):
    page = browser.new_page(viewport={"width": 390, "height": 800})
    page.goto(f"{address}/index.html", wait_until="networkidle")
    assert page.evaluate("document.documentElement.scrollWidth") <= 392
    page.close()


