"""Fingerprints, topological indices and composition statistics against RDKit, networkx-like brute force, and matminer."""
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from matfm import testing
from matfm.data.records import compositions, molecules
from matfm.represent.descriptors import KINDS, CompositionStats, Concat, Ecfp, Fingerprint, MoleculeDescriptors, matrix, table
from matfm.represent.molecule import read_molecule
from matfm.represent.topology import DEGREE_INDICES, DEGREES, TopologicalIndices, graphs_of

SMILES = ["CCO", "c1ccccc1O", "CC(=O)N", "C[N+](C)(C)C", "C", "OC(=O)C1CC1", "C/C=C/Cl", "N[C@@H](C)C(=O)O", "[Na+].[Cl-]", "C1CC2CCC1C2", "CC(C)(C)c1ccc(O)cc1.Cl"]


@pytest.mark.parametrize("rep", [*(Fingerprint(k, bits=128) for k in KINDS), Fingerprint("avalon", counts=True), TopologicalIndices(), Concat((Ecfp(bits=16), TopologicalIndices(("reverse",), False), MoleculeDescriptors()))],
                         ids=lambda r: getattr(r, "kind", type(r).__name__))
def test_conformance_and_batches(rep):
    records, _ = molecules(SMILES, canonical=False)
    testing.check_representation(rep, records)
    X, kept, rejected = matrix(rep, records, block=3)
    assert len(kept) == len(SMILES) and X.shape[1] == len(rep.names) == len(set(rep.names))
    assert np.array_equal(X, np.stack([rep(s)["x"] for s in SMILES])) and np.isfinite(X).all()


def test_fingerprints_are_rdkits():
    from rdkit import DataStructs
    from rdkit.Avalon import pyAvalonTools
    from rdkit.Chem import MACCSkeys, rdFingerprintGenerator as g
    m = read_molecule("CC(=O)Oc1ccccc1C(=O)O")
    direct = {"maccs": MACCSkeys.GenMACCSKeys(m), "avalon": pyAvalonTools.GetAvalonFP(m, 512), "rdkit": g.GetRDKitFPGenerator(fpSize=512).GetFingerprint(m),
              "atom_pair": g.GetAtomPairGenerator(fpSize=512).GetFingerprint(m), "topological_torsion": g.GetTopologicalTorsionGenerator(fpSize=512).GetFingerprint(m)}
    for kind, bits in direct.items():
        assert np.flatnonzero(Fingerprint(kind, bits=512)("CC(=O)Oc1ccccc1C(=O)O")["x"]).tolist() == list(bits.GetOnBits()), kind
    assert isinstance(direct["maccs"], DataStructs.ExplicitBitVect)


def brute(smiles: str) -> dict[str, float]:
    "The same indices by loops over atoms and a breadth-first search."
    m = read_molecule(smiles)
    n, near = m.GetNumAtoms(), {a.GetIdx(): [b.GetIdx() for b in a.GetNeighbors()] for a in m.GetAtoms()}
    dist = {}
    for s in range(n):
        seen, layer = {s: 0}, [s]
        while layer:
            layer = [w for v in layer for w in near[v] if w not in seen and not seen.update({w: seen[v] + 1})]
        dist[s] = seen
    deg, top = {v: len(w) for v, w in near.items()}, max(len(w) for w in near.values())
    bonds = [(b.GetBeginAtomIdx(), b.GetEndAtomIdx()) for b in m.GetBonds()]
    pairs = [(u, v, d) for u in range(n) for v, d in dist[u].items() if u < v]
    side = [(sum(dist[w].get(u, n) < dist[w].get(v, n) for w in range(n)), sum(dist[w].get(v, n) < dist[w].get(u, n) for w in range(n))) for u, v in bonds]
    ecc = {v: max(dist[v].values()) for v in range(n)}
    out = {"wiener": sum(d for *_, d in pairs), "harary": sum(1 / d for *_, d in pairs), "gutman": sum(deg[u] * deg[v] * d for u, v, d in pairs), "diameter": max(ecc.values()),
           "eccentric_connectivity": sum(deg[v] * ecc[v] for v in range(n)), "szeged": sum(a * b for a, b in side), "mostar": sum(abs(a - b) for a, b in side)}
    for kind, weight in {"": lambda v: deg[v], "reverse_": lambda v: top - deg[v] + 1, "reduced_reverse_": lambda v: top - deg[v] + 2}.items():
        out[f"{kind}randic"] = sum((weight(u) * weight(v)) ** -0.5 for u, v in bonds)
        out[f"{kind}second_zagreb"] = sum(weight(u) * weight(v) for u, v in bonds)
        out[f"{kind}abc"] = sum(((weight(u) + weight(v) - 2) / (weight(u) * weight(v))) ** 0.5 for u, v in bonds)
    return {k: float(v) for k, v in out.items()}


@given(st.lists(st.sampled_from([*SMILES, "C1CCC(CC1)C1CCCCC1", "CC12CCC(CC1)C2(C)C", "FC(F)(F)F", "C#CC#N"]), min_size=1, max_size=6))
@settings(max_examples=40, deadline=None)
def test_topological_indices_equal_loops(smiles):
    rep = TopologicalIndices()
    X = rep.rows([read_molecule(s) for s in smiles])
    for row, s in zip(X, smiles, strict=True):
        found = dict(zip(rep.names, row.tolist(), strict=True))
        for k, v in brute(s).items(): assert np.isclose(found[k], v, rtol=1e-5), (s, k)


def test_rdkit_agrees_where_definitions_do():
    from rdkit.Chem import GraphDescriptors
    rep = TopologicalIndices()
    for s in ["CCCCCC", "CC(C)C(C)(C)C", "C1CCCCC1", "CC1CC2CC1CC2C"]:
        x, m = dict(zip(rep.names, rep(s)["x"].tolist(), strict=True)), read_molecule(s)
        assert np.isclose(x["balaban_j"], GraphDescriptors.BalabanJ(m), rtol=1e-5) and np.isclose(x["randic"], GraphDescriptors.Chi1(m), rtol=1e-5)


def test_path_star_cycle_formulas():
    "Closed forms: path, star and cycle of n atoms."
    rep = TopologicalIndices()
    get = lambda s: dict(zip(rep.names, rep(s)["x"].tolist(), strict=True))
    for n in range(3, 9):
        path, cycle = get("C" * n), get("C1" + "C" * (n - 2) + "C1")
        assert path["wiener"] == n * (n * n - 1) / 6 and path["first_zagreb"] == 4 * n - 6 and path["reverse_second_zagreb"] == 4 + (n - 3)
        assert cycle["wiener"] == (n**3 if n % 2 == 0 else n**3 - n) / 8 and cycle["reverse_second_zagreb"] == n and cycle["reduced_reverse_second_zagreb"] == 4 * n
    star = get("FC(F)(F)F")
    assert star["wiener"] == 16 and star["reverse_second_zagreb"] == 4 * 4 * 1 and star["reduced_reverse_second_zagreb"] == 4 * 5 * 2
    assert len(DEGREE_INDICES) * len(DEGREES) == 45 and graphs_of([read_molecule("C")]).n.tolist() == [1]


# matminer 0.10.1, ElementProperty("pymatgen", …) with mean, avg_dev, minimum, maximum, range, mode, and Stoichiometry(p_list=(0, 2, 3, 5, 7, 10))
MATMINER = {
    "Fe2O3": ([2.796, 0.7728, 1.83, 3.44, 1.61, 3.44, 31.93764, 19.125888, 15.9994, 55.845, 39.8456, 15.9994, 2.8, 0.96, 2.0, 4.0, 2.0, 2.0, 12.8, 3.84, 8.0, 16.0, 8.0, 16.0, 757.28, 842.976, 54.8, 1811.0, 1756.2, 54.8,
               85.0, 19.2, 61.0, 101.0, 40.0, 101.0], [2.0, 0.72111, 0.654213, 0.61503, 0.604895, 0.601032]),
    "BaTiO3": ([2.55, 1.068, 0.89, 3.44, 2.55, 3.44, 46.63844, 36.766848, 15.9994, 137.327, 121.3276, 15.9994, 3.2, 1.44, 2.0, 6.0, 4.0, 2.0, 10.8, 6.24, 2.0, 16.0, 14.0, 16.0, 621.08, 679.536, 54.8, 1941.0, 1886.2, 54.8,
                73.6, 32.88, 14.0, 101.0, 87.0, 101.0], [3.0, 0.663325, 0.614463, 0.600984, 0.600078, 0.600002]),
    "LiFePO4": ([2.68, 0.868571, 0.98, 3.44, 2.46, 3.44, 22.536766, 11.927209, 6.941, 55.845, 48.904, 15.9994, 2.428571, 0.612245, 2.0, 4.0, 2.0, 2.0, 12.571429, 4.612245, 1.0, 16.0, 15.0, 16.0, 400.17, 418.385714, 54.8,
                 1811.0, 1756.2, 54.8, 81.0, 25.428571, 12.0, 101.0, 89.0, 101.0], [4.0, 0.6227, 0.580221, 0.571763, 0.571444, 0.571429])}


@pytest.mark.parametrize("formula", MATMINER)
def test_composition_statistics_against_matminer(formula):
    properties, norms = MATMINER[formula]
    rep = CompositionStats()
    x = dict(zip(rep.names, rep(formula)["x"].tolist(), strict=True))
    names = [f"{s} {p}" for p in ("X", "atomic_mass", "row", "group", "melting_point", "mendeleev_no") for s in ("mean", "avg_dev", "min", "max", "range", "mode")]
    assert np.allclose([x[n] for n in names], properties, rtol=1e-3)  # tables of atomic masses differ in the fifth digit
    assert np.allclose([x["elements"], *(x[f"{p}-norm"] for p in (2, 3, 5, 7, 10))], norms, rtol=1e-5)


def test_tables_have_names():
    frame, rejected = table(TopologicalIndices(), molecules(["CCO", "CCCC"], ids=["a", "b"])[0])
    assert frame.columns == ["id", *TopologicalIndices().names] and frame["wiener"].to_list() == [4, 10] and len(rejected) == 0
    frame, rejected = table(CompositionStats(), compositions(["Og", "NaCl"])[0])
    assert frame["mean Z"].to_list() == [14] and len(rejected) == 1
