"""Pictures show what the data hold: nothing dropped in silence, nothing drawn that is not there."""
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from matfm.core import BadInput
from matfm.run import figures as f


@pytest.fixture(autouse=True)
def _close():
    yield
    import matplotlib.pyplot as plt
    plt.close("all")


def table(domain, targets=None, **columns):
    return SimpleNamespace(frame=pl.DataFrame(columns), targets=targets or {}, domain=domain, name="some")


def drawn(o):
    return [ax for ax in o.figure.axes if ax.get_visible()]


def test_import_loads_no_matplotlib():
    code = "import sys, matfm.run.figures; print([m for m in ('matplotlib', 'rdkit', 'pymatgen', 'torch', 'PIL', 'IPython') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(-1e30, 1e30) | st.none() | st.just(float("nan")) | st.just(float("inf")), max_size=40))
def test_every_known_value_is_drawn_or_counted(values):
    import matplotlib.pyplot as plt
    ax = f.distribution(values, "y")
    n = len(f.known(values))
    title = ax.get_title("left")
    beyond = int(title.split(" beyond")[0].split(", ")[-1].replace(",", "")) if "beyond" in title else 0
    assert sum(p.get_height() for p in ax.patches) + beyond == n
    assert title.startswith(f"n = {n:,}") and ("missing" in title) == (n < len(values))
    plt.close("all")


@pytest.mark.parametrize("y, log", [(np.geomspace(1, 1e4, 300), True), (np.geomspace(1, 1e4, 300) - 1, False), (np.linspace(1, 100, 300), False), (-np.geomspace(1, 1e4, 300), False)])
def test_logarithm_only_for_positive_skewed_columns(y, log):
    assert f.wants_log(y) == log and f.distribution(y).get_xscale() == ("log" if log else "linear")


@pytest.mark.parametrize("y, yes", [([0, 1, 1, 0], True), ([1.0], True), ([0.5, 0.5, 0.5], False), (list(range(13)) * 5, False), ([1, 2, 3] * 3, True), ([1, 2, 3], False)])
def test_classes(y, yes):
    assert f.are_classes(np.array(y, dtype=float)) == yes


def test_sizes_are_whole_numbers_wide_and_complete():
    rng = np.random.default_rng(0)
    for n in (rng.integers(1, 20, 500), rng.integers(1, 3000, 500), np.array([7])):
        ax = f.size_histogram(n)
        widths = {round(p.get_width(), 6) for p in ax.patches}
        assert sum(p.get_height() for p in ax.patches) == len(n) and len(widths) == 1 and widths.pop() % 1 == 0
    assert "no known value" in f.size_histogram([]).texts[0].get_text()


def test_periodic_table():
    assert len(f.ELEMENTS) == len(set(f.PLACES.values())) == 118
    assert f.PLACES["H"] == (1, 1) and f.PLACES["He"] == (1, 18) and f.PLACES["B"] == (2, 13) and f.PLACES["Sc"] == (4, 3)
    assert f.PLACES["Lu"] == (8, 17) and f.PLACES["Hf"] == (6, 4) and f.PLACES["Og"] == (7, 18) and f.PLACES["Th"] == (9, 4)


@pytest.mark.parametrize("counts", [{}, {"O": 1}, {"O": 3, "Fe": 0}, {s: 10**i for i, s in enumerate(["H", "C", "N", "O", "F", "P", "S"])}])
def test_element_map_marks_what_is_there(counts):
    from matplotlib.colors import to_hex
    ax = f.element_map(counts)
    coloured = sum(to_hex(p.get_facecolor()) != "#f2f2f2" for p in ax.patches)
    assert len(ax.patches) == 118 and coloured == sum(n > 0 for n in counts.values()) and bool(ax.child_axes) == bool(coloured)


def test_element_map_refuses_what_is_no_element():
    with pytest.raises(BadInput, match="unknown element 'Sulfur'"): f.element_map({"Sulfur": 2})


@settings(max_examples=60, deadline=None)
@given(st.floats(1, 9e9))
def test_short_counts_are_short_and_right(n):
    text = f.short_count(round(n))
    value = float(text.rstrip("kM")) * {"k": 1e3, "M": 1e6}.get(text[-1], 1)
    assert len(text) <= 5 and abs(value - round(n)) <= 0.051 * round(n)


@pytest.mark.parametrize("smiles", ["CCO", "c1ccc2[nH]ccc2c1", "[Cu+2].[O-]S(=O)(=O)[O-]", "ClCCBr", "[13C@@H](N)(C)[Se]c1ccsc1", "[Si](C)(C)(C)[Sn]", "C%12CC%12[N+](=O)[O-]", "B1OC1.[Pd]", "[te]1cccc1", "[2H]OC"])
def test_smiles_elements_are_those_rdkit_reads(smiles):
    from rdkit import Chem
    atoms = f.atoms_of(pl.DataFrame({"smiles": [smiles]}), "molecule")
    assert sorted(atoms["element"]) == sorted(a.GetSymbol() for a in Chem.MolFromSmiles(smiles).GetAtoms())


@pytest.mark.parametrize("domain, columns, elements, sizes", [
    ("composition", {"formula": ["Ca3(PO4)2", "La1.85Sr0.15CuO4"]}, {"Ca", "P", "O", "La", "Sr", "Cu"}, [3, 4]),
    ("crystal", {"numbers": [[11, 17], [26, 26, 8, 8, 8]]}, {"Na", "Cl", "Fe", "O"}, [2, 5]),
    ("atoms", {"numbers": [[8, 1, 1], [92]]}, {"O", "H", "U"}, [3, 1]),
    ("mixture", {"components": [["CO", "O"], ["[Li+].[Cl-]"]]}, {"C", "O", "Li", "Cl"}, [3, 2]),
    ("reaction", {"reaction": ["CCBr.[Mg]>CCOCC>CC[Mg]Br"]}, {"C", "Br", "Mg", "O"}, [13]),
])
def test_every_domain_with_structures(domain, columns, elements, sizes):
    atoms = f.atoms_of(pl.DataFrame(columns), domain)
    assert set(f.element_counts(atoms)) == elements and f.structure_sizes(atoms).tolist() == sizes
    o = f.overview(table(domain, {"y": "eV"}, y=[1.0, 2.0][: len(sizes)], **columns))
    assert len(drawn(o)) == 3 and o.png()[:4] == b"\x89PNG" and f"{len(elements)} elements" in "".join(ax.get_title() for ax in o.figure.findobj(type(drawn(o)[0])))


def test_empty_lists_and_nulls_are_no_atoms():
    assert f.atoms_of(pl.DataFrame({"components": [[], None, ["C", None]]}, schema={"components": pl.List(pl.String)}), "mixture").rows() == [(2, "C")]
    assert f.atoms_of(pl.DataFrame({"smiles": [None, "*", "C"]}), "molecule").rows() == [(2, "C")]


def test_overview_says_what_it_leaves_out():
    many = {f"t{i}": [0.0, 1.0, 1.0] for i in range(9)}
    o = f.overview(table("molecule", dict.fromkeys(many, ""), smiles=["C", "CC", "CCC"], **many))
    assert o.title == "some: 3 rows of the kind molecule, 5 of 9 targets" and len(drawn(o)) == 7
    o = f.overview(table("molecule", smiles=["C"] * 30), limit=10)
    assert "10 of them drawn at random" in o.title and len(drawn(o)) == 2


def test_overview_of_empty_tables_and_of_nothing_to_draw():
    o = f.overview(table("molecule", {"y": "eV"}, smiles=pl.Series([], dtype=pl.String), y=pl.Series([], dtype=pl.Float64)))
    assert "0 rows" in o.title and o.png()
    with pytest.raises(BadInput, match="nothing to draw.*note"): f.overview(table("text", note=["a"]))
    with pytest.raises(BadInput, match="unknown domain with structures 'molecul'; did you mean 'molecule'"): f.atoms_of(pl.DataFrame(), "molecul")


def test_examples_stand_below_and_labels_are_escaped():
    o = f.overview(table("composition", formula=["NaCl"]), ["<svg></svg>"] * 2, ["<i>", "b"])
    page = o._repr_html_()
    assert page.count("<svg>") == 2 and "&lt;i&gt;" in page and "<i>" not in page and page.index("data:image/png") < page.index("<svg>")


def test_real_records(root):
    from matfm.data.sources import load
    o = f.overview(load("matfm_crystals", limit=200))
    assert len(drawn(o)) == 6 and "200 rows" in o.title


@pytest.mark.parametrize("name", ["esol", "supercon_stanev", "matbench_phonons"])
@pytest.mark.filterwarnings("ignore:.*rows were set aside")
def test_mirrored_sets(mirror, name):
    from matfm.data.sources import load
    r = load(name, limit=300)
    o = f.overview(r)
    assert o.title.startswith(f"{name}: {len(r):,} rows") and len(drawn(o)) == 2 + len(f.shown_columns(r))
