"""Records and Rejected: every row ends in exactly one of the two, whatever it holds."""
import gzip

import numpy as np
import polars as pl
import pytest
from hypothesis import assume, given, settings, strategies as st

from matfm.core import BadInput, TooManyRejected, UnknownName
from matfm.data.records import (Atoms, Crystal, Mixture, Records, Rejected, compositions, crystals, find_structure, formula_html, frame_digest, from_frame, from_values,
                                hill_formula, mixture_key, molecules, parse_crystal, parse_formula, parse_reaction, parse_smiles, parse_structures, read_frame, read_table,
                                reduced_formula)

QUICK = settings(max_examples=60, deadline=None)
SALT = Crystal(np.array([[0, 2.8, 2.8], [2.8, 0, 2.8], [2.8, 2.8, 0]]), np.array([11, 17]), np.array([[0, 0, 0], [.5, .5, .5]]))
TEXT = st.one_of(st.text(max_size=40), st.text(alphabet="CNOcno()[]=#123+-@HF%.*\\/", max_size=25), st.none())


def partition(records, rejected, n):
    assert len(records) + len(rejected) == n
    assert sorted(rejected.frame["row"].to_list()) == sorted(set(rejected.frame["row"].to_list()))
    assert all(rejected.frame["reason"].str.len_chars() > 0)


LIQUIDS = from_values([Mixture(("CCO", "O"), (0.4, 0.6), ("solvent", "solvent")), Mixture(("O", "[Na+].[Cl-]"), (1, None))], "mixture", {"y": [1, 2]}, {"y": "mS/cm"},
                      name="liquids", basis="mole")[0].with_columns({"T": [298.0, None]}, conditions={"T": "K"})
REACTIONS = from_values(["CO.CC(=O)O>[H+]>COC(C)=O"], "reaction", name="esters")[0]
SNAPSHOTS = from_values([Atoms([8, 1], [[0, 0, 0], [0, 0, 1]]), Atoms([6], [[0, 0, 0]], np.eye(3) * 3)], "atoms", {"energy": [-1, -2]}, {"energy": "eV"})[0]
TABLE = from_frame(pl.DataFrame({"x": [1, 2], "words": [["a", "b"], []], "nested": [[{"k": "v"}], None], "y": [0.5, None]}), None, "table", {"y": "eV"}, name="wells")[0]


# -- parsers never crash --

@QUICK
@given(st.lists(TEXT, max_size=8))
def test_any_text_as_smiles(values):
    partition(*molecules(values), len(values))


@QUICK
@given(st.lists(TEXT, max_size=8))
def test_any_text_as_formula(values):
    partition(*compositions(values), len(values))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.one_of(TEXT, st.text(max_size=60).map(lambda t: f"data_x\n_cell_length_a 3\nloop_\n_atom_site_fract_x\n{t}")), max_size=4))
def test_any_text_as_structure(values):
    partition(*crystals(values), len(values))


@pytest.mark.parametrize("value", [3.5, 7, True, b"CCO", ["CCO"], {"smiles": "C"}, float("nan")])
def test_other_objects_are_rejected(value):
    for domain in ("molecule", "crystal", "composition", "mixture", "reaction", "atoms"):
        assert isinstance(parse_structures([value], domain)[0], str)


@QUICK
@given(st.dictionaries(st.sampled_from(["H", "O", "Fe", "Na", "Cl", "U"]), st.integers(1, 60), min_size=1, max_size=5))
def test_formula_round_trip(amounts):
    once = reduced_formula(amounts)
    again = parse_formula(once)
    assert reduced_formula(again) == once
    ratio = {s: amounts[s] / n for s, n in again.items()}
    assert set(ratio) == set(amounts) and len(set(ratio.values())) == 1


@pytest.mark.parametrize("given_, wanted", [("Ca3(PO4)2", "Ca3P2O8"), ("O3TiBa", "BaTiO3"), ("K4 Mn4 O8", "KMnO2"), ("Fe0.5Ni0.5", "Fe0.5Ni0.5"), ("H2O", "H2O"), ("C", "C")])
def test_formula_forms(given_, wanted):
    assert reduced_formula(parse_formula(given_)) == wanted


def test_formula_html_is_escaped():
    assert formula_html("<b>2") == "&lt;b&gt;<sub>2</sub>"


# -- SMILES --

@pytest.mark.parametrize("smiles, reason", [("C(C)(C)(C)(C)C", "valence"), ("c1cccc1", "kekulize"), ("C1CC", "syntax"), ("", "empty"), ("   ", "empty"), (None, "empty"), ("hello world", "syntax")])
def test_smiles_reasons(smiles, reason):
    with pytest.raises(BadInput, match=reason): parse_smiles(smiles)


def test_smiles_log_is_silent(capfd):
    molecules(["C1CC", "c1cccc1", "C(C)(C)(C)(C)C"])
    assert capfd.readouterr() == ("", "")


def test_canonical_or_as_given():
    assert molecules(["OCC"])[0].structures() == ["CCO"] and molecules(["OCC"])[0].canonical
    kept = molecules(["OCC"], canonical=False)[0]
    assert kept.structures() == ["OCC"] and not kept.canonical


# -- crystals --

@QUICK
@given(st.tuples(*[st.floats(2.5, 15)] * 3), st.tuples(*[st.floats(65, 115)] * 3), st.lists(st.integers(1, 94), min_size=1, max_size=6), st.integers(0, 10**6))
def test_fast_cif_agrees_with_pymatgen(lengths, angles, numbers, seed):
    from pymatgen.core import Lattice, Structure
    lattice = Lattice.from_parameters(*lengths, *angles)
    frac = np.random.default_rng(seed).random((len(numbers), 3))
    made = Structure(lattice, numbers, frac)
    assume((made.distance_matrix + 9 * np.eye(len(numbers))).min() > 0.6)
    cif = made.to(fmt="cif")
    ours = Crystal.from_cif(cif)
    assert np.allclose(ours.lattice, lattice.matrix, atol=1e-5) and abs(ours.volume - lattice.volume) < 1e-3 * lattice.volume
    assert ours.numbers.tolist() == numbers and np.allclose(ours.frac, frac, atol=1e-6)
    again = Crystal.from_cif(ours.to_cif())
    assert np.allclose(again.frac, ours.frac, atol=1e-6) and ours.formula == again.formula


def test_symmetric_cif_is_expanded():
    from pymatgen.io.cif import CifWriter
    cubic = Crystal(np.eye(3) * 5.6, np.array([11, 17] * 4), np.array([[0, 0, 0], [.5, .5, .5], [.5, .5, 0], [0, 0, .5], [.5, 0, .5], [0, .5, 0], [0, .5, .5], [.5, 0, 0]]))
    cif = str(CifWriter(cubic.to_pymatgen(), symprec=0.01))
    assert "225" in cif and len(Crystal.from_cif(cif)) == 8


@pytest.mark.parametrize("change, reason", [
    (lambda t: t.replace("0.00000000  0.00000000  0.00000000  1", "0.00000000  0.00000000  0.00000000  0.5"), "partial occupancy"),
    (lambda t: t[:t.index("_atom_site_type_symbol")], "not a usable CIF"),
    (lambda t: t.replace("  Cl", "  Qq"), "no element"),
    (lambda t: "data_empty\n", "not a usable CIF")])
def test_bad_cifs(change, reason):
    good = SALT.to_cif()
    _, rejected = crystals([change(good)])
    assert len(rejected) == 1 and reason in rejected.frame["reason"][0]


def test_crystal_is_read_only_and_checked():
    with pytest.raises(ValueError): SALT.frac[0, 0] = 1
    for lattice, numbers, frac in [(np.eye(3), [], np.zeros((0, 3))), (np.zeros((3, 3)), [1], [[0, 0, 0]]), (np.eye(3), [0], [[0, 0, 0]]),
                                   (np.eye(3), [1], [[0, 0, np.inf]]), (np.eye(2), [1], [[0, 0, 0]]), (np.eye(3), ["a"], [[0, 0, 0]])]:
        with pytest.raises(BadInput): Crystal(lattice, numbers, frac)
    assert "NaCl" in repr(SALT) and "Å" in SALT._repr_html_() and len(parse_crystal(SALT)[0]) == 9


# -- targets, ids --

def test_missing_and_text_targets():
    r, bad = molecules(["C", "CC", "CCC", "CCCC", "CCCCC"], {"a": [1, np.nan, np.inf, None, 5.0], "b": [None, 2, None, 4, 5]}, {"a": "eV"})
    assert r.ids == ["0", "1", "3", "4"] and np.isnan(r.y("a")[1:3]).all() and r.targets == {"a": "eV", "b": ""}
    assert bad.frame["row"].to_list() == [2] and bad.frame["reason"][0] == "no target value"
    with pytest.warns(UserWarning, match="1 rows hold text"): r, bad = molecules(["C", "CC"], {"a": ["n.d.", "2"], "b": [1, 2]})
    assert len(r) == 2 and np.isnan(r.y("a")[0, 0]) and not len(bad)
    r, bad = molecules(["C", "CC", "CCC"], {"a": ["yes", "No", "maybe"]})
    assert r.y().ravel().tolist() == [1.0, 0.0] and "maybe" in bad.frame["reason"][0]


@pytest.mark.parametrize("kwargs, message", [({"targets": {"a": [1]}}, "1 values for 2"), ({"ids": ["x"]}, "1 ids for 2"), ({"targets": {"a": [1, 2]}, "units": {"b": "eV"}}, "unknown target"),
                                             ({"targets": {"a": [1, 2]}, "units": {"a": "eVv"}}, "unknown unit"), ({"targets": {"smiles": [1, 2]}}, "must not be called")])
def test_wrong_arguments(kwargs, message):
    with pytest.raises(BadInput, match=message): molecules(["C", "CC"], **kwargs)


def test_duplicate_and_missing_ids():
    r, bad = molecules(["C", "CC", "CCC", "CCCC"], ids=["a", "b", "a", None])
    assert r.ids == ["a", "b"] and bad.frame["reason"].to_list() == ["duplicate id: first in row 0", "no id"]


def test_without_targets_nothing_is_lost():
    r, bad = molecules(["C", "CC", "C1"])
    assert len(r) == 2 and len(bad) == 1 and r.y().shape == (2, 0)


def test_nothing_left():
    r, bad = crystals(["nonsense"])
    assert len(r) == 0 and r.structures() == [] and r.y().shape == (0, 0) and len(r.digest) == 12
    with pytest.raises(TooManyRejected, match="1 of 1 rows"): bad.check(1)
    assert "0" in r._repr_html_() and "nonsense" in bad._repr_html_()
    empty, none = molecules([])
    assert len(empty) == len(none) == 0


# -- the table --

@QUICK
@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=12), st.randoms(use_true_random=False))
def test_take_and_digest(values, random):
    r, _ = molecules(["C" * (i + 1) for i in range(len(values))], {"y": values})
    order = list(range(len(values)))
    random.shuffle(order)
    t = r.take(order)
    assert t.y().ravel().tolist() == [values[i] for i in order] and t.ids == [str(i) for i in order]
    assert (t.digest == r.digest) == (order == sorted(order))
    assert r.take(order).digest == t.digest and r[0]["y"] == values[0]


def test_digest_sees_everything():
    base, _ = crystals([SALT], {"e": [1.0]}, {"e": "eV"})
    seen = {base.digest, crystals([SALT], {"e": [1.0]}, {"e": "meV"})[0].digest, crystals([SALT], {"e": [2.0]}, {"e": "eV"})[0].digest,
            crystals([SALT], {"f": [1.0]}, {"f": "eV"})[0].digest, crystals([SALT], {"e": [1.0]}, {"e": "eV"}, ids=["x"])[0].digest,
            base.with_columns({"note": ["a"]}).digest, base.with_columns({"note": [None]}).digest}
    assert len(seen) == 7


@pytest.mark.parametrize("records", [molecules(["CCO", "CCN"], {"y": [1, None], "z": [1, 2]}, {"z": "eV"}, name="m")[0], crystals([SALT, SALT], name="c")[0],
                                     compositions(["NaCl"], {"y": [1]})[0], LIQUIDS, REACTIONS, SNAPSHOTS, TABLE],
                         ids=["molecule", "crystal", "composition", "mixture", "reaction", "atoms", "table"])
def test_save_and_load(records, tmp_path):
    again = Records.load(records.save(tmp_path / "r.parquet"))
    assert again.frame.equals(records.frame) and again.digest == records.digest
    for k in ("name", "targets", "domain", "canonical", "conditions", "basis"): assert getattr(again, k) == getattr(records, k)
    assert list(again.targets) == list(records.targets)
    if records.domain not in ("table", "crystal", "atoms"): assert again.structures() == records.structures()
    assert "<table" in records._repr_html_() and str(len(records)) in repr(records)


def test_targets_keep_their_order(tmp_path):
    r = molecules(["C"], {"z": [1], "a": [2]}, {"z": "eV"})[0]
    assert list(Records.load(r.save(tmp_path / "r.parquet")).targets) == ["z", "a"] and Records.load(tmp_path / "r.parquet").y().tolist() == [[1, 2]]


def test_representations_refuse_other_domains():
    from types import SimpleNamespace
    from matfm.data.loading import check_domain
    for r in (LIQUIDS, REACTIONS, SNAPSHOTS, TABLE):
        with pytest.raises(BadInput, match=f"reads molecule records, these are {r.domain} records"): check_domain(SimpleNamespace(domain="molecule"), r)


def test_load_refuses_other_files(tmp_path):
    pl.DataFrame({"a": [1]}).write_parquet(tmp_path / "plain.parquet")
    with pytest.raises(BadInput, match="was not written by"): Records.load(tmp_path / "plain.parquet")
    with pytest.raises(BadInput, match="no such file"): Records.load(tmp_path / "none.parquet")


def test_records_are_checked():
    frame = pl.DataFrame({"id": ["a", "a"], "smiles": ["C", "CC"]})
    with pytest.raises(BadInput, match="ids must be unique"): Records(frame, "molecule")
    with pytest.raises(BadInput, match="need a column formula"): Records(frame, "composition")
    with pytest.raises(UnknownName, match="did you mean 'molecule'"): Records(frame, "molecules")
    with pytest.raises(BadInput, match="must be numeric"): Records(frame.with_columns(id=pl.Series(["a", "b"])), "molecule", {"smiles": ""})


# -- files --

CSV = "SMILES,logS,note\nCCO,1.5,a\nCCN,2.5,b\n"


@pytest.mark.parametrize("name, data", [
    ("plain.csv", CSV.encode()), ("bom.csv", b"\xef\xbb\xbf" + CSV.encode()), ("packed.csv.gz", gzip.compress(CSV.encode(), mtime=0)), ("utf16.csv", CSV.encode("utf-16")),
    ("windows.csv", CSV.replace("\n", "\r\n").encode()), ("latin.csv", CSV.replace(",a", ",\xe9").encode("latin-1")), ("semicolon.csv", CSV.replace(",", ";").encode()),
    ("tab.tsv", CSV.replace(",", "\t").encode()), ("rows.jsonl", b'{"SMILES":"CCO","logS":1.5,"note":"a"}\n{"SMILES":"CCN","logS":2.5,"note":"b"}\n'),
    ("rows.json", b'[{"SMILES":"CCO","logS":1.5,"note":"a"},{"SMILES":"CCN","logS":2.5,"note":"b"}]')])
def test_every_kind_of_file(name, data, tmp_path):
    (tmp_path / name).write_bytes(data)
    r, bad = read_table(tmp_path / name, targets={"logS": "log10(mol/L)"})
    assert r.structures() == ["CCO", "CCN"] and r.y().ravel().tolist() == [1.5, 2.5] and not len(bad) and r.name == name.split(".")[0]
    assert len(read_table(tmp_path / name, limit=1)[0]) == 1


@pytest.mark.parametrize("name, data, message", [
    ("empty.csv", b"", "is empty"), ("blank.csv", b" \n \n", "is empty"), ("header.csv", b"smiles,y\n", "no rows"), ("columns.csv", b"a,b\n1,2\n", "no structure column found"),
    ("broken.json", b"[{", "cannot be read as json"), ("broken.parquet", b"PAR1xx", "cannot be read as parquet"), ("broken.csv.gz", b"\x1f\x8b\x08half", "cannot be read"), ("table.xlsx", b"x", "kind of table file")])
def test_bad_files(name, data, message, tmp_path):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(BadInput, match=message): read_table(tmp_path / name)


def test_missing_columns_and_text(tmp_path):
    (tmp_path / "a.csv").write_text("smiles,logS\nCCO,1\nCCN,low\nCCC,\n")
    with pytest.raises(UnknownName, match="did you mean 'logS'"): read_table(tmp_path / "a.csv", targets=["logs"])
    with pytest.raises(UnknownName, match="did you mean 'smiles'"): read_table(tmp_path / "a.csv", structure="smile")
    with pytest.raises(BadInput, match="no such file"): read_table(tmp_path / "b.csv")
    r, bad = read_table(tmp_path / "a.csv", targets=["logS"])
    assert len(r) == 1 and bad.frame["reason"].to_list() == ["text in a numeric column: logS = 'low'", "no target value"]


@settings(max_examples=40, deadline=None)
@given(st.binary(max_size=300))
def test_any_bytes_as_csv(data):
    import tempfile
    from pathlib import Path
    with tempfile.TemporaryDirectory() as d:
        (Path(d) / "x.csv").write_bytes(data)
        try: read_table(Path(d) / "x.csv", domain="molecule")
        except BadInput: pass


def test_from_frame_pandas_and_columns():
    import pandas as pd
    r, _ = from_frame(pd.DataFrame({"SMI": ["CCO"], "y": [1.0], "id": ["q"], "formula": ["C2H6O"]}), "SMI", "molecule", {"y": ""})
    assert r.ids == ["q"] and r[0]["formula"] == "C2H6O"
    r, _ = from_frame(pl.DataFrame({"c": ["NaCl"], "formula": ["salt"]}), "c", "composition")
    assert r[0]["formula"] == "NaCl" and r[0]["formula_given"] == "salt"
    assert find_structure(["x", "CIF"]) == ("CIF", "crystal") and find_structure(["formula", "smiles"]) == ("smiles", "molecule")


def test_parallel_is_the_same():
    smiles = ["C" * (i % 30 + 1) + ("O" if i % 7 else "Q") for i in range(2400)]
    assert parse_structures(smiles, "molecule", jobs=2) == parse_structures(smiles, "molecule", jobs=1)


def test_rejected_adds_and_saves(tmp_path):
    r = Rejected([("a", 0, "x" * 500, "bad: 1")]) + Rejected([("b", 1, "y", "bad: 2")])
    assert r.reasons() == {"bad": 2} and len(r.frame["value"][0]) == 120
    assert read_frame(r.save(tmp_path / "r.csv")).height == 2


# -- mixtures, reactions, configurations, tables --

PARTS = st.lists(st.tuples(st.sampled_from(["O", "CCO", "c1ccccc1"]), st.one_of(st.none(), st.integers(1, 9)), st.sampled_from(["", "salt"])), min_size=1, max_size=6)


@QUICK
@given(PARTS, st.randoms(use_true_random=False))
def test_order_of_parts_means_nothing(parts, random):
    other = random.sample(parts, len(parts))
    a, b = (Mixture(*zip(*p, strict=True)) for p in (parts, other))
    assert a.key == b.key == mixture_key(a) and len(a) == len(parts)
    more = Mixture(*zip(*parts, ("O", 20, "salt"), strict=True))
    assert more.key != a.key


def test_a_number_that_no_integer_holds():
    assert "numbers cannot be read" in from_values([{"numbers": [9.3e18], "positions": [[0, 0, 0]]}], "atoms")[1].frame["reason"][0]


@QUICK
@given(st.dictionaries(st.sampled_from(["components", "fractions", "roles", "numbers", "positions", "lattice"]), st.lists(st.one_of(TEXT, st.floats(), st.integers(-2, 200)), max_size=4), max_size=6))
def test_any_mapping_as_structure(value):
    for domain in ("mixture", "atoms", "crystal"): partition(*from_values([value, None], domain), 2)


@QUICK
@given(st.lists(st.one_of(TEXT, st.text(alphabet="CNO>.-[]:1", max_size=20)), max_size=6))
def test_any_text_as_reaction(values): partition(*from_values(values, "reaction"), len(values))


@pytest.mark.parametrize("text, wanted", [("OCC.OC(C)=O>>O", "CC(=O)O.CCO>>O"), ("[CH3:7][OH:2]>>[OH:2][CH3:7]", "[OH:2][CH3:7]>>[OH:2][CH3:7]"), ("N->[Pd]>>N", "[NH3]->[Pd]>>N"), ("C1.C1>>CC", "CC>>CC")])
def test_reaction_forms(text, wanted):
    assert parse_reaction(text) == (wanted,) == parse_reaction(wanted)


@pytest.mark.parametrize("domain, value, reason", [
    ("mixture", {"components": []}, "without components"), ("mixture", {"components": ["O", "CCO"], "fractions": [1.0]}, "2 components but 1 fractions"),
    ("mixture", {"components": ["O"], "fractions": [-0.5]}, "finite and ≥ 0"), ("mixture", {"components": ["O"], "fractions": ["half"]}, "must be numbers"), ("mixture", {"components": ["O"], "fractions": [0]}, "every fraction is 0"),
    ("mixture", {"components": ["C1CC"]}, "a component cannot be used: not a SMILES"), ("mixture", "CCO.O", "not a mixture: str"), ("mixture", None, "empty mixture"),
    ("reaction", "CCO", "1 sides"), ("reaction", ">>CO", "without reactants"), ("reaction", "CO>>", "without product"), ("reaction", "CO>Q>C", "a side of the reaction"), ("reaction", " ", "empty reaction"),
    ("atoms", {"numbers": [1], "positions": [0, 0]}, "positions cannot be read"), ("atoms", {"numbers": [0], "positions": [0, 0, 0]}, "between 1 and 118"), ("atoms", {"numbers": [], "positions": []}, "without atoms"),
    ("atoms", {"numbers": [1], "positions": [0, 0, float("nan")]}, "NaN or infinity"), ("atoms", {"numbers": [1], "positions": [0, 0, 0], "lattice": [1, 2]}, "lattice cannot be read"), ("atoms", "H", "not a configuration: str")])
def test_bad_structures_say_why(domain, value, reason):
    r, bad = from_values([value], domain, {"y": [1]})
    assert not len(r) and reason in bad.frame["reason"][0]


def test_atoms_are_read_only_and_agree_with_ase():
    import ase
    cell = ase.Atoms("NaCl", [[0, 0, 0], [1, 1, 1]], cell=[3, 3, 3], pbc=[True, True, False])
    a = from_values([cell], "atoms")[0].structures()[0]
    assert a.formula == "ClNa" and a.lattice is not None and (a.to_ase().positions == cell.positions).all()
    with pytest.raises(ValueError): a.positions[0, 0] = 1
    assert from_values([ase.Atoms("H2", [[0, 0, 0], [0, 0, 1]], cell=[9, 9, 9], pbc=False)], "atoms")[0].structures()[0].lattice is None
    assert hill_formula({"O": 1, "H": 4, "C": 1}) == "CH4O" and "periodic" in repr(a)


def test_conditions_go_along():
    assert LIQUIDS.take([1]).conditions == {"T": "K"} and LIQUIDS.take([1]).frame["T"].to_list() == [None]
    plain = Records(LIQUIDS.frame, "mixture", LIQUIDS.targets)
    assert len({LIQUIDS.digest, plain.digest, Records(LIQUIDS.frame, "mixture", LIQUIDS.targets, conditions={"T": "degC"}, basis="mole").digest,
                Records(LIQUIDS.frame, "mixture", LIQUIDS.targets, conditions={"T": "K"}, basis="mass").digest}) == 4
    assert "T [K]" in LIQUIDS._repr_html_() and "solvent" in LIQUIDS._repr_html_()
    for bad, message in [({"conditions": {"S": "K"}}, "unknown condition"), ({"conditions": {"y": "mS/cm"}}, "a target and a condition"), ({"conditions": {"components": ""}}, "must be numeric"),
                         ({"conditions": {"T": "Kx"}}, "unknown unit"), ({"basis": "weight"}, "unknown basis")]:
        with pytest.raises(BadInput, match=message): Records(LIQUIDS.frame, "mixture", {"y": "mS/cm"}, **bad)
    with pytest.raises(BadInput, match="no fractions"): Records(REACTIONS.frame, "reaction", basis="mole")


def test_a_digest_without_conditions_is_what_it_was():
    "Committed results name tables by it."
    r, _ = molecules(["C", "CC"], {"y": [1.0, 2.0]}, {"y": "eV"})
    assert r.digest == frame_digest(r.frame, ["molecule", {"y": "eV"}]) == "7e70ba673967"


def test_digests_that_results_cite(root):
    import json
    from matfm.data.sources import load
    cited = json.loads((root / "data/results/e11_embedded_data.json").read_text())["data"]
    for name in ("matfm_molecules", "matfm_crystals"): assert load(name).digest == cited[name]


def test_tables_keep_rows_without_a_label():
    assert len(TABLE) == 2 and TABLE.targets == {"y": "eV"} and TABLE[0]["nested"] == [{"k": "v"}] and len(TABLE.digest) == 12
    assert TABLE.digest != from_frame(TABLE.frame.with_columns(nested=pl.Series([[{"k": "w"}], None])), None, "table", {"y": "eV"})[0].digest
    r, bad = from_frame(pl.DataFrame({"id": ["a", "a", None], "t": ["x", "y", "z"]}), None, "text")
    assert r.ids == ["a"] and bad.frame["reason"].to_list() == ["duplicate id: first in row 0", "no id"] and "'y'" in bad.frame["value"][0]
    for make in (lambda: TABLE.structures(), lambda: from_values(["x"], "text")):
        with pytest.raises(BadInput, match="have no structures"): make()
    with pytest.raises(UnknownName, match="structure column 'components'"): from_frame(pl.DataFrame({"x": [1]}), None, "mixture")


def test_records_from_their_own_columns():
    for r in (LIQUIDS, REACTIONS, SNAPSHOTS):
        again, bad = from_frame(r.frame, None, r.domain, r.targets, conditions=r.conditions, basis=r.basis)
        assert not len(bad) and again.frame.equals(r.frame.select(again.frame.columns)) and again.digest == r.digest


def test_json_rows_and_arrays(tmp_path):
    (tmp_path / "a.json").write_text('{"kinds": ["x"], "data": [{"text": "a", "spans": {"T1": [0, 1]}, "words": ["a"]}, {"text": "b", "spans": {}, "words": []}]}')
    f = read_frame(tmp_path / "a.json")
    assert f["text"].to_list() == ["a", "b"] and f["spans"][0] == '{"T1": [0, 1]}' and f["words"].to_list() == [["a"], []]
    np.savez(tmp_path / "a.npz", y=np.arange(3.0), axis=np.arange(5), names=np.array(["u", "v"]), half=np.ones((3, 2), np.float16), some=np.ones((1, 2, 2)), some_row=np.array([2]))
    f = read_frame(tmp_path / "a.npz")
    assert f.height == 3 and f["axis"].to_list() == [[0, 1, 2, 3, 4]] * 3 and f["names"][2].to_list() == ["u", "v"] and f["some"].to_list() == [None, None, [[1, 1], [1, 1]]]
    assert read_frame(tmp_path / "a.npz", 2).height == 2
    np.savez(tmp_path / "o.npz", y=np.array([{}, None], dtype=object))
    with pytest.raises(BadInput, match="cannot be read as npz"): read_frame(tmp_path / "o.npz")
    (tmp_path / "a.extxyz").write_text("2\nno atoms follow\n")
    with pytest.raises(BadInput, match="cannot be read as extxyz"): read_frame(tmp_path / "a.extxyz")


def test_poscar_without_elements_is_refused():
    named = "x\n1.0\n4 0 0\n0 4 0\n0 0 4\nNa Cl\n1 1\ndirect\n0 0 0\n0.5 0.5 0.5\n"
    assert Crystal.from_poscar(named).formula == "NaCl"
    with pytest.raises(BadInput, match="does not name its elements"): Crystal.from_poscar(named.replace("Na Cl\n", ""))
    beside = named.replace("Na Cl\n", "").replace("0 0 0\n0.5 0.5 0.5", "0 0 0 Na\n0.5 0.5 0.5 Cl")
    assert Crystal.from_poscar(beside).formula == "NaCl"
