"""Conformers: RDKit's own energies, no dependence on processes or cache, every failure with its reason."""
import numpy as np
import pytest

from matfm import testing
from matfm.core import BATCH_KEYS, BadInput
from matfm.data.corpora import write_corpus
from matfm.data.records import molecules
from matfm.registry import representations
from matfm.represent.conformers import ConformerSpec, Descriptors3D, Molecule3D, conformers, ensemble, summary

SMILES = ["CCO", "c1ccccc1O", "C[C@H](N)C(=O)O", "C/C=C/Cl", "C1#CC1", "OB(O)C", "*C", "CC(=O)[O-].[Na+]", "O", "[Xe]"]
QUICK = ConformerSpec(count=3)


def test_every_row_is_kept_or_rejected_with_a_reason(tmp_path):
    records, _ = molecules(SMILES, canonical=False)
    made, kept, rejected = conformers(records, QUICK, cache=tmp_path)
    assert sorted([*kept.tolist(), *rejected.frame["row"].to_list()]) == list(range(len(SMILES)))
    assert all(r.split(":")[0] in ("embedding failed", "no force field") for r in rejected.frame["reason"])
    again, _, rejected_again = conformers(records, QUICK, jobs=2)
    for a, b, c in zip(made, again, conformers(records, QUICK, cache=tmp_path)[0], strict=True):
        assert np.array_equal(a.positions, b.positions) and np.array_equal(a.positions, c.positions) and np.array_equal(a.energies, c.energies) and a.force_field == b.force_field == c.force_field
    assert rejected.frame.equals(rejected_again.frame)
    rows = summary(made, [records.ids[k] for k in kept])
    assert dict(zip(rows["smiles"], rows["force_field"], strict=True))["OB(O)C"] == "UFF" and (rows["lowest_population"] <= 1).all()


@pytest.mark.parametrize("smiles", SMILES[:4])
def test_energies_are_rdkits_and_stereo_is_kept(smiles):
    from rdkit import Chem
    from rdkit.Chem import rdForceFieldHelpers as ff
    e = ensemble(smiles, QUICK)
    mol = e.mol()
    energy = lambda k: ff.MMFFGetMoleculeForceField(mol, ff.MMFFGetMoleculeProperties(mol, "MMFF94s"), confId=k).CalcEnergy()
    assert np.allclose([energy(k) for k in range(len(e))], e.energies, atol=2e-3) and e.force_field == "MMFF94s"
    flat = Chem.Mol(mol)
    Chem.AssignStereochemistryFrom3D(flat, confId=0)
    assert Chem.MolToSmiles(Chem.RemoveHs(flat)) == Chem.CanonSmiles(smiles)


def test_pruned_conformers_are_apart():
    from rdkit.Chem import RemoveHs, rdMolAlign
    e = ensemble("CCCCCO", ConformerSpec(count=15, prune=0.7))
    rms = np.array(rdMolAlign.GetAllConformerBestRMS(RemoveHs(e.mol())))
    assert len(e) > 1 and rms.min() > 0.7 and len(ensemble("CCCCCO", ConformerSpec(count=15, prune=0))) == 15


def test_weights():
    e = ensemble("CCCCO", ConformerSpec(count=8))
    for t in (100.0, 298.15, 1000.0):
        w = e.weights(t)
        assert np.isclose(w.sum(), 1) and (np.diff(w) <= 1e-12).all()
    with pytest.raises(BadInput, match="temperature"): e.weights(0)


@pytest.mark.parametrize("seed", [0, 1, 12345, 2**31 - 1])
def test_any_seed_gives_different_embeddings(seed):
    e = ensemble("CCCCCCO", ConformerSpec(count=4, seed=seed, prune=0, steps=0))
    assert len({p.tobytes() for p in e.positions}) == 4


def test_representations(monkeypatch):
    monkeypatch.setattr("matfm.testing.BATCH_KEYS", {"positions": "[N, 3] float32", "energy": "[B] float32", **BATCH_KEYS})
    records, _ = molecules(SMILES[:4])
    for rep in (Molecule3D(count=1), Descriptors3D(conformers=ConformerSpec(count=2), average="boltzmann")): testing.check_representation(rep, records)


def test_3d_items_in_a_corpus(tmp_path):
    rep = Molecule3D(count=1)
    corpus = write_corpus(tmp_path / "c", rep, SMILES, rows_per_shard=3, limit=1)
    kept = [s for s in SMILES if s not in {r["value"] for r in corpus.rejected().frame.to_dicts()}]
    assert len(corpus) == len(kept) < len(SMILES) and corpus.representation == rep
    for item, s in zip(corpus, kept, strict=True): assert all(np.array_equal(item[k], v) for k, v in rep(s).items())
    assert representations.describe(rep)["name"] == "molecule_3d"
