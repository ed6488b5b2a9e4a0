"""Functional groups: the quick search against a plain one, atoms against the table, mining against counting by hand, contributions against what they must add up to."""
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from matfm import testing
from matfm.core import BadInput
from matfm.data.records import molecules
from matfm.represent.descriptors import Descriptor, matrix
from matfm.represent.groups import (FAMILIES, GROUPS, NAMES, FunctionalGroups, Miner, find_groups, group_counts, groups_of_atoms, load_mined, members, mine, pieces_of,
                                    read_groups, smiles_tokens)
from matfm.represent.molecule import read_molecule

SMILES = ["CCO", "c1ccccc1O", "CC(=O)Nc1ccc(O)cc1", "C[N+](C)(C)C", "C", "OC(=O)C1CC1", "CC(=O)Oc1ccccc1C(=O)O", "[Na+].[O-]C(=O)c1ccccc1", "CN1CCN(CC1)Cc1ccc(cc1)C(=O)Nc1ccc(C)c(c1)Nc1nccc(n1)-c1cccnc1",
          "FC(F)(F)c1ccc(Cl)cc1", "Cn1c(=O)c2c(ncn2C)n(C)c1=O", "O=S(=O)(N)c1ccc(N)cc1"]


@pytest.mark.parametrize("group", GROUPS, ids=lambda g: g.name)
def test_every_group_has_its_example_and_spares_the_other(group):
    i = NAMES.index(group.name)
    assert i in find_groups(read_molecule(group.has)), f"{group.name} is not found in {group.has}"
    assert i not in find_groups(read_molecule(group.lacks)), f"{group.name} is found in {group.lacks}"


def test_the_table():
    assert len(NAMES) == len(set(NAMES)) >= 400 and {g.family for g in GROUPS} == set(FAMILIES)
    with pytest.raises(BadInput, match="name"): read_groups("alcohol | CO")


@pytest.mark.parametrize("smiles,named", [
    ("CC(=O)OCC", {"ethyl ester": 1, "acetate ester": 1, "ester": 1}), ("OCC(O)CO", {"primary alcohol": 2, "secondary alcohol": 1, "hydroxyl": 3}), ("Clc1ccc(Cl)cc1", {"aryl chloride": 2, "para-disubstituted benzene": 1}),
    ("c1ccc2[nH]ccc2c1", {"indole": 1, "pyrrole": 1, "benzene ring": 1}), ("NS(=O)(=O)c1ccccc1", {"primary sulfonamide": 1, "phenyl": 1}), ("CC(=O)N(C)C", {"tertiary amide": 1, "acetamide": 1})])
def test_counts(smiles, named):
    counts = group_counts(read_molecule(smiles))
    assert {n: int(counts[NAMES.index(n)]) for n in named} == named


@pytest.mark.parametrize("smiles,words", [
    ("CCC(=O)O", ["methyl", "methylene", *["carboxylic acid"] * 3]), ("C1COCCN1C", ["morpholine", "morpholine", "dialkyl ether", "morpholine", "morpholine", "tertiary aliphatic amine", "methyl"]), ("CC(F)(F)F", ["methyl", *["trifluoromethyl"] * 4]), ("[Na+].[Cl-]", ["alkali metal ion", "chloride ion"])])
def test_words_of_a_molecule(smiles, words):
    assert [NAMES[g] for g in groups_of_atoms(read_molecule(smiles))] == words


@pytest.mark.parametrize("smiles", SMILES)
def test_atoms_do_not_depend_on_their_order(smiles):
    from rdkit import Chem
    mol = read_molecule(smiles)
    order = np.random.default_rng(0).permutation(mol.GetNumAtoms()).tolist()
    other = Chem.RenumberAtoms(mol, order)
    assert np.array_equal(groups_of_atoms(other), groups_of_atoms(mol)[order]) and np.array_equal(group_counts(other), group_counts(mol))


def test_quick_search_finds_what_a_plain_one_finds(mirror):
    from rdkit import Chem
    from matfm.data.sources import load_frame
    rows = load_frame("unlabelled_union", limit=20_000)["smiles"].to_list()[::80]
    patterns = [Chem.MolFromSmarts(g.smarts) for g in GROUPS]
    for s in rows:
        m = read_molecule(s)
        assert set(find_groups(m)) == {i for i, p in enumerate(patterns) if m.HasSubstructMatch(p)}, s


@pytest.mark.parametrize("smiles", SMILES)
def test_tokens_know_their_atoms(smiles):
    mol = read_molecule(smiles)
    seen = [a for _, atoms in smiles_tokens(mol) for t in atoms for a in t]
    assert sorted(seen) == list(range(mol.GetNumAtoms()))
    for tokens, atoms in smiles_tokens(mol):
        for t, a in zip(tokens, atoms, strict=True):
            if a: assert mol.GetAtomWithIdx(a[0]).GetSymbol().lower() in t.lower()


def slow(words, support):
    "Merging by plain counting."
    words, merges = [list(w) for w in words], []
    while True:
        count = Counter()
        for w in words: count.update(pairwise(w))
        if not count or max(count.values()) < support: return merges
        best = max(count, key=lambda p: count[p])
        n = count[best]
        if sum(c == n for c in count.values()) > 1: return merges  # a tie: order is a matter of taste
        merges.append((*best, n))
        for w in words:
            i = 0
            while i < len(w) - 1:
                if (w[i], w[i + 1]) == best: w[i:i + 2] = [w[i] + w[i + 1]]
                i += 1


@settings(max_examples=80, deadline=None)
@given(st.lists(st.text("abc", min_size=1, max_size=12), min_size=1, max_size=8))
def test_miner_counts_pairs_as_a_loop_does(words):
    want, miner = slow(words, 2), Miner(words, 60)
    for merge in want:
        assert miner.best() == merge
        miner.merge(*merge[:2])
    count = Counter()
    texts = "".join(miner.names[k] or " " for k in miner.a)
    tokens = [[]]
    for k in miner.a:
        if k: tokens[-1].append(miner.names[k])
        else: tokens.append([])
    assert texts.split() == [w for w in words] and Counter(map("".join, filter(None, tokens))) == Counter(words)
    for t in tokens: count.update(pairwise(t))
    ids = {n: i for i, n in enumerate(miner.names)}
    assert miner.counts.sum() == sum(count.values()) and all(miner.counts[ids[a], ids[b]] == n for (a, b), n in count.items())


def test_mining_is_resumed_and_refuses_another_corpus(tmp_path):
    corpus = [*SMILES, *["CCC(=O)OCC", "CCCC(=O)OC", "Cc1ccccc1", "CCc1ccccc1"]]
    whole = mine(corpus, 3)
    assert len(whole) > 8 and [n for *_, n in whole] == sorted((n for *_, n in whole), reverse=True)
    assert mine(corpus, 3, limit=5, path=tmp_path / "m.json", save_every=2) == whole[:5] == load_mined(tmp_path / "m.json")
    assert mine(corpus, 3, path=tmp_path / "m.json") == whole and mine(corpus, 6, path=tmp_path / "m.json") == tuple(m for m in whole if m[2] >= 6)
    assert load_mined(tmp_path / "m.json") == whole
    with pytest.raises(BadInput, match="another corpus"): mine(corpus[1:], 3, path=tmp_path / "m.json")
    (tmp_path / "m.json").write_text("{")
    with pytest.raises(BadInput, match="no mined patterns"): load_mined(tmp_path / "m.json")
    with pytest.raises(BadInput, match="support must be"): mine(corpus, 1)


def test_pieces_are_the_text_of_their_atoms():
    merges = {(a, b): i for i, (a, b, _) in enumerate(mine(SMILES * 3, 4))}
    for s in SMILES:
        for tokens, atoms in smiles_tokens(read_molecule(s)):
            for piece, where in pieces_of(tokens, atoms, merges):
                assert piece in "".join(tokens) and len(set(where)) == len(where)


@pytest.mark.parametrize("rep", [FunctionalGroups(), FunctionalGroups(counts=False), FunctionalGroups.fit(SMILES, support=3), FunctionalGroups.fit(SMILES, support=3, curated=False, descriptors=("MolLogP", "TPSA"))], ids=["groups", "bits", "patterns", "descriptors"])
def test_representation(rep):
    records, _ = molecules(SMILES, canonical=False)
    testing.check_representation(rep, records)
    X, kept, rejected = matrix(rep, records, block=5)
    assert isinstance(rep, Descriptor) and X.shape == (len(SMILES), len(rep.names)) and len(set(rep.names)) == len(rep.names)
    assert np.array_equal(X, np.stack([rep(s)["x"] for s in SMILES]))
    for row, s in zip(X, SMILES, strict=True):
        there = {k: len(w) if rep.counts else 1 for k, w in members(rep, read_molecule(s)).items()}
        assert {k: int(row[k]) for k in np.flatnonzero(row[:rep.bits])} == there
    if rep.descriptors:
        assert np.allclose(X[:, rep.bits:].mean(0), 0, atol=1e-4) and np.allclose(X[:, rep.bits:].std(0), 1, atol=1e-4)


def test_features_on_disk(tmp_path):
    from matfm.represent.featurise import featurise
    rep = FunctionalGroups.fit(SMILES, support=3)
    records, _ = molecules(SMILES, canonical=False)
    found = featurise(records, rep, tmp_path / "f", jobs=0, progress=False)
    assert list(found.columns) == list(rep.names) and np.array_equal(found.matrix(), matrix(rep, records)[0])


def test_contributions_add_up():
    import torch
    from matfm.models.fgr import GroupMLP, draw_contributions, explain, integrated_gradients, left_out, on_atoms
    from matfm.models.heads import Output, Task, make_predictor
    rep = FunctionalGroups.fit(SMILES, support=3, descriptors=("MolLogP",))
    torch.manual_seed(0)
    net = GroupMLP(len(rep.names), rep.bits, 16, 32)
    y = np.arange(len(SMILES), dtype=float)[:, None]
    predictor = make_predictor(net, Task((Output("s", unit="eV"), Output("c", "binary"))), np.hstack([y, y % 2])).eval()
    with torch.no_grad(): predictor.heads.layers[-1].weight.normal_()
    for output, unit in (("s", "eV"), ("c", "log-odds")):
        e = explain(predictor, rep, SMILES[2], output, steps=64)
        assert e.unit == unit and np.isclose(e.base + sum(v for *_, v in e.columns), e.value, atol=1e-3)
        assert np.isclose(e.atoms.sum(), sum(v for n, _, v in e.columns if n != "MolLogP"), atol=1e-5) and "<svg" in e._repr_html_()
    w = torch.randn(len(rep.names))
    x = torch.from_numpy(rep.rows([read_molecule(s) for s in SMILES]))
    assert torch.allclose(integrated_gradients(lambda x: x @ w, x), x * w, atol=1e-5)
    assert torch.allclose(left_out(lambda x: x @ w, x, [range(rep.bits)])[:, 0], (x * w)[:, :rep.bits].sum(1), atol=1e-4)
    ones = np.zeros(len(rep.names)); ones[NAMES.index("carboxylic acid")] = 3.0
    assert np.allclose(on_atoms(rep, read_molecule("CC(=O)O"), ones), [0, 1, 1, 1])
    blue, red = (draw_contributions("CC", np.array(v)) for v in ([1.0, 0.0], [-1.0, 0.0]))
    assert blue != red and blue.startswith("<?xml")


def test_reconstruction_sees_only_what_is_there():
    import torch
    from matfm.models.fgr import GroupMLP
    from matfm.pretrain.fgr import GroupReconstruction
    rep = FunctionalGroups.fit(SMILES, support=3, descriptors=("TPSA",))
    net = GroupMLP(len(rep.names), rep.bits, 16, 32)
    objective = GroupReconstruction.for_encoder(net, rep, hide=0.3)
    batch = rep.collate([rep(s) for s in SMILES])
    with torch.no_grad():
        for p in objective.head.parameters(): p.zero_()
        objective.head[-1].bias[:rep.bits] = torch.where(batch["x"][0, :rep.bits] > 0, 20.0, -20.0)
    out = objective(net, {"x": batch["x"][:1].repeat(4, 1)}, torch.Generator().manual_seed(0))
    assert out["recall"] == out["precision"] == out["hidden_recall"] == 1
    assert torch.isclose(out["loss"], batch["x"][0, rep.bits:].pow(2).mean(), atol=1e-5)
    with pytest.raises(BadInput, match="needs x"): objective(net, {})
