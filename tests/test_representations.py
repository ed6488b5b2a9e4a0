"""Representations against each other and against RDKit and pymatgen: round trips, invariance, exact neighbours, bad input."""
import csv
import gzip
import pickle
import random
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings, strategies as st

from matfm.core import BadInput
from matfm.data.loading import featurise
from matfm.data.records import Crystal, compositions, crystals, molecules
from matfm.registry import representations
from matfm.represent.crystal import CrystalGraph, neighbours
from matfm.represent.descriptors import CompositionStats, Ecfp, MoleculeDescriptors, matrix
from matfm.represent.molecule import MoleculeGraph, canonical, scaffold
from matfm.represent.sequence import AROMATIC, CHIRAL, ELEMENTS, GLYPHS, SmilesTokens, randomise

TOKENS = SmilesTokens(max_length=100_000)


def round_trips(smiles: str, tokens: SmilesTokens = TOKENS) -> bool:
    ids = tokens(smiles)["tokens"]
    return tokens.unk_id not in ids and tokens.decode(ids) == smiles


# ---- SMILES ----------------------------------------------------------------------------------------------------------

number = st.integers(0, 999).map(str) | st.just("")
bracket = st.builds(
    "[{}{}{}{}{}{}]".format, number, st.sampled_from([*ELEMENTS, *AROMATIC, "*", "#6"]),
    st.sampled_from(["", "@", "@@", "@TH1", "@AL2", "@SP3", "@TB20", "@OH30"]),
    st.sampled_from(["", "H", "H2", "H12"]), st.sampled_from(["", "+", "-", "+2", "-10", "++", "--"]),
    st.integers(0, 99_999).map(":{}".format) | st.just(""))
outside = st.sampled_from(["C", "N", "O", "Cl", "Br", "c", "n", "s", "*", "(", ")", "=", "#", "$", ":", "/", "\\", ".", "-", "~", "1", "9", "%10", "%(123)", "->", "<-", ">>"])


@given(st.lists(bracket | outside, min_size=1, max_size=40).map("".join))
@settings(max_examples=500, deadline=None)
def test_the_closed_vocabulary_covers_the_grammar(smiles):
    assert round_trips(smiles)


@given(st.text(alphabet=st.sampled_from([*"CNOPSFIBrcnops[]()=#$:/\\.-+@%123456789Hlt*~<> xé"]), min_size=1, max_size=30))
@settings(max_examples=1000, deadline=None)
def test_what_rdkit_parses_is_tokenised_and_the_rest_round_trips_or_is_refused(text):
    from rdkit import Chem, rdBase
    with rdBase.BlockLogs():  # RDKit takes a name after a space, and overlooks a letter outside ASCII at either end
        parsed = " " not in text and text.isascii() and Chem.MolFromSmiles(text, sanitize=False) is not None
    try:
        ok = round_trips(text)
    except BadInput as e:
        assert not parsed, f"RDKit parses {text!r}, refused: {e}"
        assert "position" in str(e)
    else:
        assert ok


@given(st.integers(1, 118), st.integers(0, 12), st.integers(-4, 4), st.integers(0, 300), st.integers(0, 999))
@settings(max_examples=300, deadline=None)
def test_every_atom_that_rdkit_writes(z, hydrogens, charge, isotope, number):
    from rdkit import Chem
    atom = Chem.Atom(z)
    atom.SetNumExplicitHs(hydrogens)
    atom.SetFormalCharge(charge)
    atom.SetIsotope(isotope)
    atom.SetAtomMapNum(number)
    mol = Chem.RWMol()
    mol.AddAtom(atom)
    assert round_trips(Chem.MolToSmiles(mol))


def test_every_glyph_is_used_and_aliases_are_refused():
    for element in ELEMENTS:
        assert TOKENS.tokens(f"[{element}]") == ["[", element, "]"]
    for smiles, glyph in [("[C@@H]", "@@"), *((f"[Co{c}1]", c) for c in CHIRAL[2:])]:
        assert glyph in TOKENS.tokens(smiles)
    assert TOKENS.tokens("Sc") == ["S", "c"] and TOKENS.tokens("[Sc]") == ["[", "Sc", "]"]
    assert len(set(GLYPHS)) == len(GLYPHS) == TOKENS.vocab_size - 5


@pytest.mark.parametrize("bad,message", [
    ("CCX", r"character 'X' at position 2"), ("C C", r"character ' ' at position 1"), ("C[Zz]C", r"'\[Zz\]' at position 1"), ("C[NH4", r"at position 1 .* never closed"),
    ("CN]", r"character '\]' at position 2"), ("C\n", "position 1"), ("[]", "no bracket atom"), ("[C@@@]", "no bracket atom"), ("Fe", r"character 'e' at position 1"),
    ("C\x00", "position 1"), ("", "empty"), (b"CC", "got bytes"), (["C"], "got list"), ("C" * 300, "max_length=256")])
def test_no_smiles_says_where(bad, message):
    with pytest.raises(BadInput, match=message):
        SmilesTokens()(bad)


def test_vocabulary_survives_pickle_json_and_other_vocabularies_say_unknown():
    rep = SmilesTokens.fit(["CC[NH3+]", "[Na+].[Cl-]"], max_length=50)
    rep("CCC")  # fills the table
    for copy in (pickle.loads(pickle.dumps(rep)), SmilesTokens.from_json(rep.to_json()), representations.build(representations.describe(rep))):
        assert copy == rep and copy.digest == rep.digest and np.array_equal(copy("CC[NH3+]")["tokens"], rep("CC[NH3+]")["tokens"])
    assert rep.unk_id in rep.encode("[K+]") and rep.tokens("[Na+]") == ["[Na+]"]
    assert SmilesTokens().digest == SmilesTokens.default().digest != SmilesTokens(max_length=64).digest


def test_padding_is_outside_the_mask():
    batch = TOKENS.collate([TOKENS("C"), TOKENS("CC[N+](C)(C)C")])
    assert batch["tokens"].shape == batch["mask"].shape and batch["mask"].sum(1).tolist() == [3, TOKENS.size(TOKENS("CC[N+](C)(C)C"))]
    assert (batch["tokens"][~batch["mask"]] == TOKENS.pad_id).all()
    with pytest.raises(BadInput, match="at least one record"):
        TOKENS.collate([])


def test_the_mirror_round_trips_without_unknown_tokens(mirror):
    path = mirror / "molecules" / "unlabelled_union.csv.gz"
    if not path.is_file():
        pytest.skip(f"{path.name} is not in the mirror")
    with gzip.open(path, "rt") as f:
        rows = csv.reader(f)
        column = next(rows).index("smiles")
        smiles = [r[column] for i, r in zip(range(600_000), rows, strict=False) if i % 30 == 0]
    assert len(smiles) == 20_000
    assert [s for s in smiles if not round_trips(s)] == []


# ---- molecular graphs ------------------------------------------------------------------------------------------------

CHIRAL_SMILES = ["C[C@H](N)C(=O)O", "F/C=C\\Cl", "C[C@H]1CC[C@@H](C)CC1", "OC[C@H]1OC(O)[C@H](O)[C@@H](O)[C@@H]1O", "C[S@](=O)c1ccccc1", "C/C=C/C=C\\C",
                 "[2H]C([2H])([2H])O", "[Pt@SP1](F)(Cl)(Br)I", "CC[N@@+]1(C)CCCO1", "*c1ccc(*)cc1", "[Fe+2].[cH-]1cccc1.[cH-]1cccc1", "O=C1C[C@@H]2CC[C@H]1C2", "C"]


def multiset(item):
    atoms = [tuple(a) for a in item["atoms"].tolist()]
    ends = item["edge_index"].T.tolist()
    return sorted(atoms), sorted((atoms[s], tuple(b), atoms[t]) for b, (s, t) in zip(item["bonds"].tolist(), ends, strict=True))


@pytest.mark.parametrize("smiles", CHIRAL_SMILES)
def test_the_order_of_atoms_does_not_matter(smiles):
    rep, rng = MoleculeGraph(), np.random.default_rng(0)
    reference = multiset(rep(smiles))
    for _ in range(10):
        other = randomise(smiles, rng)
        assert multiset(rep(other)) == reference, other
        assert canonical(other) == canonical(smiles) and scaffold(other) == scaffold(smiles)


@pytest.mark.parametrize("a,b", [("C[C@H](N)C(=O)O", "C[C@@H](N)C(=O)O"), ("F/C=C\\Cl", "F/C=C/Cl"), ("C[C@H]1CC[C@@H](C)CC1", "C[C@H]1CC[C@H](C)CC1"), ("CC[O-]", "CCO")])
def test_stereo_and_charge_are_features(a, b):
    assert multiset(MoleculeGraph()(a)) != multiset(MoleculeGraph()(b))


def test_features_fit_their_sizes_on_odd_molecules():
    rep = MoleculeGraph()
    for s in ["[U+6]", "F[U](F)(F)(F)(F)F", "[Og]", "[H][H]", "[Fe]<-[C-]#[O+]", "FS(F)(F)(F)(F)F", "C~C", "[*:3]C", "[CH2]", "[C-4]", "[Zr+7]", "C$C"]:
        item = rep(s)
        assert (item["atoms"] < np.array(rep.atom_sizes)).all() and (item["atoms"] >= 0).all(), s
        assert (item["bonds"] < np.array(rep.bond_sizes)).all() and item["edge_index"].shape == (2, len(item["bonds"])), s


@pytest.mark.parametrize("bad,message", [("C1CC", "syntax"), ("CN(C)(C)(C)C", "valence"), ("c1cccc1", "kekulize"), ("", "at least one atom"), (1.5, "got float"), ("C" * 401, "max_atoms")])
def test_no_molecule_says_why(bad, message):
    with pytest.raises(BadInput, match=message):
        MoleculeGraph()(bad)


# ---- crystals --------------------------------------------------------------------------------------------------------

def random_crystal(seed: int, n: int = 4) -> Crystal:
    rng = np.random.default_rng(seed)
    while True:
        lattice, frac = np.diag(rng.uniform(3, 6, 3)) + rng.uniform(-1, 1, (3, 3)), rng.random((n, 3))
        if np.linalg.det(lattice) > 30 and len(neighbours(lattice, frac, 0.7)[0]) == 0:
            return Crystal(lattice, rng.integers(1, 90, n), frac)


def environment(crystal: Crystal, rep: CrystalGraph) -> list:
    "Per atom: its number and the numbers and distances around it."
    b = rep.collate([rep(crystal)])
    around: list[list] = [[] for _ in b["numbers"]]
    for d, j, i in zip(b["distance"].tolist(), *b["edge_index"].tolist(), strict=True):
        around[i].append((d, int(b["numbers"][j])))
    return sorted((int(z), sorted(a)) for z, a in zip(b["numbers"], around, strict=True))


def same_environments(a: list, b: list) -> bool:
    return len(a) == len(b) and all(
        x[0] == y[0] and len(x[1]) == len(y[1]) and np.allclose([p[0] for p in x[1]], [p[0] for p in y[1]], atol=1e-4) for x, y in zip(a, b, strict=True))


@given(st.integers(0, 10_000), st.floats(1.5, 7))
@settings(max_examples=25, deadline=None)
def test_neighbours_are_exact(seed, cutoff):
    c = random_crystal(seed)
    i, j, image, d = neighbours(c.lattice, c.frac + np.random.default_rng(seed).integers(-2, 3, c.frac.shape), cutoff)
    shifts = np.stack(np.meshgrid(*[np.arange(-6, 7)] * 3), -1).reshape(-1, 3)
    brute = np.linalg.norm((c.frac[None, :, None] - c.frac[:, None, None] + shifts) @ c.lattice, axis=-1)
    safe = np.abs(brute - cutoff).min() > 1e-6
    assert not safe or len(d) == ((brute < cutoff) & (brute > 1e-8)).sum()
    frac = c.frac + np.random.default_rng(seed).integers(-2, 3, c.frac.shape)
    assert np.allclose(np.linalg.norm((frac[j] + image - frac[i]) @ c.lattice, axis=1), d, atol=1e-9)


@pytest.mark.parametrize("max_neighbors", [12, None])
@pytest.mark.parametrize("seed", range(4))
def test_the_graph_does_not_depend_on_how_the_crystal_is_written(seed, max_neighbors):
    c, rep, rng = random_crystal(seed), CrystalGraph(cutoff=5.0, max_neighbors=max_neighbors), np.random.default_rng(seed)
    reference = environment(c, rep)
    order, q = rng.permutation(len(c)), np.linalg.qr(rng.normal(size=(3, 3)))[0]
    shear = np.array([[1, 0, 0], [1, 1, 0], [-1, 2, 1]])
    grid = np.argwhere(np.ones((2, 1, 3)))
    for other in (Crystal(c.lattice, c.numbers[order], c.frac[order]), Crystal(c.lattice, c.numbers, c.frac + rng.normal(size=3)), Crystal(c.lattice @ q, c.numbers, c.frac),
                  Crystal(c.lattice, c.numbers, c.frac + rng.integers(-3, 4, c.frac.shape)), Crystal(shear @ c.lattice, c.numbers, c.frac @ np.linalg.inv(shear))):
        assert same_environments(environment(other, rep), reference)
    big = Crystal(c.lattice * [[2], [1], [3]], np.repeat(c.numbers, 6), ((c.frac[:, None] + grid) / [2, 1, 3]).reshape(-1, 3))
    assert same_environments(environment(big, rep), sorted(reference * 6))


def test_the_neighbours_agree_with_pymatgen():
    c = random_crystal(7, 6)
    theirs = c.to_pymatgen().get_all_neighbors(6.0)
    item = CrystalGraph(max_neighbors=None)(c)
    for k, around in enumerate(theirs):
        mine = {(int(j), *map(int, im)) for (j, i), im in zip(item["edge_index"].T, item["image"], strict=True) if i == k}
        assert mine == {(n.index, *map(int, n.image)) for n in around}


def test_whole_shells_are_kept():
    iron = Crystal(np.eye(3) * 2.866, [26, 26], [[0, 0, 0], [0.5, 0.5, 0.5]])
    for k, expected in [(1, 8), (8, 8), (9, 14), (12, 14), (15, 26)]:
        edges = CrystalGraph(max_neighbors=k)(iron)["edge_index"]
        assert np.bincount(edges[1]).tolist() == [expected, expected], k


@pytest.mark.parametrize("record,message", [(Crystal(np.eye(3) * 20, [10], [[0, 0, 0]]), "atom 0 has no neighbour within 6"), ("data_NaCl", "a Crystal is needed"), (None, "got NoneType")])
def test_no_crystal_says_why(record, message):
    with pytest.raises(BadInput, match=message):
        CrystalGraph()(record)


@given(st.lists(st.integers(0, 500), min_size=1, max_size=5), st.sampled_from([1, 12, None]), st.floats(2.0, 6.0))
@settings(max_examples=25, deadline=None)
def test_many_crystals_are_each_of_them(seeds, max_neighbors, cutoff):
    rep, found = CrystalGraph(cutoff, max_neighbors), [random_crystal(s, 1 + s % 7) for s in seeds]
    for given_as in (found, crystals(found)[0]):
        for crystal, many in zip(found, rep.many(given_as), strict=True):
            try: one = rep(crystal)
            except BadInput: assert many is None
            else: assert one.keys() == many.keys() and all(one[k].dtype == many[k].dtype and np.array_equal(one[k], many[k]) for k in one)


BROKEN = {"lattice": [None, [1.0] * 8, [float("nan")] * 9, [0.0] * 9, [float("inf")] * 9, [None] * 9], "numbers": [None, [], [8], [0, 8], [8, 119], [None, 8]],
          "frac": [None, [], [0.0] * 5, [0.0, 0.0, 0.0, 0.5, float("nan"), 0.5], [0.0, 0.0, 0.0, 0.5, None, 0.5]]}


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_broken_row_of_a_table_is_set_aside_with_its_reason(jobs):
    values = [(c, v) for c, vs in BROKEN.items() for v in vs]
    sound, alone = random_crystal(3, 2), Crystal(np.eye(3) * 30, [10, 10], [[0, 0, 0], [0.5, 0.5, 0.5]])
    records, _ = crystals([sound] * len(values) + [alone, sound])
    cells = {c: records.frame[c].to_list() for c in BROKEN}
    for row, (c, v) in enumerate(values): cells[c][row] = v
    bad = replace(records, frame=records.frame.with_columns(pl.Series(c, v, dtype=records.frame.schema[c], strict=False) for c, v in cells.items()))
    items, kept, rejected = featurise(CrystalGraph(), bad, jobs=jobs)
    assert kept.tolist() == [len(values) + 1] and np.array_equal(items[0]["edge_index"], CrystalGraph()(sound)["edge_index"])
    assert rejected.frame["row"].to_list() == list(range(len(values) + 1)) and rejected.frame["id"].to_list() == bad.ids[:-1]
    assert all(rejected.frame["reason"]) and "no neighbour within 6" in rejected.frame["reason"][-1]
    assert {r.split(" ")[0] for r in rejected.frame["reason"]} >= {"lattice", "the", "atomic", "a"}


def test_a_list_with_strangers_in_it():
    found = [random_crystal(1), "data_NaCl", None, random_crystal(2, 3)]
    assert [m is not None for m in CrystalGraph().many(found)] == [True, False, False, True] and CrystalGraph().many([]) == []


def test_a_corpus_of_crystals_is_written_in_bulk(tmp_path):
    from matfm.data.corpora import write_corpus
    found = [random_crystal(s, 2 + s % 3) for s in range(7)]
    corpus = write_corpus(tmp_path / "c", CrystalGraph(), [*found[:4], "no crystal", *found[4:]], rows_per_shard=5)
    assert len(corpus) == 7 and corpus.rejected().frame["row"].to_list() == [4]
    for item, c in zip(corpus, found, strict=True): assert all(np.array_equal(item[k], v) for k, v in CrystalGraph()(c).items())


def test_real_crystals_in_bulk(mirror):
    from matfm.data.sources import load
    records = load("mp_20", limit=150, targets=())
    for rep in (CrystalGraph(6.0, None), CrystalGraph()):
        for one, many in zip(map(rep, records.structures()), featurise(rep, records)[0], strict=True):
            assert all(np.array_equal(one[k], many[k]) for k in one)


# ---- batches ---------------------------------------------------------------------------------------------------------

BATCHES = {"smiles": CHIRAL_SMILES, "molecule_graph": CHIRAL_SMILES, "ecfp": CHIRAL_SMILES, "rdkit_descriptors": CHIRAL_SMILES[:4],
           "crystal_graph": [random_crystal(k, 2 + k) for k in range(4)], "composition_stats": ["Fe0.6Ni0.4", "Ca(OH)2", random_crystal(0)]}


@pytest.mark.parametrize("name", BATCHES)
def test_many_together_are_one_by_one(name):
    import torch
    rep = representations.build(name)
    items = [rep(r) for r in BATCHES[name]]
    together, order = rep.collate(items), random.Random(0).sample(range(len(items)), len(items))
    for k in order:
        one = rep.collate([items[k]])
        if "graph" in together:
            mine = together["graph"] == k
            start, edges = int(mine.nonzero()[0]), mine[together["edge_index"][1]]
            for key in {"atoms", "numbers", "frac"} & one.keys():
                assert torch.equal(one[key], together[key][mine])
            for key in {"bonds", "image", "vector", "distance"} & one.keys():
                assert torch.allclose(one[key].float(), together[key][edges].float(), atol=1e-6)
            assert torch.equal(one["edge_index"], together["edge_index"][:, edges] - start)
        else:
            row = together["x"][k] if "x" in one else together["tokens"][k][together["mask"][k]]
            assert torch.equal(row, one["x" if "x" in one else "tokens"][0])


# ---- descriptors -----------------------------------------------------------------------------------------------------

def test_fingerprints_are_rdkits():
    from rdkit import Chem
    from rdkit.Chem import rdFingerprintGenerator
    generator = rdFingerprintGenerator.GetMorganGenerator(radius=2, fpSize=2048)
    for s in CHIRAL_SMILES:
        mol = Chem.MolFromSmiles(s)
        assert np.array_equal(Ecfp()(s)["x"], generator.GetFingerprintAsNumPy(mol)) and np.array_equal(Ecfp(counts=True)(s)["x"], generator.GetCountFingerprintAsNumPy(mol))


def test_all_of_rdkits_descriptors_stay_finite_on_odd_molecules():
    rep = MoleculeDescriptors.everything()
    for s in ["[Na+].[Cl-]", "C", "[Fe]", "F[P-](F)(F)(F)(F)F.[Li+]", "*", "c1ccc2c(c1)ccc1ccccc12", "C" * 120]:
        x = rep(s)["x"]
        assert np.isfinite(x).all() and np.abs(x).max() <= rep.limit and len(x) == len(rep.names), s


@given(st.dictionaries(st.sampled_from(ELEMENTS[:103]), st.floats(0.01, 50), min_size=1, max_size=6), st.floats(0.1, 10))
@settings(max_examples=100, deadline=None)
def test_composition_statistics_depend_on_fractions_alone(amounts, factor):
    rep = CompositionStats()
    write = lambda pairs, k: "".join(f"{s}{n * k:.9f}" for s, n in pairs)
    x, names = rep(write(amounts.items(), 1))["x"], rep.names
    assert np.isfinite(x).all() and x.shape == (len(names),)
    y = rep(write(reversed(amounts.items()), factor))["x"]
    steady = [i for i, n in enumerate(names) if not n.startswith("mode")]  # the most abundant element may change at a near tie
    assert np.allclose(x[steady], y[steady], rtol=1e-3, atol=1e-3)
    column = dict(zip(names, x.tolist(), strict=True))
    assert column["elements"] == len(amounts) and column["min Z"] - 1e-4 <= column["mean Z"] <= column["max Z"] + 1e-4
    assert np.isclose(column["range Z"], column["max Z"] - column["min Z"])


def test_matrix_sets_bad_rows_aside_and_is_the_same_in_blocks_and_processes():
    rows, _ = compositions(["NaCl", "Og", "Fe2O3", "LiFePO4", "Rf2O3"] * 3)
    X, kept, rejected = matrix(CompositionStats(), rows)
    assert kept.tolist() == [0, 2, 3, 5, 7, 8, 10, 12, 13] and rejected.frame["row"].to_list() == [1, 4, 6, 9, 11, 14]
    for more in (dict(block=2), dict(block=4, jobs=2)):
        again, also, _ = matrix(CompositionStats(), rows, **more)
        assert np.array_equal(X, again) and np.array_equal(kept, also)
    nothing, kept, rejected = matrix(CompositionStats(), rows.take([1, 4]))
    assert len(nothing) == len(kept) == 0 and len(rejected) == 2
    assert matrix(Ecfp(bits=32), molecules(["CC", "CO"])[0])[0].shape == (2, 32)
