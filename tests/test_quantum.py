"Molecules by recipe and their GFN2-xTB labels: what ships is what the code computes; interruption, resumption and bad input."
import json
from collections import Counter

import numpy as np
import polars as pl
import pytest
from rdkit import Chem

from matfm.core import BadInput, sha256_file
from matfm.recipes.enumerate import enumerate_molecules, families, fixed_split, join, objection, open_bonds, split_group
from matfm.data.records import Records, molecules

SHIPPED = ["homo", "lumo", "gap", "dipole", "atomisation_energy", "solvation_energy"]


@pytest.fixture(scope="module")
def quantum():
    pytest.importorskip("tblite.interface", reason="tblite is not installed")
    from matfm.recipes import quantum
    return quantum


@pytest.fixture(scope="module")
def shipped(request):
    folder = request.config.rootpath / "data" / "molecules"
    if not (folder / "labelled.parquet").is_file():
        pytest.skip("data/molecules is not in this checkout")
    return folder


@pytest.fixture(scope="module")
def dozen(shipped):
    "Twelve shipped rows with their geometries, drawn with a fixed seed among the smaller molecules."
    table = Records.load(shipped / "labelled.parquet").frame.filter(pl.col("n_heavy") <= 10)
    rows = table[np.random.default_rng(3).permutation(len(table))[:12]]
    return rows.join(pl.read_parquet(shipped / "geometries.parquet"), on="id", how="left").to_dicts()


# ---- enumeration

@pytest.mark.parametrize("family", [f for f, s in families().items() if ">>" not in s[0]])
def test_every_family_gives_distinct_welcome_molecules(family):
    made, refused = enumerate_molecules(40, seed=1, families=[family])
    smiles = made.structures()
    assert len(set(smiles)) == len(smiles) >= 20 and set(made.frame["family"]) == {family}
    for s in smiles:
        mol = Chem.MolFromSmiles(s)
        assert Chem.MolToSmiles(mol) == s and objection(mol) == ""
        assert sum(a.GetFormalCharge() for a in mol.GetAtoms()) == 0
    assert all(refused.frame["reason"])


def test_enumeration_depends_on_seed_and_nothing_else():
    a, b, c = (enumerate_molecules(120, seed=s)[0] for s in (0, 0, 1))
    assert a.digest == b.digest and a.digest != c.digest
    with pytest.raises(BadInput):
        enumerate_molecules(0)


def test_scaffolds_need_a_fragment_for_each_open_bond():
    assert open_bonds("O=C(O%31)O%32") == ["31", "32"]
    with pytest.raises(ValueError):
        join("O=C(O%31)O%32", ["C"])


def test_split_keeps_groups_whole_and_never_moves():
    made, _ = enumerate_molecules(1200, seed=2)
    groups = [split_group(s) for s in made.structures()]
    parts = fixed_split(groups)
    assert all(len(set(p)) == 1 for p in pl.DataFrame({"g": groups, "p": parts}).group_by("g").agg("p")["p"].to_list())
    big = {g for g, n in Counter(groups).items() if n > 0.005 * len(groups)}
    assert {p for g, p in zip(groups, parts, strict=True) if g in big} == {"train"}
    order = np.random.default_rng(0).permutation(len(groups))
    assert fixed_split([groups[i] for i in order]) == [parts[i] for i in order]


# ---- what ships

def test_shipped_files_are_whole(shipped):
    sums = json.loads((shipped / "checksums.json").read_text())
    assert set(sums) == {"unlabelled.parquet", "labelled.parquet", "geometries.parquet", "rejected.parquet"}
    for name, digest in sums.items():
        assert sha256_file(shipped / name) == digest and (shipped / name).stat().st_size < 20e6


def test_shipped_tables_agree(shipped):
    labelled, unlabelled = Records.load(shipped / "labelled.parquet"), Records.load(shipped / "unlabelled.parquet")
    assert set(labelled.targets) == set(SHIPPED) and len(unlabelled) >= 50_000
    assert unlabelled.frame["smiles"].n_unique() == len(unlabelled) and labelled.frame["smiles"].n_unique() == len(labelled)
    both = labelled.frame.join(unlabelled.frame, on="id", how="left", suffix="_u")
    assert (both["smiles"] == both["smiles_u"]).all() and (both["split"] == both["split_u"]).all()
    assert (unlabelled.frame["held_out"] == (unlabelled.frame["split"] == "test")).all()
    assert np.isfinite(labelled.y()).all() and labelled.frame["converged"].all()
    shapes = pl.read_parquet(shipped / "geometries.parquet")
    assert shapes["id"].to_list() == labelled.ids
    elements = {int(z) for z in shapes["numbers"].explode().unique()}
    assert {1, 5, 6, 7, 8, 9, 14, 15, 16, 17, 35, 53} == elements
    gap = labelled.frame["lumo"] - labelled.frame["homo"] - labelled.frame["gap"]
    assert float(gap.abs().max()) < 1e-9


def test_no_test_neighbourhood_in_training(shipped):
    frame = Records.load(shipped / "labelled.parquet").frame
    groups = {p: {split_group(s) for s in frame.filter(pl.col("split") == p)["smiles"]} for p in ("train", "valid", "test")}
    assert all(groups.values())
    assert not groups["test"] & (groups["train"] | groups["valid"]) and not groups["valid"] & groups["train"]


def test_shipped_energies_at_shipped_geometries(quantum, dozen):
    for row in dozen:
        numbers, positions = np.array(row["numbers"]), np.array(row["positions"]).reshape(-1, 3)
        engine = quantum.Xtb(numbers, positions)
        energy, forces = engine(positions)
        found = engine.properties()
        assert abs(energy - row["total_energy_ev"]) < 1e-3, row["smiles"]
        assert np.sqrt((forces**2).sum(1)).max() < 0.032, row["smiles"]
        for k in ("homo", "lumo", "gap", "dipole"):
            assert abs(found[k] - row[k]) < 5e-3, (row["smiles"], k)
        atoms = sum(quantum.free_atom(int(z)) for z in numbers)
        assert abs(atoms - energy - row["atomisation_energy"]) < 1e-3
        water = quantum.Xtb(numbers, positions, solvent="water")(positions)[0] - energy
        assert abs(water - row["hydration_energy_ev"]) < 2e-3
        assert quantum.changed_bonds(Chem.AddHs(Chem.MolFromSmiles(row["smiles"])), positions) == ""


def test_shipped_rows_again_from_smiles(quantum, dozen):
    "Another RDKit may embed other conformers: most rows must agree, none may be far off."
    agree = 0
    for row in dozen:
        fresh = quantum.gfn2_labels(row["smiles"])
        assert abs(fresh["atomisation_energy"] - row["atomisation_energy"]) < 0.5, row["smiles"]
        agree += abs(fresh["gap"] - row["gap"]) < 0.02 and abs(fresh["dipole"] - row["dipole"]) < 0.05
    assert agree >= 8


# ---- the engine

def test_forces_are_the_slope_of_the_energy(quantum):
    c = quantum.find_conformer("CS(=O)(=O)F")
    engine = quantum.Xtb(c.numbers, c.positions)
    forces, h = engine(c.positions)[1], 2e-3
    for atom, axis in [(0, 0), (1, 1), (2, 2), (5, 0)]:
        step = np.zeros_like(c.positions)
        step[atom, axis] = h
        slope = (engine(c.positions + step)[0] - engine(c.positions - step)[0]) / (2 * h)
        assert abs(slope + forces[atom, axis]) < 5e-3


def test_energy_does_not_depend_on_orientation(quantum):
    c = quantum.find_conformer("CCO")
    rotation = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]
    moved = c.positions @ rotation.T + [1.0, -2.0, 3.0]
    a, b = quantum.Xtb(c.numbers, c.positions)(c.positions), quantum.Xtb(c.numbers, moved)(moved)
    assert abs(a[0] - b[0]) < 1e-5 and np.abs(a[1] @ rotation.T - b[1]).max() < 1e-3


def test_relaxation_reports_where_it_gave_up(quantum):
    c = quantum.find_conformer("CCCO")
    done = quantum.relax(quantum.Xtb(c.numbers, c.positions), c.positions, quantum.force_field_hessian(c), fmax=1e-9, max_steps=2)
    assert done.steps == 2 and done.fmax > 1e-9
    with pytest.raises(quantum.LabelFailed, match="not converged in 1 steps"):
        quantum.gfn2_labels("COCCOC", quantum.LabelSpec(fmax=1e-6, max_steps=1))


# ---- labelling tables

def table(smiles):
    return molecules(smiles, name="some")[0]


def test_bad_molecules_are_set_aside_with_a_reason(quantum, tmp_path):
    good = table(["O", "[CH3]", "[Na+].[Cl-]", "C"])
    broken = Records(pl.DataFrame({"id": ["x"], "smiles": ["C1CC"]}), "molecule")
    labelled, failed = quantum.label(good, tmp_path / "a")
    assert labelled.structures() == ["O", "C"] and failed.reasons().keys() >= {"open shell"}
    assert failed.frame["row"].to_list() == [1, 2] and len(failed) == 2
    labelled, failed = quantum.label(broken, tmp_path / "b")
    assert len(labelled) == 0 and failed.frame["reason"].to_list() == ["not a valid SMILES"]


def test_resumes_after_interruption(quantum, tmp_path, monkeypatch):
    records, calls = table(["O", "C", "N", "CO", "CC"]), []
    real = quantum.gfn2_labels

    def stops(smiles, spec):
        calls.append(smiles)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(smiles, spec)

    monkeypatch.setattr(quantum, "gfn2_labels", stops)
    with pytest.raises(KeyboardInterrupt):
        quantum.label(records, tmp_path, size=2)
    part, _ = quantum.collect(records, tmp_path)
    assert part.structures() == ["O", "C"]
    done, failed = quantum.label(records, tmp_path, size=2)
    assert done.structures() == records.structures() and not len(failed)
    assert Counter(calls) == {"O": 1, "C": 1, "N": 2, "CO": 2, "CC": 1}
    fresh, _ = quantum.label(records, tmp_path / "fresh", size=2)
    assert np.abs(done.y() - fresh.y()).max() < 1e-6
    assert not list(tmp_path.glob("*.part"))


def test_two_processes_give_the_same(quantum, tmp_path):
    records = table(["O", "C", "N", "CO"])
    one, _ = quantum.label(records, tmp_path / "one", size=2)
    two, _ = quantum.label(records, tmp_path / "two", size=2, jobs=2)
    assert one.structures() == two.structures() and np.abs(one.y() - two.y()).max() < 1e-6


def test_a_folder_belongs_to_one_job(quantum, tmp_path):
    quantum.label(table(["O"]), tmp_path)
    for records, spec in [(table(["C"]), quantum.LabelSpec()), (table(["O"]), quantum.LabelSpec(conformers=2))]:
        with pytest.raises(BadInput, match="another job"):
            quantum.label(records, tmp_path, spec)


def test_queue_gives_each_group_its_share(quantum):
    smiles = ["C" * n for n in [8] * 400 + [18] * 400]
    by_size = quantum.queue_order(smiles)
    by_group = quantum.queue_order(smiles, groups=[str(len(s)) for s in smiles])
    assert sorted(by_size.tolist()) == sorted(by_group.tolist()) == list(range(800))
    assert (by_size[:200] < 400).mean() > 0.9 and 0.3 < (by_group[:200] < 400).mean() < 0.7
    assert (by_group == quantum.queue_order(smiles, groups=[str(len(s)) for s in smiles])).all()


def test_only_molecules_can_be_labelled(quantum, tmp_path):
    from matfm.data.records import compositions
    with pytest.raises(BadInput, match="label needs molecules"):
        quantum.label(compositions(["NaCl"])[0], tmp_path)
