"A folder of crystals is predicted file by file: every file has a row, faults have reasons, and a run that was cut off goes on."
import os
import signal
import subprocess
import sys
import time
import zipfile

import numpy as np
import polars as pl
import pytest

from matfm.adapt.finetune import FinetuneSpec, finetune
from matfm.app.bulk import predict_file
from matfm.core import BadInput
from matfm.data.records import Crystal
from matfm.data.sources import load
from matfm.models.heads import Output, Task
from matfm.models.zoo import from_scratch


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    solids = load("matfm_crystals", 60, targets=("formation_energy",))
    net = from_scratch("crystal_graph", "crystal_gnn", width=16, depth=1)
    made = finetune(net, Task((Output("formation_energy", unit="eV/atom"),)), solids.take(range(50)), solids.take(range(50, 60)), FinetuneSpec(epochs=1, threads=1))
    return made.save_pretrained(tmp_path_factory.mktemp("model")), made, solids


@pytest.fixture
def cells(model, tmp_path):
    folder = tmp_path / "cells"
    folder.mkdir()
    for i, c in enumerate(model[2].structures()): (folder / f"c{i:02d}.cif").write_text(c.to_cif())
    (folder / "c03.cif").write_text("")
    (folder / "c07.cif").write_text((folder / "c07.cif").read_text()[:200])
    (folder / "notes.txt").write_text("not a structure")
    return folder


def test_every_file_has_a_row(model, cells, tmp_path):
    done = predict_file(model[0], cells, tmp_path / "p.csv", jobs=1, rows=16)
    found, aside = pl.read_csv(tmp_path / "p.csv"), pl.read_csv(tmp_path / "p.rejected.csv")
    assert (done.rows, done.rejected, done.resumed) == (60, 2, 0) and found["row"].to_list() == [f"c{i:02d}" for i in range(60)]
    assert aside["id"].to_list() == ["c03", "c07"] and aside["row"].to_list() == [3, 7] and aside["reason"].str.len_chars().min() > 5
    direct = model[1].predict(model[2])[0]["formation_energy"].to_numpy()
    good = found["formation_energy_pred"].is_not_null().to_numpy()
    assert good.sum() == 58 and np.allclose(found["formation_energy_pred"].to_numpy()[good], direct[good], atol=1e-4)


def test_an_archive_with_blocks_and_repeated_names(model, tmp_path):
    one, two = (c.to_cif() for c in model[2].structures()[:2])
    with zipfile.ZipFile(tmp_path / "cells.zip", "w") as z:
        z.writestr("a/x.cif", one); z.writestr("b/pair.cif", one + "\n" + two); z.writestr("b/twin.cif", one + "\n" + one)
    done = predict_file(model[0], tmp_path / "cells.zip", tmp_path / "p.csv", jobs=1)
    found = pl.read_csv(tmp_path / "p.csv")
    assert (done.rows, done.rejected) == (5, 0) and found["row"].n_unique() == 5 and found["row"][0] == "a/x"
    assert found["formula"].to_list() == [model[2].structures()[k].formula for k in (0, 0, 1, 0, 0)]


def test_a_killed_run_goes_on(model, cells, tmp_path):
    predict_file(model[0], cells, tmp_path / "whole.csv", jobs=1, rows=10)
    code = f"from matfm.app.bulk import predict_file\npredict_file({str(model[0])!r}, {str(cells)!r}, {str(tmp_path / 'p.csv')!r}, jobs=1, rows=10)"
    child = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    parts, end = tmp_path / "p.csv.parts", time.monotonic() + 60
    while child.poll() is None and time.monotonic() < end and not list(parts.glob("*[0-9].csv")): time.sleep(0.002)
    os.killpg(child.pid, signal.SIGKILL) if child.poll() is None else None
    child.wait()
    again = predict_file(model[0], cells, tmp_path / "p.csv", jobs=1, rows=10)
    assert (tmp_path / "p.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes() and not parts.exists()
    assert child.returncode == 0 or again.resumed >= 10
    assert predict_file(model[0], cells, tmp_path / "p.csv", jobs=1, rows=10).resumed == 0


def test_a_changed_folder_is_another_run(model, cells, tmp_path):
    from matfm.app.bulk import _content
    before = _content(cells)
    (cells / "c05.cif").write_text((cells / "c06.cif").read_text())
    assert _content(cells) != before


def test_molecules_are_not_looked_for_in_a_folder(model, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match="holds no CIF"): predict_file(model[0], tmp_path / "empty", tmp_path / "p.csv", jobs=1)


RUTILE = Crystal(np.diag([4.6, 4.6, 2.95]), [22, 22, 8, 8, 8, 8], [[0, 0, 0], [.5, .5, .5], [.3, .3, 0], [.7, .7, 0], [.8, .2, .5], [.2, .8, .5]])


@pytest.mark.parametrize("change,message", [
    (lambda lines: lines[:-1], "states Ti2O4"),
    (lambda lines: [*lines, lines[-1]], "states Ti2O4"),
    (lambda lines: [*lines[:-1], lines[-2].replace("O4", "O5")], "0.00 Å apart"),
    (lambda lines: [ln for ln in lines if not ln.startswith("_symmetry")][:-3] + [lines[-1]], "states Ti2O4"),
    (lambda lines: [ln.replace("_cell_length_c   ", "_cell_length_c   -") for ln in lines], "length is negative"),
    (lambda lines: lines[:-6], "no rows"),
    (lambda lines: [ln.replace("Ti  Ti0", "Xx  Xx0") for ln in lines], "no element 'Xx'"),
    (lambda lines: [ln.replace("0.30000000  0.30000000", "abc  0.30000000") for ln in lines], "abc"),
])
def test_files_that_contradict_themselves(change, message):
    lines = RUTILE.to_cif().rstrip().splitlines()
    assert Crystal.from_cif("\n".join(lines)).formula == "TiO2"
    with pytest.raises(BadInput, match=message): Crystal.from_cif("\n".join(change(lines)))


def test_half_a_rock_salt_cell_without_symmetry():
    from pymatgen.io.cif import CifWriter
    salt = Crystal(4.2 * np.eye(3), [12] * 4 + [8] * 4, [[0, 0, 0], [0, .5, .5], [.5, 0, .5], [.5, .5, 0], [.5, 0, 0], [0, .5, 0], [0, 0, .5], [.5, .5, .5]])
    text = str(CifWriter(salt.to_pymatgen(), symprec=0.01))
    assert len(Crystal.from_cif(text)) == 8
    lines = text.splitlines()
    begin = next(k for k, ln in enumerate(lines) if "_symmetry_equiv_pos_site_id" in ln) - 1
    end = next(k for k, ln in enumerate(lines) if "_atom_site_type_symbol" in ln) - 1
    bare = [ln for ln in lines[:begin] + lines[end:] if not ln.startswith("_symmetry")]
    with pytest.raises(BadInput, match="gives 2 and no symmetry"): Crystal.from_cif("\n".join(bare))


def test_nothing_that_was_right_is_refused(mirror):
    from matfm.data.sources import load_frame
    texts = load_frame("mp_20", 300)["cif"].drop_nulls().to_list()
    made = [Crystal.from_cif(t) for t in texts]
    assert len(made) > 250 and all(len(Crystal.from_cif(c.to_cif())) == len(c) for c in made[:50])


def test_reasons_of_a_run_that_was_cut_off_do_not_stay(tmp_path):
    "A row that ran out of time before the kill may be answered after it."
    from matfm.app.bulk import join_parts, write_part
    parts = tmp_path / "p.csv.parts"
    parts.mkdir()
    rows = [["CCO"], ["CC"]]
    write_part(parts, 0, 0, rows, [["1"], []], {1: "no answer within 60 s"}, 0, 1, 1)
    (parts / "0000000.csv").unlink()
    write_part(parts, 0, 0, rows, [["1"], ["2"]], {}, 0, 1, 1)
    write_part(parts, 1, 2, [["C1CC"]], [[]], {0: "not a SMILES"}, 0, 1, 1)
    assert join_parts(parts, 2, tmp_path / "p.csv", ["smiles", "y"]) == 1
    assert (tmp_path / "p.csv").read_text() == "smiles,y\nCCO,1\nCC,2\nC1CC,\n"
    assert (tmp_path / "p.rejected.csv").read_text() == "id,row,value,reason\n2,2,C1CC,not a SMILES\n"
