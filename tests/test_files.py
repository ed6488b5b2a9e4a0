"Files of one's own: every format, every guess, every way in which a file can be broken."
import contextlib
import gzip
import subprocess
import sys
import zipfile

import numpy as np
import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from matfm.core import BadInput
from matfm.data import files
from matfm.data.files import find_structures, join_table, kind_of, parse_unit, read, unit_in, with_points, xyz_frames
from matfm.data.records import Crystal, check_target_unit

CELL = Crystal(4.2 * np.eye(3), [12, 8], [[0, 0, 0], [0.5, 0.5, 0.5]])
POSCAR = "salt\n1.0\n4.2 0 0\n0 4.2 0\n0 0 4.2\nNa Cl\n1 1\nDirect\n0 0 0\n.5 .5 .5\n"
XYZ = '2\nLattice="4 0 0 0 4 0 0 0 4" Properties=species:S:1:pos:R:3:forces:R:3 energy=-3.5 pbc="T T T"\nNa 0 0 0 0 0 0.1\nCl 2 2 2 0 0 -0.1\n'
WATER = '3\nProperties=species:S:1:pos:R:3:REF_forces:R:3 REF_energy=-14.0\nO 0 0 0 0 0 0\nH 1 0 0 0 0 0\nH 0 1 0 0 0 0\n'


def mol(smiles, **properties):
    from rdkit import Chem
    return Chem.MolToMolBlock(Chem.MolFromSmiles(smiles)) + "".join(f"> <{k}>\n{v}\n\n" for k, v in properties.items()) + "$$$$\n"


def guess(r, role): return next(g for g in r.guesses if g.role == role)


def test_the_page_is_light():
    code = "import sys, matfm.data.files; print([m for m in ('torch', 'rdkit', 'pymatgen', 'ase', 'sklearn', 'joblib', 'papermill') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


@settings(deadline=None)
@given(st.text(alphabet="eVKmolLgcÅ°%µ/^-()[] _23pernATC·², ", max_size=14))
def test_a_unit_is_understood_or_open(text):
    with contextlib.suppress(BadInput): check_target_unit(parse_unit(text))
    for name in (f"y [{text}]", f"log y ({text})", f"y_{text}", f"y / {text}"): check_target_unit(unit_in(name)[0])


@pytest.mark.parametrize("name,unit", [("gap [eV]", "eV"), ("gap_eV", "eV"), ("gap_ev", "eV"), ("E_hull_eV_per_atom", "eV/atom"), ("E_eV_per_f.u.", "eV/formula_unit"), ("T / °C", "degC"), ("rho, kg m-3", "kg/m^3"),
                                       ("S (J/mol K)", "J/mol/K"), ("lnk (1/s)", "1/s"), ("ln k (1/s)", "ln(1/s)"), ("LogS [mol/L]", "log10(mol/L)"), ("Bulk modulus GPa", "GPa"), ("Tg_K", "K"), ("log_K", ""), ("x_mol", ""),
                                       ("kappa (W/mK)", ""), ("d (A)", ""), ("share (%)", "percent"), ("yield (n=3)", ""), ("mass_kg_m3", ""), ("fe_h2", "")])
def test_units_in_names(name, unit): assert unit_in(name)[0] == unit


def test_commas():
    assert with_points(pl.Series(["1,5", "2", "-3,25e2", None, ""])).to_list() == ["1.5", "2", "-3.25e2", "", ""]
    for cells in (["1,000", "2,500"], ["1,5", "x", "y"], ["1,234.5"], ["2.5"], ["a, b"], []): assert with_points(pl.Series(cells, dtype=pl.String)) is None


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "latin-1"])
def test_tables_of_any_make(tmp_path, separator, encoding):
    sign = "." if separator == "," else ","
    rows = ["Verbindung|Länge (Å)|drawn", *(f"nÄ{i}|{i}{sign}5|{'C' * i}O" for i in range(1, 6))]
    (tmp_path / "t.csv").write_bytes("\r\n".join(rows).replace("|", separator).encode(encoding))
    r = read(tmp_path / "t.csv")
    assert r.records.structures()[1] == "CCO" and r.records.y()[:, 0].tolist() == [1.5, 2.5, 3.5, 4.5, 5.5] and r.records.frame["Verbindung"][0] == "nÄ1"
    notes = [g.why for g in r.guesses if g.role == "file"]
    assert r.records.targets == {"Länge (Å)": "angstrom"} and [n.split("read as ")[1].split(",")[0] for n in notes] == {"latin-1": ["Latin-1"], "utf-16": ["UTF-16"]}.get(encoding, [])


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.sampled_from(["CCO", "C1CC", "", "c1ccccc1", "nan", "CO", "C.C", "[U]"]), st.one_of(st.floats(-9, 9).map(str), st.sampled_from(["", "n.d.", ">3", "yes", "1,5"]))), min_size=1, max_size=8))
def test_no_row_is_lost(tmp_path, rows):
    pl.DataFrame(rows, schema={"smiles": pl.String, "y (eV)": pl.String}, orient="row").write_csv(tmp_path / "t.csv")
    r = read(tmp_path / "t.csv", targets=["y (eV)"])
    assert len(r.records) + len(r.rejected) == len(rows) and sorted([*map(int, r.records.ids), *r.rejected.frame["row"]]) == list(range(len(rows)))
    assert r.records.targets == {"y (eV)": "eV"} and repr(r) and r._repr_html_()


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=120), st.sampled_from(["csv", "json", "parquet", "sdf", "smi", "xyz", "cif", "POSCAR", "zip", "csv.gz"]))
def test_garbage_is_refused_or_set_aside(tmp_path, data, kind):
    (tmp_path / f"x.{kind}").write_bytes(data)
    try: r = read(tmp_path / f"x.{kind}")
    except BadInput as e: assert str(e)
    else: assert all(r.rejected.frame["reason"].str.len_chars() > 0)


def test_two_columns_of_smiles(tmp_path):
    pl.DataFrame({"reagent": ["CCO", "CCN", "CCC", "CCCl"], "Product SMILES": ["CC=O", "CC#N", "C=CC", "C=C"], "y": [1.0, 2.0, 3.0, 4.0]}).write_csv(tmp_path / "t.csv")
    r = read(tmp_path / "t.csv")
    assert guess(r, "structure").name == "Product SMILES" and "also possible: 'reagent'" in guess(r, "structure").why
    assert read(tmp_path / "t.csv", structure="reagent").records.structures()[0] == "CCO"


def test_categories_are_no_structures():
    frame = pl.DataFrame({"phase": ["BCC", "FCC", "BCC", "FCC"] * 10, "alloy": [f"Fe{k + 1}Ni" for k in range(40)], "flag": ["Y", "N"] * 20})
    assert find_structures(frame)[0].name == "alloy" and find_structures(frame)[1] == "composition"
    with pytest.raises(BadInput, match="no structure column"): find_structures(frame.select("flag"))
    assert find_structures(pl.DataFrame({"r": ["CCO.CC(=O)O>>CC(=O)OCC", "CO.CC(=O)O>>CC(=O)OC", "CCCO>>CCC=O"]}))[1] == "reaction"


def test_the_call_leaves_nothing_to_guess(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cells").mkdir()
    for i in range(3): (tmp_path / "cells" / f"c{i}.cif").write_text(CELL.to_cif())
    pl.DataFrame({"name": ["c0", "c1", "c2"], "K (GPa)": [1.0, 2.0, 3.0], "T [K]": [300, 310, 320]}).write_csv(tmp_path / "targets.csv")
    (tmp_path / "w.extxyz").write_text(XYZ * 2 + WATER)
    (tmp_path / "m.sdf").write_text(mol("CCO", logS_M="1") + mol("CCC", logS_M="2"))
    for name in ("cells", "w.extxyz", "m.sdf"):
        r = read(name)
        again = eval(r.call, {"read": read})
        assert again.records.digest == r.records.digest and again.call == r.call
    assert read("cells").records.conditions == {"T [K]": "K"} and read("cells").table == "targets.csv" and len(read("cells", table="").records.targets) == 0


def test_repeats_and_conflicts(tmp_path):
    (tmp_path / "t.csv").write_text("id,smiles,y\na,CCO,1\nb,OCC,2\nc,CC,3\na,CCC,4\n")
    r = read(tmp_path / "t.csv")
    assert r.repeats["ids"].to_list() == [["0", "1"]] and r.conflicts["difference"].to_list() == [1.0] and "1 of them with different labels" in repr(r)
    assert len(r.records) == 4 and r.records.frame["id_given"].to_list() == ["a", "b", "c", "a"] and "repeats or gaps" in guess(r, "id").why
    assert read(tmp_path / "t.csv", ids="id").rejected.frame["reason"][0].startswith("duplicate id")


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("cut", [0, 40, 150])
def test_sdf(tmp_path, newline, cut):
    from rdkit import Chem
    text = mol("CCO", gap_eV="7.5") + mol("c1ccccc1", gap_eV="5") + Chem.MolToMolBlock(Chem.MolFromSmiles("CCCCCCN"))[:cut or None]
    (tmp_path / "x.sdf.gz").write_bytes(gzip.compress(text.replace("\n", newline).encode()))
    r = read(tmp_path / "x.sdf.gz", targets=["gap_eV"])
    assert r.records.structures() == ["CCO", "c1ccccc1"] and r.records.targets == {"gap_eV": "eV"}
    reason = r.rejected.frame["reason"].to_list()
    assert len(reason) == 1 and (("cut off" in reason[0]) if cut else reason[0] == "no target value") and r.rejected.frame["row"].to_list() == [2]


def test_xyz(tmp_path):
    broken = XYZ.replace("Cl 2 2 2", "Cl 2 2 x")
    (tmp_path / "x.extxyz").write_text(XYZ + broken + XYZ.replace("energy=-3.5", "REF_energy=-3") + XYZ[:60])
    r = read(tmp_path / "x.extxyz")
    assert r.records.domain == "crystal" and r.records.ids == ["0", "2"] and r.records.targets == {"energy": "eV"} and r.records.y()[:, 0].tolist() == [-3.5, -3.0]
    assert r.records.frame["forces"].to_list()[0] == [0, 0, 0.1, 0, 0, -0.1] and r.rejected.frame["row"].to_list() == [1, 3]
    (tmp_path / "w.xyz").write_text(WATER + XYZ)
    w = read(tmp_path / "w.xyz")
    assert w.records.domain == "atoms" and [a.lattice is None for a in w.records.structures()] == [True, False] and w.records.targets == {"energy": "eV"}
    assert list(xyz_frames(WATER + "\n" + XYZ)) == [WATER, XYZ] and list(xyz_frames("")) == [] and list(xyz_frames("x\ny\n")) == ["x\ny\n"]


@pytest.fixture
def cells(tmp_path):
    "A folder with CIF, POSCAR, a broken file and other things."
    root = tmp_path / "cells"
    (root / "run1").mkdir(parents=True)
    (root / "a.cif").write_text(CELL.to_cif())
    (root / "b.cif.gz").write_bytes(gzip.compress(CELL.to_cif().encode()))
    (root / "c.vasp").write_text(POSCAR)
    (root / "run1" / "POSCAR").write_text(POSCAR)
    (root / "d.cif").write_text(CELL.to_cif()[:120])
    (root / "e.cif").write_bytes(bytes(range(200)))
    (root / ".hidden.cif").write_text("x")
    return root


def test_mixed_folder(cells, tmp_path):
    r = read(cells)
    assert r.records.ids == ["a", "b", "c", "run1/POSCAR"] and r.records.frame["formula"].to_list() == ["MgO", "MgO", "NaCl", "NaCl"]
    assert {i: w.split(":")[0] for i, w in zip(r.rejected.frame["id"], r.rejected.frame["reason"], strict=True)} == {"d": "not a usable CIF", "e": "e.cif is binary, not text"}
    assert read(cells, jobs=2).records.digest == r.records.digest and len(read(cells, limit=2).records) == 2
    with zipfile.ZipFile(tmp_path / "cells.zip", "w") as z:
        for p in cells.rglob("*"): z.write(p, p.relative_to(cells))
    assert read(tmp_path / "cells.zip").records.digest == r.records.digest


def test_table_beside(cells, tmp_path):
    (cells / "id_prop.csv").write_text("a,1.5\nrun1/POSCAR,2\nghost,3\na,4\n")
    r = read(cells)
    assert r.records.ids == ["a", "run1/POSCAR"] and r.records.y()[:, 0].tolist() == [1.5, 2.0] and r.table.endswith("id_prop.csv")
    reasons = dict(zip(r.rejected.frame["id"], r.rejected.frame["reason"], strict=True))
    assert reasons["ghost"].startswith("row without a file") and reasons["b"].startswith("file without a row") and reasons["a"].startswith("repeated row") and len(r.rejected) == 6
    pl.DataFrame({"who": ["x"], "y": [1.0]}).write_csv(tmp_path / "other.csv")
    with pytest.raises(BadInput, match="no column of other.csv holds the names of the files, e.g. a, b"): read(cells, table=tmp_path / "other.csv")
    assert read(cells, table="").records.targets == {}
    with pytest.raises(BadInput, match="no such file"): read(cells, table=tmp_path / "nowhere.csv")
    assert join_table(["1", "2"], pl.DataFrame({"id": [2, 1], "y": [0.5, 0.25]})).has == [1, 0]


def test_tables_page_takes_folders(cells, tmp_path):
    from matfm.adapt.tables import read_labelled, read_unlabelled
    pl.DataFrame({"file": ["a.cif", "c.vasp"], "K (GPa)": [1.5, 2.0]}).write_csv(tmp_path / "moduli.csv")
    apart = read_labelled(tmp_path / "moduli.csv", "K (GPa)", cif=str(cells), allowed=1.0)
    (tmp_path / "moduli.csv").rename(cells / "targets.csv")
    for records, rejected in (apart, read_labelled(cells, ["K (GPa)"], allowed=1.0)):
        assert records.ids == ["a", "c"] and records.targets == {"K (GPa)": "GPa"} and len(rejected) == 4
    (cells / "targets.csv").unlink()
    assert len(read_unlabelled(cells)[0]) == 4
    with pytest.raises(BadInput, match="one of smiles"): read_labelled(cells, "y", "a", "b")


def test_one_file_of_structures(tmp_path):
    (tmp_path / "CONTCAR").write_text(POSCAR)
    (tmp_path / "two.cif").write_text(CELL.to_cif() + "\n" + CELL.to_cif().replace("data_MgO", "data_other") + "\ndata_global\n_journal_year 2001\n")
    (tmp_path / "old").write_text(CELL.to_cif())
    (tmp_path / "POSCAR_4").write_text(POSCAR.replace("Na Cl\n", ""))
    assert read(tmp_path / "CONTCAR").records.ids == ["CONTCAR"] and read(tmp_path / "old").records.frame["formula"].to_list() == ["MgO"]
    assert read(tmp_path / "two.cif").records.ids == ["two#MgO", "two#other"] and len(read(tmp_path / "two.cif").repeats) == 1
    assert "not name its elements" in read(tmp_path / "POSCAR_4").rejected.frame["reason"][0], "without them hydrogen and helium would be made up"


@pytest.mark.parametrize("name,content,message", [
    ("t.xlsx", b"PK", "spreadsheet"), ("t.csv", b"PK\x03\x04", "under a wrong name"), ("t.csv", b"a\0b,c\n1,2\n", "binary"), ("t.csv", b"", "is empty"), ("t.csv", b"smiles,y\n", "header but no rows"),
    ("t.sdf", b"nothing of the kind", "no readable molecule"), ("t.xyz", b"prose", "no readable frame"), ("t.zip", b"PK", "no ZIP archive"), ("t.docx", b"x", "unknown kind of file"), ("t.csv.gz", b"\x1f\x8bxx", "cannot be unpacked"),
    ("t.csv", b"a,b\n1,2\n3,4\n", "no structure column found"), ("t.json", b"{", "cannot be read as json"), ("t.parquet", b"PAR", "cannot be read as parquet")])
def test_bad_files(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BadInput, match=message): read(tmp_path / name)


def test_bad_folders_and_names(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "prose").mkdir()
    (tmp_path / "prose" / "README.md").write_text("x")
    with zipfile.ZipFile(tmp_path / "book.zip", "w") as z: z.writestr("xl/workbook.xml", "x")
    for name, message in [("empty", "it is empty"), ("prose", "its files are README.md"), ("book.zip", "spreadsheet"), ("emty", "did you mean 'empty'"), ("q.csv", "no such file")]:
        with pytest.raises(BadInput, match=message): read(tmp_path / name)


def test_what_is_too_large_is_refused(cells, monkeypatch):
    monkeypatch.setattr(files, "LARGEST", {"file": 50, "structure": 300})
    assert any("too large" in w for w in read(cells).rejected.frame["reason"])
    (cells / "t.csv").write_text("smiles,y\n" * 20)
    with pytest.raises(BadInput, match="cut it into parts"): kind_of(cells / "t.csv")


def test_wrong_keywords(tmp_path):
    (tmp_path / "t.csv").write_text("smiles,yield\nCCO,1\nCCN,2\n")
    (tmp_path / "x.xyz").write_text(XYZ)
    for how, message in [(dict(structure="smile"), "did you mean 'smiles'"), (dict(targets=["yeild"]), "did you mean 'yield'"), (dict(ids="name"), "unknown column"), (dict(domain="polymer"), "unknown domain"),
                         (dict(targets={"yield": "bananas"}), "unknown unit"), (dict(table="x"), "belongs to CIF or POSCAR"), (dict(conditions=["T"]), "unknown column"), (dict(structure="yield"), "say domain=")]:
        with pytest.raises(BadInput, match=message): read(tmp_path / "t.csv", **how)
    with pytest.raises(BadInput, match="this format fixes"): read(tmp_path / "x.xyz", domain="molecule")


SETS = {"esol": "molecule", "aqsoldb": "molecule", "melting_ochem": "molecule", "freesolv": "molecule", "malaria_ntd_ec50": "molecule", "matbench_expt_gap": "composition", "matbench_phonons": "crystal", "wolverton_oxides": "composition",
        "mpea_alloys": "composition", "perovskite_tau": "composition", "supercon_stanev": "composition", "mp_20": "crystal"}


@pytest.mark.parametrize("name", SETS)
def test_public_sets_are_understood(mirror, name):
    from matfm.data.sources import source
    path = next(p for part in ("molecules", "crystals") for p in (mirror / part).glob(f"{name}.*") if p.name.split(".")[0] == name)
    r, known = read(path, limit=60), source(name)
    assert r.records.domain == SETS[name] and guess(r, "structure").name == known.structure and len(r.rejected) <= 6
    assert all(known.targets[c] == u for c, u in r.records.targets.items() if u and c in known.targets), "a unit that is guessed is right"
